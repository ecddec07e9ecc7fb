//! Why a store call failed, cut by what the caller can do next.

use std::error::Error as StdError;
use std::io;

/// A boxed cause.
pub type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// The result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed, by what you can do about it.
///
/// Each message is one line that names the URL or path and the next step; the
/// cause is in [`source`](StdError::source). No variant ever holds a credential.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store URL cannot be understood; correct it.
    #[error("cannot open the store '{url}': {reason}")]
    InvalidUrl {
        /// The URL, without any credentials it may have held.
        url: String,
        /// What is wrong and what to write instead.
        reason: String,
    },
    /// A dataset, model or object name that cannot be a path in a store; choose another.
    #[error(
        "'{name}' cannot be a name in a store: {reason}; use letters, digits, '.', '_' and '-', with '/' between parts"
    )]
    InvalidName {
        /// The name as given.
        name: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// The store did not answer; check the network and the endpoint, or try later.
    #[error(
        "{url} does not answer; check the address, AWS_ENDPOINT_URL_S3 and the network, then run again to continue"
    )]
    Unreachable {
        /// What was asked for.
        url: String,
        /// The cause.
        source: BoxError,
    },
    /// The store refused us; retrying cannot help.
    #[error(
        "no permission for {url}; check the file's owner, or the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )]
    Denied {
        /// What was asked for.
        url: String,
        /// The cause.
        source: BoxError,
    },
    /// The disk or the quota is full.
    #[error("no space left for {url}; free some, then run again to continue")]
    Full {
        /// What was being written.
        url: String,
        /// The cause.
        source: BoxError,
    },
    /// The store answered with some other error.
    #[error("the store failed at {url}; run again to continue")]
    Store {
        /// What was asked for.
        url: String,
        /// The cause.
        source: BoxError,
    },
    /// An object that must be there is not.
    #[error("{url} is missing; {next}")]
    Missing {
        /// The object.
        url: String,
        /// What to do.
        next: &'static str,
    },
    /// An object's bytes are not what its manifest, or its format, promises.
    #[error("{url} is damaged: {reason}; delete its folder and run again")]
    Corrupt {
        /// The object.
        url: String,
        /// What was found.
        reason: String,
    },
    /// Another process finished this stage with other bytes than ours.
    #[error("another process finished {url} with other bytes; run again to use its result")]
    Superseded {
        /// The stage's folder or object.
        url: String,
    },
    /// Another pair of model and dataset has the folder that this pair's names make too.
    #[error("{url} is already that of a dataset named '{dataset}'; give this dataset another name")]
    NameTaken {
        /// The folder.
        url: String,
        /// The dataset whose folder it is.
        dataset: String,
    },
    /// A value could not become canonical JSON.
    #[error("{what} cannot be written as JSON")]
    Json {
        /// Which value.
        what: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
    /// The caller asked to stop; what is written stays and the next run continues from it.
    #[error("cancelled; run again to continue")]
    Cancelled,
    /// A repository whose owner decides who may read it.
    #[error(
        "{repo} is gated; ask for access on its page, then set HF_TOKEN to a token that has it"
    )]
    Gated {
        /// The repository.
        repo: String,
    },
    /// No such repository, or a private one and no token for it.
    #[error("{repo} is not on the Hub, or is private; check the name, or set HF_TOKEN")]
    RepoNotFound {
        /// The repository.
        repo: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repo} has no revision '{revision}'; give a branch, a tag or a commit")]
    RevisionNotFound {
        /// The repository.
        repo: String,
        /// The revision asked for.
        revision: String,
    },
    /// The repository has no such file at that revision.
    #[error("{repo} has no file '{path}'; list its files on its page")]
    EntryNotFound {
        /// The repository.
        repo: String,
        /// The file asked for.
        path: String,
    },
    /// The token was refused; retrying cannot help.
    #[error("the Hub refused the token for {url}; set HF_TOKEN to a valid one")]
    Unauthenticated {
        /// What was asked for.
        url: String,
    },
    /// The Hub asks for more patience than the deadline allows.
    #[error(
        "the Hub asks to wait {wait_seconds} s before {url}, longer than the deadline; run again later to continue"
    )]
    RateLimited {
        /// What was asked for.
        url: String,
        /// How long it asks to wait.
        wait_seconds: u64,
    },
    /// Network reads are switched off.
    #[error("{url} is needed but HF_HUB_OFFLINE is set; unset it, or give a local folder")]
    Offline {
        /// What would have been asked for.
        url: String,
    },
    /// Offline, and what the cache of the Hub holds of a commit may not be all of it.
    #[error(
        "the cache has no listing of {repo} at {commit}, so a part of it may be missing; unset HF_HUB_OFFLINE, or set UPDRAFT_PARTIAL_CACHE=1 to take the files that are there"
    )]
    PartlyCached {
        /// The repository.
        repo: String,
        /// The commit.
        commit: String,
    },
    /// The bytes changed while they were being read.
    #[error("{url} changed while it was read; run again to read the new version")]
    Changed {
        /// What was being read.
        url: String,
    },
    /// A download broke off too often without making progress.
    #[error("reading {url} broke off at byte {at}; run again to continue")]
    Interrupted {
        /// What was being read.
        url: String,
        /// The first byte that did not come.
        at: u64,
        /// The cause.
        source: BoxError,
    },
    /// A server answered in a way this client does not understand.
    #[error("{url} answered {answer}; check HF_ENDPOINT, or try later")]
    UnexpectedAnswer {
        /// What was asked for.
        url: String,
        /// The status line or what was wrong in the body.
        answer: String,
    },
}

