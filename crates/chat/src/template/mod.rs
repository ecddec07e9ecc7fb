//! A model's chat template, rendered as transformers renders it.

mod clock;
mod divergence;
mod environment;
mod generation;
mod generator;
mod json;
mod source;
mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use minijinja::{Environment, ErrorKind, Template, Value};
use sha2::{Digest as _, Sha256};

pub use clock::LocalTime;
pub use divergence::{DivergenceKind, TemplateDivergence};
pub use source::{SpecialTokens, TemplateFiles};
pub(crate) use values::Strings;

use crate::contain::contain;
use crate::error::{Error, Result};
use crate::message::{Content, Conversation, Part};
use values::ContextObject;

/// A compiled chat template, or a model's set of named ones.
///
/// # COMPATIBILITY
///
/// Renders byte for byte what `transformers.apply_chat_template` does, on
/// minijinja with Python's method names and these overrides: no autoescaping,
/// line ends normalised, Jinja2's `iterable`, `sequence`, `int`, `float` and
/// `length`, Python's `json.dumps` behind `tojson`. Where a template uses what
/// is known to differ, [`divergences`](ChatTemplate::divergences) says so.
/// `strftime_now` exists only where [`RenderOptions::now`] gives the time.
///
/// What Python refuses is refused: a loop over none (`tools` or `documents`
/// that were not given), the generator of `map`, `select`, `reject`,
/// `selectattr`, `rejectattr` or `unique` handed to `tojson` or `length`. Such
/// a generator is true even when it is empty and can be read once, as there.
/// Beyond transformers there are limits: on the work of a render, on its text
/// (64 MiB), and on how deep expressions and `tojson` nest.
pub struct ChatTemplate {
    environment: Environment<'static>,
    templates: BTreeMap<String, Compiled>,
    special_tokens: SpecialTokens,
    divergences: Vec<TemplateDivergence>,
    hash: [u8; 32],
}

#[derive(Debug)]
struct Compiled {
    /// Where the source between `{% generation %}` tags lies.
    generation: Vec<Range<usize>>,
}

/// How to render a conversation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RenderOptions {
    /// End with the opening of an assistant turn, for the model to go on from.
    pub add_generation_prompt: bool,
    /// End inside the last message, for the model to go on writing it.
    pub continue_final_message: bool,
    /// Which of several named templates; by default `tool_use` when there are
    /// tools and such a template, else `default`.
    pub template: Option<String>,
    /// What `strftime_now` answers; without it templates find no such function
    /// and most fall back on a fixed date.
    pub now: Option<LocalTime>,
}

