//! Repositories and their files, by name and as resolved to a commit.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RepoKind {
    /// A model.
    Model,
    /// A dataset.
    Dataset,
}

impl RepoKind {
    /// The word in API addresses.
    pub(crate) const fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A repository and a branch, tag or commit of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RepoRef {
    kind: RepoKind,
    id: String,
    revision: String,
}

impl RepoRef {
    /// A repository's main branch; `id` is `owner/name` or, for a few old ones, `name`.
    ///
    /// # Errors
    /// [`Error::InvalidName`] if the Hub could not have such an id.
    pub fn new(kind: RepoKind, id: &str) -> Result<Self> {
        let well_formed = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if id.len() > 96 || id.split('/').count() > 2 || !id.split('/').all(well_formed) {
            return Err(Error::InvalidName {
                name: id.to_owned(),
                reason: "a Hub repository is owner/name",
            });
        }
        Ok(Self {
            kind,
            id: id.to_owned(),
            revision: "main".to_owned(),
        })
    }

    /// A model's main branch.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn model(id: &str) -> Result<Self> {
        Self::new(RepoKind::Model, id)
    }

    /// A dataset's main branch.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn dataset(id: &str) -> Result<Self> {
        Self::new(RepoKind::Dataset, id)
    }

    /// The same repository at another branch, tag or commit, such as `refs/convert/parquet`.
    #[must_use]
    pub fn at(mut self, revision: &str) -> Self {
        revision.clone_into(&mut self.revision);
        self
    }

    /// What it holds.
    pub fn kind(&self) -> RepoKind {
        self.kind
    }

    /// `owner/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

/// For messages: `dataset owner/name`.
impl fmt::Display for RepoRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            RepoKind::Model => "model",
            RepoKind::Dataset => "dataset",
        };
        write!(f, "the {kind} {}", self.id)
    }
}

/// A repository at one commit, which never changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedRepo {
    /// What was asked for.
    pub repo: RepoRef,
    /// The commit it is.
    pub sha: String,
    /// Every file of it, sorted by path.
    pub files: Vec<RepoFile>,
}

/// One file of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RepoFile {
    /// Path from the repository's root.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// Git's name for the content; changes with it.
    pub oid: String,
    /// SHA-256 of the content, which the Hub knows of large files only.
    pub lfs_sha256: Option<String>,
}

impl RepoFile {
    /// What the content is known by, wherever the file was found: the SHA-256 of large files,
    /// Git's name for others.
    pub fn content_id(&self) -> &str {
        self.lfs_sha256.as_ref().unwrap_or(&self.oid)
    }
}

/// One item of a tree listing.
#[derive(Deserialize)]
pub(crate) struct TreeItem {
    r#type: String,
    path: String,
    #[serde(default)]
    size: u64,
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: Option<u64>,
}

impl TreeItem {
    /// The file, or `None` for a folder.
    ///
    /// # Errors
    /// The path, if it leads out of the repository.
    pub(crate) fn into_file(self) -> Result<Option<RepoFile>, String> {
        if self.r#type != "file" {
            return Ok(None);
        }
        if leads_out(&self.path) {
            return Err(self.path);
        }
        let size = self
            .lfs
            .as_ref()
            .and_then(|lfs| lfs.size)
            .unwrap_or(self.size);
        let lfs_sha256 = self
            .lfs
            .map(|lfs| lfs.oid.trim_start_matches("sha256:").to_owned());
        Ok(Some(RepoFile {
            path: self.path,
            size,
            oid: self.oid,
            lfs_sha256,
        }))
    }
}

/// Whether a path in a repository would lead out of it.
pub(crate) fn leads_out(path: &str) -> bool {
    path.split('/')
        .any(|part| matches!(part, "" | "." | "..") || part.contains('\\'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_owner_and_name() {
        for id in ["gpt2", "Qwen/Qwen2.5-0.5B", "mlabonne/FineTome-100k"] {
            RepoRef::model(id).expect(id);
        }
        for id in [
            "",
            "/",
            "a/",
            "a/b/c",
            "../b",
            "a b",
            "a?b",
            "./letters.jsonl",
        ] {
            assert!(RepoRef::dataset(id).is_err(), "{id}");
        }
    }

    #[test]
    fn a_path_that_leads_out_is_refused() {
        let item = |path: &str| TreeItem {
            r#type: "file".into(),
            path: path.into(),
            size: 1,
            oid: "0".into(),
            lfs: None,
        };
        for path in ["../x", "/etc/passwd", "a/../../x", "a//b", "..\\x"] {
            assert!(item(path).into_file().is_err(), "{path}");
        }
        assert!(item("a/b.parquet").into_file().expect("inside").is_some());
    }
}
