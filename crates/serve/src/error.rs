//! Why the server, an engine or a load failed, by what can be done about it.

use std::net::SocketAddr;
use std::time::Duration;

/// A failure of any kind, boxed to be kept as a source.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request was refused, a generation ended early, or a model did not load.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request asks for something that cannot be; the client must change it.
    #[error("{message}")]
    InvalidRequest {
        /// What is wrong, in a sentence a client can show.
        message: String,
        /// The field at fault, as a path such as `messages[0].role`.
        param: Option<String>,
    },
    /// No engine serves a model of this name.
    #[error("the model `{model}` does not exist; GET /v1/models lists those that do")]
    ModelNotFound {
        /// The name asked for.
        model: String,
    },
    /// Prompt and requested completion do not fit the model's context.
    #[error(
        "this model's context is {max_model_len} tokens, but the request has {prompt_tokens} in \
         the prompt and asks for {max_tokens} more; shorten the messages or lower max_tokens"
    )]
    ContextLength {
        /// Tokens in the rendered prompt.
        prompt_tokens: u32,
        /// Tokens of completion asked for, at least 1.
        max_tokens: u32,
        /// The most tokens prompt and completion may have together.
        max_model_len: u32,
    },
    /// The queue is full; the same request may succeed later.
    #[error("too many requests are waiting; retry in {} s", retry_after.as_secs().max(1))]
    Overloaded {
        /// When to try again.
        retry_after: Duration,
    },
    /// The engine has stopped or the server is shutting down; another replica may answer.
    #[error("{reason}; retry on another replica")]
    Unavailable {
        /// What stopped.
        reason: &'static str,
    },
    /// The request took longer than the server allows.
    #[error("the request took too long; ask for fewer tokens, or try when the server is less busy")]
    Timeout,
    /// A forward pass failed; the requests in that step are lost, others go on.
    #[error("the model could not compute this step")]
    Step {
        /// What the decoder said.
        source: BoxError,
    },
    /// The address is taken by another process.
    #[error("{addr} is already in use; stop the other process or choose another port")]
    PortInUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// The listener could not be opened or failed.
    #[error("cannot listen on {addr}; choose another address")]
    Listen {
        /// The address asked for.
        addr: SocketAddr,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A certificate or private key cannot be used.
    #[error("cannot use {path} for TLS; give a certificate chain and its private key in PEM")]
    Tls {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: BoxError,
    },
    /// A model folder or stage lacks a file that serving needs.
    #[error("{model} has no {file}; {next_step}")]
    MissingFile {
        /// The folder or stage.
        model: String,
        /// The file that is not there.
        file: &'static str,
        /// What to do about it.
        next_step: &'static str,
    },
    /// The store holds no finished stage of this name.
    #[error(
        "{store} holds no finished `{name}`; run the pipeline that writes it, or check the name"
    )]
    NoSuchStage {
        /// The store's URL.
        store: String,
        /// The stage's name.
        name: String,
    },
    /// A setting has no meaning; the message says which and what it may be.
    #[error("{0}")]
    Options(String),
    /// A file of the model could not be read.
    #[error("cannot read {path}; check that it exists and is complete")]
    Read {
        /// The file.
        path: String,
        /// What reading said.
        source: BoxError,
    },
    /// A model or adapter was found but cannot be served.
    #[error("cannot load {model}; import or train it again if its files are damaged")]
    Load {
        /// The folder or stage.
        model: String,
        /// What the loader said.
        source: BoxError,
    },
}

impl Error {
    /// An [`Error::InvalidRequest`] about one field.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::InvalidRequest {
            message: message.into(),
            param: Some(param.into()),
        }
    }

    /// An [`Error::Options`] about two models of one name.
    pub(crate) fn same_name(name: &str) -> Self {
        Self::Options(format!(
            "two models are named `{name}`; give each a name of its own"
        ))
    }

    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Overloaded { .. } | Self::Unavailable { .. } | Self::Step { .. }
        )
    }
}

/// An error and its causes.
pub(crate) fn one_line(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}
