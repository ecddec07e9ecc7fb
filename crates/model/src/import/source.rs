//! Where a model comes from: a folder on this machine, or a repository on the Hub.

use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::StreamExt;
#[cfg(feature = "hub")]
use futures::TryStreamExt;
use futures::stream::{self, BoxStream};
use serde_json::{Value, json};
#[cfg(feature = "hub")]
use updraft_store::hub::{HubClient, RepoFile, RepoRef, ResolvedRepo};
use updraft_store::{CancelToken, FileHashes};

use crate::error::{Error, Result};
use crate::weights::map_file;

/// A place that holds a model's files.
pub(super) enum Source {
    Folder(PathBuf),
    #[cfg(feature = "hub")]
    Hub(HubClient, ResolvedRepo),
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
    /// A folder if there is one of that name, else a Hub id.
    pub(super) async fn open(spec: &str) -> Result<Self> {
        let path = Path::new(spec);
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.exists() || path.is_absolute() || spec.starts_with('.') {
            return Err(Error::NoModel {
                model: spec.to_owned(),
            });
        }
        Self::on_the_hub(spec).await
    }

    #[cfg(feature = "hub")]
    async fn on_the_hub(spec: &str) -> Result<Self> {
        let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
        let repo = RepoRef::model(id).map_err(|_| Error::NoModel {
            model: spec.to_owned(),
        })?;
        Self::hub(HubClient::from_env()?, &repo.at(revision)).await
    }

    #[cfg(not(feature = "hub"))]
    async fn on_the_hub(spec: &str) -> Result<Self> {
        let what = format!("fetching {spec} from the Hub without the feature `hub`");
        Err(Error::Unsupported {
            what,
            instead: "build with it, or give a folder that exists",
        })
    }

    /// A repository, pinned to the commit it is now.
    #[cfg(feature = "hub")]
    pub(super) async fn hub(client: HubClient, repo: &RepoRef) -> Result<Self> {
        let resolved = client.resolve(repo).await?;
        Ok(Self::Hub(client, resolved))
    }

    /// How messages call it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Folder(path) => path.display().to_string(),
            #[cfg(feature = "hub")]
            Self::Hub(_, repo) => repo.repo.to_string(),
        }
    }

    /// Its files at the top level.
    pub(super) fn files(&self) -> Result<Vec<SourceFile>> {
        match self {
            Self::Folder(path) => list_folder(path),
            #[cfg(feature = "hub")]
            Self::Hub(_, repo) => Ok(repo
                .files
                .iter()
                .filter(|file| !file.path.contains('/'))
                .map(hub_file)
                .collect()),
        }
    }

    /// Fills in what the content of files is known by, which for a folder means reading them.
    pub(super) async fn identify(
        &self,
        files: Vec<SourceFile>,
        cancel: &CancelToken,
    ) -> Result<Vec<SourceFile>> {
        match self {
            Self::Folder(path) => {
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
            #[cfg(feature = "hub")]
            Self::Hub(..) => Ok(files),
        }
    }

    /// Some bytes of a file.
    pub(super) async fn read(&self, file: &SourceFile, range: Range<u64>) -> Result<Bytes> {
        match self {
            Self::Folder(path) => {
                let bytes = map_file(&path.join(&file.name))?;
                let len = bytes.len() as u64;
                Ok(bytes.slice(range.start.min(len) as usize..range.end.min(len) as usize))
            }
            #[cfg(feature = "hub")]
            Self::Hub(client, repo) => {
                let pieces: Vec<Bytes> = client
                    .read(repo, find(repo, file)?, range)
                    .try_collect()
                    .await?;
                Ok(pieces.concat().into())
            }
        }
    }

    /// Whether bytes come over a network, and are missed when they have to come twice.
    pub(super) fn is_far(&self) -> bool {
        match self {
            Self::Folder(_) => false,
            #[cfg(feature = "hub")]
            Self::Hub(..) => true,
        }
    }

    /// A large range of a file, in order.
    pub(super) fn range(&self, file: &SourceFile, range: Range<u64>) -> Result<Body> {
        match self {
            Self::Folder(path) => Ok(pieces(map_file(&path.join(&file.name))?, range)),
            #[cfg(feature = "hub")]
            Self::Hub(client, repo) => Ok(client.read_in_pieces(repo, find(repo, file)?, range)),
        }
    }

    /// All bytes of a file, wherever they come from now, held to what the source says of them.
    #[cfg_attr(
        not(feature = "hub"),
        expect(unused_variables, reason = "only the Hub says what a file must be")
    )]
    pub(super) fn checked(&self, file: &SourceFile, body: Body) -> Result<Body> {
        match self {
            Self::Folder(_) => Ok(body),
            #[cfg(feature = "hub")]
            Self::Hub(client, repo) => Ok(client.checked(repo, find(repo, file)?, body)),
        }
    }

    /// All bytes of a file, in order.
    pub(super) fn stream(&self, file: &SourceFile) -> Result<Body> {
        self.checked(file, self.range(file, 0..file.bytes)?)
    }
}

/// A file's bytes as they come.
pub(super) type Body = BoxStream<'static, updraft_store::Result<Bytes>>;

/// Bytes at hand, in pieces.
fn pieces(bytes: Bytes, range: Range<u64>) -> Body {
    const PIECE: usize = 8 << 20;
    let end = bytes.len().min(range.end as usize);
    let starts = (range.start as usize..end).step_by(PIECE);
    stream::iter(starts.map(move |start| Ok(bytes.slice(start..end.min(start + PIECE))))).boxed()
}

fn list_folder(path: &Path) -> Result<Vec<SourceFile>> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let entry = entry.map_err(io)?;
        // Followed on purpose: the Hub's own cache is a folder of links.
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
    let path = folder.join(&file.name);
    let hash = FileHashes::from_env().hash(&path);
    let sha256 = hash.map_err(|source| Error::Io { path, source })?.sha256;
    Ok(SourceFile {
        id: json!(sha256),
        sha256: Some(sha256),
        ..file
    })
}

#[cfg(feature = "hub")]
fn hub_file(file: &RepoFile) -> SourceFile {
    SourceFile {
        name: file.path.clone(),
        bytes: file.size,
        id: json!(file.lfs_sha256.as_ref().unwrap_or(&file.oid)),
        sha256: file.lfs_sha256.clone(),
    }
}

#[cfg(feature = "hub")]
fn find<'a>(repo: &'a ResolvedRepo, file: &SourceFile) -> Result<&'a RepoFile> {
    let unknown = || Error::Corrupt {
        file: file.name.clone(),
        reason: "not in the repository's listing".to_owned(),
    };
    repo.files
        .iter()
        .find(|own| own.path == file.name)
        .ok_or_else(unknown)
}
