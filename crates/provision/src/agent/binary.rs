//! The agent's program, as a client has it and as a node gets it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
#[cfg(any(feature = "local", feature = "ssh"))]
use crate::shell::quote;

/// A program that holds the agent, built for the nodes' architecture.
#[derive(Debug, Clone)]
pub struct AgentBinary {
    path: PathBuf,
    subcommand: String,
    name: String,
}

impl AgentBinary {
    /// The program at `path`; `subcommand` is the word by which it is the agent, empty for
    /// `updraft-agent`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read.
    pub fn new(path: impl AsRef<Path>, subcommand: impl Into<String>) -> Result<Self> {
        let path = std::path::absolute(path.as_ref()).map_err(Error::io(path.as_ref()))?;
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        // Tells versions apart on a node of one's own; it guards against nobody.
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        Ok(Self {
            name: format!("agent-{:016x}", hasher.finish()),
            path,
            subcommand: subcommand.into(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How this machine calls it.
    #[cfg(any(feature = "local", feature = "ssh"))]
    pub(crate) fn here(&self) -> String {
        format!(
            "{} {}",
            quote(&self.path.to_string_lossy()),
            self.subcommand
        )
    }

    /// Its name on a node: another version has another.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn subcommand(&self) -> &str {
        &self.subcommand
    }
}
