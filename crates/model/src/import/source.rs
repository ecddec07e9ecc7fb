//! Where a model comes from: a folder on this machine.

use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde_json::{Value, json};
use updraft_store::{CancelToken, sha256_hex};

use crate::error::{Error, Result};
use crate::weights::map_file;

/// A place that holds a model's files.
#[derive(Debug)]
pub(super) enum Source {
    Folder { path: PathBuf, name: String },
}

/// One file of a source.
#[derive(Debug, Clone)]
pub(super) struct SourceFile {
    pub(super) name: String,
    pub(super) bytes: u64,
    /// What its content is known by.
    pub(super) id: Value,
    /// Lower-case hex, where it is known before the file is read.
    pub(super) sha256: Option<String>,
}

impl Source {
    pub(super) async fn open(spec: &str) -> Result<Self> {
        let path = Path::new(spec);
        if path.is_dir() {
            return Ok(Self::Folder {
                path: path.to_owned(),
                name: spec.to_owned(),
            });
        }
        Err(Error::NoModel {
            model: spec.to_owned(),
        })
    }

    /// How messages call it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Folder { name, .. } => name,
        }
    }

    /// What decides the content beside the files: nothing for a folder, whose path does not matter.
    pub(super) fn id(&self) -> Value {
        match self {
            Self::Folder { .. } => json!("folder"),
        }
    }

    /// Its files at the top level, unidentified.
    pub(super) async fn files(&self) -> Result<Vec<SourceFile>> {
        match self {
            Self::Folder { path, .. } => list_folder(path),
        }
    }

    /// Fills in what the content of files is known by; for a folder that means reading them.
    pub(super) async fn identify(
        &self,
        files: Vec<SourceFile>,
        cancel: &CancelToken,
    ) -> Result<Vec<SourceFile>> {
        match self {
            Self::Folder { path, .. } => {
                let (path, cancel) = (path.clone(), cancel.clone());
                let hash = move || {
                    files
                        .into_iter()
                        .map(|file| hash_file(&path, file, &cancel))
                        .collect()
                };
                tokio::task::spawn_blocking(hash)
                    .await
                    .expect("hashing does not panic")
            }
        }
    }

    /// Bytes of a file.
    pub(super) async fn read(&self, file: &SourceFile, range: Range<u64>) -> Result<Bytes> {
        match self {
            Self::Folder { path, .. } => {
                let bytes = map_file(&path.join(&file.name))?;
                let len = bytes.len() as u64;
                Ok(bytes.slice(range.start.min(len) as usize..range.end.min(len) as usize))
            }
        }
    }
}

fn list_folder(path: &Path) -> Result<Vec<SourceFile>> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let entry = entry.map_err(io)?;
        // Followed on purpose: the Hub's cache is a folder of links.
        let Ok(metadata) = std::fs::metadata(entry.path()) else {
            continue;
        };
        if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
            files.push(SourceFile {
                name,
                bytes: metadata.len(),
                id: Value::Null,
                sha256: None,
            });
        }
    }
    Ok(files)
}

fn hash_file(folder: &Path, file: SourceFile, cancel: &CancelToken) -> Result<SourceFile> {
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    let sha256 = sha256_hex(&map_file(&folder.join(&file.name))?);
    Ok(SourceFile {
        id: json!(sha256),
        sha256: Some(sha256),
        ..file
    })
}