/// What a render wrote between `{% generation %}` tags.
pub(crate) struct Tagged {
    pub(crate) text: String,
    pub(crate) spans: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles one template.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`] if it does not parse.
    pub fn new(source: &str, special_tokens: SpecialTokens) -> Result<ChatTemplate> {
        let sources = BTreeMap::from([(DEFAULT.to_owned(), source.to_owned())]);
        ChatTemplate::from_sources(&sources, special_tokens)
    }

    /// Compiles the template or templates of a model folder, looking for them
    /// in the order transformers does.
    ///
    /// # Errors
    /// [`Error::NoTemplate`] if there is none, [`Error::ModelFile`] if a file
    /// is malformed, [`Error::TemplateSyntax`] if a template does not parse.
    pub fn from_files(files: &TemplateFiles<'_>) -> Result<ChatTemplate> {
        ChatTemplate::from_sources(&files.templates()?, files.special_tokens()?)
    }

    fn from_sources(
        sources: &BTreeMap<String, String>,
        special_tokens: SpecialTokens,
    ) -> Result<ChatTemplate> {
        if sources.is_empty() {
            return Err(Error::NoTemplate);
        }
        let mut environment = environment::new();
        let mut templates = BTreeMap::new();
        let mut divergences = Vec::new();
        let mut hash = Sha256::new();
        for (name, source) in sources {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            hash.update((source.len() as u64).to_le_bytes());
            hash.update(source);
            divergences.extend(divergence::find(name, source));
            let rewritten = generation::rewrite(source);
            let added = environment.add_template_owned(name.clone(), rewritten.source);
            added.map_err(|source| Error::TemplateSyntax {
                template: name.clone(),
                line: source.line().unwrap_or(0),
                source: source.into(),
            })?;
            let compiled = Compiled {
                generation: rewritten.bodies,
            };
            templates.insert(name.clone(), compiled);
        }
        hash.update(special_tokens.to_json());
        Ok(ChatTemplate {
            environment,
            templates,
            special_tokens,
            divergences,
            hash: hash.finalize().into(),
        })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`Error::Refused`] if the template raises, [`Error::Render`] if it
    /// fails, [`Error::TemplateLimit`] if it does not end,
    /// [`Error::UnknownTemplate`] or [`Error::ContinueFinalMessage`] if the
    /// options cannot be met.
    pub fn render(&self, conversation: &Conversation, options: &RenderOptions) -> Result<String> {
        if options.continue_final_message {
            return self.render_unfinished(conversation, options);
        }
        self.render_with(conversation, options, Strings::Plain)
    }

    /// Renders with every string passed through `strings`.
    pub(crate) fn render_with(
        &self,
        conversation: &Conversation,
        options: &RenderOptions,
        strings: Strings<'_>,
    ) -> Result<String> {
        let (name, _) = self.choose(conversation, options)?;
        let context = self.context(conversation, options, strings);
        let text = self.run(name, |template| template.render(context))?;
        self.within_limit(name, text)
    }

    /// Renders and tells what came from between `{% generation %}` tags.
    pub(crate) fn render_tagged(
        &self,
        conversation: &Conversation,
        options: &RenderOptions,
    ) -> Result<Tagged> {
        let (name, compiled) = self.choose(conversation, options)?;
        if compiled.generation.is_empty() || options.continue_final_message {
            return Ok(Tagged {
                text: self.render(conversation, options)?,
                spans: Vec::new(),
            });
        }
        let context = self.context(conversation, options, Strings::Plain);
        let (text, outputs) = self.run(name, |template| template.render_with_spans(context))?;
        let text = self.within_limit(name, text)?;
        let spans = generation::spans(&compiled.generation, &outputs);
        Ok(Tagged { text, spans })
    }

    /// Runs a template, whatever it does.
    fn run<T>(
        &self,
        name: &str,
        render: impl FnOnce(Template<'_, '_>) -> Result<T, minijinja::Error>,
    ) -> Result<T> {
        match contain(|| self.environment.get_template(name).and_then(render)) {
            Ok(rendered) => rendered.map_err(|source| render_error(name, source)),
            Err(panicked) => Err(Error::Render {
                template: name.to_owned(),
                line: 0,
                source: panicked.into(),
            }),
        }
    }

    /// As transformers does it: a tag after the last text, rendered, and the
    /// render cut where the tag landed.
    fn render_unfinished(
        &self,
        conversation: &Conversation,
        options: &RenderOptions,
    ) -> Result<String> {
        let refuse = |reason| Error::ContinueFinalMessage { reason };
        if options.add_generation_prompt {
            return Err(refuse("a generation prompt was asked for as well"));
        }
        let mut tagged = conversation.clone();
        let last = tagged
            .messages
            .last_mut()
            .ok_or_else(|| refuse("there is no message"))?;
        let last =
            last_text(&mut last.content).ok_or_else(|| refuse("the last message has no text"))?;
        let unfinished = last.trim().to_owned();
        last.push_str(TAG);
        let mut text = self.render_with(&tagged, options, Strings::Plain)?;
        let at = text
            .rfind(TAG.trim_end())
            .filter(|_| text.contains(&unfinished))
            .ok_or_else(|| refuse("the chat template does not write the last message"))?;
        let kept_spacing = text[at..].starts_with(TAG);
        text.truncate(at);
        if !kept_spacing {
            text.truncate(text.trim_end().len());
        }
        Ok(text)
    }

    fn choose(
        &self,
        conversation: &Conversation,
        options: &RenderOptions,
    ) -> Result<(&str, &Compiled)> {
        let find = |name: &str| {
            self.templates
                .get_key_value(name)
                .map(|(name, compiled)| (name.as_str(), compiled))
        };
        let found = match &options.template {
            Some(name) => find(name),
            None if conversation.tools.is_some() => find(TOOL_USE).or_else(|| find(DEFAULT)),
            None => find(DEFAULT),
        };
        found.ok_or_else(|| Error::UnknownTemplate {
            name: options.template.clone().unwrap_or(DEFAULT.to_owned()),
            available: self.templates.keys().cloned().collect(),
        })
    }

    fn context(
        &self,
        conversation: &Conversation,
        options: &RenderOptions,
        strings: Strings<'_>,
    ) -> Value {
        let special_tokens = self.special_tokens.values();
        Value::from_object(ContextObject::new(
            conversation,
            options,
            special_tokens,
            strings,
        ))
    }

    fn within_limit(&self, name: &str, text: String) -> Result<String> {
        match text.len() <= MAX_TEXT_BYTES {
            true => Ok(text),
            false => Err(Error::TemplateLimit {
                template: name.to_owned(),
                limit: "limit on rendered text",
            }),
        }
    }

    /// SHA-256 over sources, names and special tokens: equal hashes render
    /// alike.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// Where this template is known to render differently from transformers.
    pub fn divergences(&self) -> &[TemplateDivergence] {
        &self.divergences
    }

    /// The templates' names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.templates.keys().map(String::as_str)
    }

    /// The special tokens that the template sees as variables.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    /// The variables the template reads beside messages, tools, documents and
    /// special tokens: what a caller may set in [`Conversation::variables`].
    pub fn variables(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .environment
            .templates()
            .flat_map(|(_, template)| template.undeclared_variables(false))
            .filter(|name| !STANDARD_VARIABLES.contains(&name.as_str()))
            .filter(|name| self.special_tokens.get(name).is_none())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Whether the template asks for the current date.
    pub fn reads_clock(&self) -> bool {
        self.environment.templates().any(|(_, template)| {
            template
                .undeclared_variables(false)
                .contains(values::STRFTIME_NOW)
        })
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("templates", &self.templates)
            .field("special_tokens", &self.special_tokens)
            .field("divergences", &self.divergences)
            .finish_non_exhaustive()
    }
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// More than any conversation a model could hold.
const MAX_TEXT_BYTES: usize = 64 << 20;

const STANDARD_VARIABLES: [&str; 13] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "raise_exception",
    "namespace",
    "range",
    "dict",
    values::STRFTIME_NOW,
];

fn last_text(content: &mut Content) -> Option<&mut String> {
    match content {
        Content::Text(text) => Some(text),
        Content::Parts(parts) => parts.iter_mut().rev().find_map(|part| match part {
            Part::Text(text) => Some(text),
            Part::Other(object) => match object.get_mut("text") {
                Some(serde_json::Value::String(text)) => Some(text),
                _ => None,
            },
        }),
        Content::Absent | Content::Null => None,
    }
}

fn render_error(name: &str, source: minijinja::Error) -> Error {
    if let Some(message) = environment::raised(&source) {
        return Error::Refused {
            message: message.to_owned(),
        };
    }
    match source.kind() {
        ErrorKind::UnknownFunction if source.to_string().contains(values::STRFTIME_NOW) => {
            Error::NoClock {
                template: name.to_owned(),
            }
        }
        ErrorKind::OutOfFuel => Error::TemplateLimit {
            template: name.to_owned(),
            limit: "limit on work",
        },
        _ => Error::Render {
            template: name.to_owned(),
            line: source.line().unwrap_or(0),
            source: source.into(),
        },
    }
}
