//! Why a template, a tokenizer or a conversation could not be used.

/// The error of whatever did the work underneath.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be loaded, rendered or encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model file is not the JSON it should be.
    #[error("{file} is not what a model folder holds; fetch the model again")]
    ModelFile {
        /// The file's usual name.
        file: &'static str,
        /// What the parser found.
        source: BoxError,
    },
    /// The model folder holds no chat template.
    #[error(
        "the model has no chat template; add chat_template.jinja, or take an instruct variant of the model"
    )]
    NoTemplate,
    /// A named template was asked for that the model does not have.
    #[error("the model has no chat template named {name:?}; it has {available:?}")]
    UnknownTemplate {
        /// The name asked for.
        name: String,
        /// The names there are.
        available: Vec<String>,
    },
    /// The template is not valid Jinja.
    #[error("chat template {template:?} does not parse at line {line}")]
    TemplateSyntax {
        /// The template's name.
        template: String,
        /// The line, counted from 1.
        line: usize,
        /// What the parser found.
        source: BoxError,
    },
    /// The template itself refused the conversation (`raise_exception`).
    #[error("the chat template refuses this conversation: {message}")]
    Refused {
        /// The template's own words.
        message: String,
    },
    /// The template failed while it was rendered.
    #[error("chat template {template:?} failed at line {line}")]
    Render {
        /// The template's name.
        template: String,
        /// The line, counted from 1; 0 when unknown.
        line: usize,
        /// What went wrong.
        source: BoxError,
    },
    /// The template did more work, or wrote more text, than any honest one.
    #[error("chat template {template:?} went over its {limit}")]
    TemplateLimit {
        /// The template's name.
        template: String,
        /// Which limit.
        limit: &'static str,
    },
    /// The template asks for the date and was given none.
    #[error("chat template {template:?} asks for the date; give it one with Chat::with_now")]
    NoClock {
        /// The template's name.
        template: String,
    },
    /// `continue_final_message` cannot be honoured for this conversation.
    #[error("cannot continue the final message: {reason}")]
    ContinueFinalMessage {
        /// Why not.
        reason: &'static str,
    },
    /// The engine cannot read this `tokenizer.json`.
    #[error("tokenizer.json cannot be loaded; check that it belongs to a supported model")]
    Tokenizer {
        /// What the engine found.
        source: BoxError,
    },
    /// The engine could not encode a text.
    #[error("text of {bytes} bytes cannot be encoded")]
    Encode {
        /// The text's length.
        bytes: usize,
        /// What the engine found.
        source: BoxError,
    },
    /// A message spells a control token, and the template treats the message
    /// so that it cannot be told where.
    #[error("a message spells a control token that cannot be kept plain text; take it out")]
    Unsanitizable,
    /// The rendered text starts with two beginning-of-sequence tokens.
    #[error("the rendered conversation begins with two {token:?}; take one out of the template")]
    DoubledBos {
        /// The token.
        token: String,
    },
}

/// Why one conversation gives no training example. The text is what the
/// manifest lists beside the row.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// The conversation has no messages.
    #[error("the conversation has no messages")]
    Empty,
    /// Rendering or encoding failed; the source says how.
    #[error(transparent)]
    Failed(#[from] Error),
    /// A message's content is not in the rendered text.
    #[error("the chat template drops the content of message {index} (role {role:?})")]
    ContentDropped {
        /// The message's place, counted from 0.
        index: usize,
        /// Its role.
        role: String,
    },
    /// What is trained of a message cannot be told from the rest.
    #[error("the trained text of message {index} cannot be located in the rendered conversation")]
    NotLocated {
        /// The message's place, counted from 0.
        index: usize,
    },
    /// No token of the conversation would be trained.
    #[error("nothing to train on: no message is trained")]
    NothingToTrain,
    /// A weight other than 0 and 1.
    #[error("message {index} has weight {weight}; only 0 and 1 are supported")]
    Weight {
        /// The message's place, counted from 0.
        index: usize,
        /// The weight found.
        weight: f32,
    },
}
