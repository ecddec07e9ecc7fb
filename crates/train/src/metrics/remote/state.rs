//! What a log's server has: `<log>.sent`, replaced whole after each answer.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Which run a log belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Chosen here before the server is asked, so that asking twice makes one run.
    pub(super) id: String,
    /// Server and place within it.
    pub(super) target: String,
    /// What people call the run.
    pub(super) name: String,
    /// What tells it from other runs: a hash of its settings.
    pub(super) key: String,
}

impl Identity {
    /// A new run: eight letters and digits, as Weights & Biases names runs.
    pub(super) fn new(target: String, name: String, key: String) -> Self {
        const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
        let mut random = RandomState::new().build_hasher().finish();
        let mut digit = || {
            let digit = DIGITS[(random % 36) as usize];
            random /= 36;
            char::from(digit)
        };
        Self {
            id: (0..8).map(|_| digit()).collect(),
            target,
            name,
            key,
        }
    }
}

/// The log of a run: the one given, or one beside it where that is another run's.
pub(super) fn log_of(log: &Path, identity: &Identity) -> Result<PathBuf> {
    let path = sent_path(log);
    let theirs = read(&path).map_err(|source| Error::MetricsFile { path, source })?;
    let another = theirs.is_some_and(|state| {
        state.identity.target == identity.target && state.identity.key != identity.key
    });
    if !another {
        return Ok(log.to_owned());
    }
    let stem = log.file_stem().unwrap_or_default().to_string_lossy();
    let end = log.extension().unwrap_or_default().to_string_lossy();
    let own = format!("{stem}.{}.{end}", &identity.key[..8]);
    let own = log.with_file_name(own.trim_end_matches('.'));
    tracing::info!(log = %log.display(), own = %own.display(), "the log is another run's");
    Ok(own)
}

fn sent_path(log: &Path) -> PathBuf {
    let mut path = log.as_os_str().to_owned();
    path.push(".sent");
    path.into()
}

fn read(path: &Path) -> io::Result<Option<State>> {
    match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
    }
}

/// How far a server has a log.
#[derive(Debug)]
pub(super) struct SentFile {
    path: PathBuf,
    state: State,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    #[serde(flatten)]
    identity: Identity,
    /// The server's name for the run, once it has one.
    run: Option<String>,
    /// Lines and bytes of the log that have arrived.
    lines: u64,
    bytes: u64,
}

impl SentFile {
    /// Finds how far a log of `len` bytes was sent, or begins with nothing sent.
    pub(super) fn open(log: &Path, identity: Identity, len: u64) -> Result<Self> {
        let path = sent_path(log);
        let failed = |source| Error::MetricsFile {
            path: path.clone(),
            source,
        };
        let foreign = |what| Error::ForeignMetrics {
            path: log.to_owned(),
            what,
        };
        let state = match read(&path).map_err(failed)? {
            None => State {
                identity,
                run: None,
                lines: 0,
                bytes: 0,
            },
            Some(state) if state.identity.target != identity.target => {
                return Err(foreign("server"));
            }
            Some(state) if state.identity.key != identity.key => return Err(foreign("run")),
            Some(state) if state.bytes > len => return Err(foreign("log")),
            Some(state) => state,
        };
        let file = Self { path, state };
        file.save().map_err(|source| Error::MetricsFile {
            path: file.path.clone(),
            source,
        })?;
        Ok(file)
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.state.identity
    }

    pub(super) fn run(&self) -> Option<&str> {
        self.state.run.as_deref()
    }

    pub(super) fn lines(&self) -> u64 {
        self.state.lines
    }

    pub(super) fn bytes(&self) -> u64 {
        self.state.bytes
    }

    pub(super) fn set_run(&mut self, run: String) {
        self.state.run = Some(run);
        self.keep();
    }

    pub(super) fn advance(&mut self, lines: u64, bytes: u64) {
        self.state.lines += lines;
        self.state.bytes += bytes;
        self.keep();
    }

    /// A state that cannot be written is sent again by the next process, which finds out what the
    /// server has.
    fn keep(&self) {
        if let Err(error) = self.save() {
            let file = self.path.display();
            tracing::warn!(%file, %error, "cannot write down how far metrics were sent");
        }
    }

    fn save(&self) -> io::Result<()> {
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        std::fs::write(&new, serde_json::to_vec(&self.state)?)?;
        std::fs::rename(&new, &self.path)
    }
}