impl Error {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Store { .. }
                | Self::RateLimited { .. }
                | Self::Interrupted { .. }
        )
    }

    /// Sorts an object store's error by what the caller can do about it.
    pub(crate) fn from_store(url: String, error: object_store::Error) -> Self {
        use object_store::Error as Os;
        match &error {
            Os::PermissionDenied { .. } | Os::Unauthenticated { .. } => {
                return Self::Denied {
                    url,
                    source: Box::new(error),
                };
            }
            Os::NotFound { .. } => {
                return Self::Missing {
                    url,
                    next: "check the bucket and the path",
                };
            }
            _ => {}
        }
        match cause(&error) {
            Cause::Denied => Self::Denied {
                url,
                source: Box::new(error),
            },
            Cause::Full => Self::Full {
                url,
                source: Box::new(error),
            },
            Cause::Unreachable => Self::Unreachable {
                url,
                source: Box::new(error),
            },
            Cause::Other => Self::Store {
                url,
                source: Box::new(error),
            },
        }
    }

    /// The same for a plain file-system error.
    #[cfg(feature = "fs")]
    pub(crate) fn from_io(url: String, error: io::Error) -> Self {
        match cause(&error) {
            Cause::Denied => Self::Denied {
                url,
                source: Box::new(error),
            },
            Cause::Full => Self::Full {
                url,
                source: Box::new(error),
            },
            Cause::Unreachable | Cause::Other => Self::Store {
                url,
                source: Box::new(error),
            },
        }
    }
}

enum Cause {
    Denied,
    Full,
    Unreachable,
    Other,
}

/// Looks down the chain for the operating system's or the network's verdict.
fn cause(error: &(dyn StdError + 'static)) -> Cause {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            match io.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    return Cause::Denied;
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => return Cause::Full,
                io::ErrorKind::ConnectionRefused
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::TimedOut => return Cause::Unreachable,
                _ => {}
            }
        }
        #[cfg(any(feature = "s3", feature = "gs", feature = "az"))]
        if let Some(http) = error.downcast_ref::<object_store::client::HttpError>() {
            use object_store::client::HttpErrorKind;
            if matches!(http.kind(), HttpErrorKind::Connect | HttpErrorKind::Timeout) {
                return Cause::Unreachable;
            }
        }
        // An `io::Error` around another error skips that one in its `source`.
        next = match error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
        {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    Cause::Other
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An I/O error buried the way `LocalFileSystem` buries it.
    fn buried(kind: io::ErrorKind) -> Error {
        let source = io::Error::other(io::Error::from(kind));
        let source = object_store::Error::Generic {
            store: "test",
            source: Box::new(source),
        };
        Error::from_store("file:///data/x".into(), source)
    }

    #[test]
    fn a_full_disk_says_so() {
        let error = buried(io::ErrorKind::StorageFull);
        assert!(matches!(error, Error::Full { .. }));
        assert_eq!(
            error.to_string(),
            "no space left for file:///data/x; free some, then run again to continue"
        );
    }

    #[test]
    fn permission_and_network_are_told_apart() {
        assert!(matches!(
            buried(io::ErrorKind::PermissionDenied),
            Error::Denied { .. }
        ));
        assert!(matches!(
            buried(io::ErrorKind::ConnectionRefused),
            Error::Unreachable { .. }
        ));
        assert!(matches!(
            buried(io::ErrorKind::BrokenPipe),
            Error::Store { .. }
        ));
    }

    #[test]
    fn messages_are_one_line() {
        let error = buried(io::ErrorKind::Other);
        assert!(!error.to_string().contains('\n'));
        assert!(error.is_retryable());
    }
}
