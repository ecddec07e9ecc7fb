//! The cache that `huggingface_hub` keeps of the Hub, read and never written.
//!
//! ```text
//! models--owner--name/refs/main                    the commit of a revision
//! models--owner--name/snapshots/<commit>/<path>    links to blobs/<content id>
//! models--owner--name/trees/<commit>.json          the commit's whole listing, in newer versions
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::Stream;
use futures::stream;
use serde::Deserialize;

use super::repo::{RepoFile, RepoRef, ResolvedRepo, leads_out};
use crate::{Error, FileHashes, Result};

/// Bytes read from a file at a time.
const BLOCK_BYTES: u64 = 1 << 20;
/// The listings' form that is read; another is as good as none.
const TREE_VERSION: u32 = 1;

#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
}

#[derive(Deserialize)]
struct Tree {
    format_version: u32,
    files: BTreeMap<String, TreeFile>,
}

#[derive(Deserialize)]
struct TreeFile {
    size: u64,
    blob_id: String,
    lfs_sha256: Option<String>,
    lfs_size: Option<u64>,
}

impl Cache {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// A repository by the listing of its commit; with `partial`, where there is no listing, the
    /// files that somebody has fetched. `None` if nothing of it is here.
    ///
    /// # Errors
    /// [`Error::PartlyCached`] without listing and without `partial`.
    pub(crate) fn resolve(&self, repo: &RepoRef, partial: bool) -> Result<Option<ResolvedRepo>> {
        let folder = self.folder_of(repo);
        let Some(sha) = commit(&folder, repo.revision()) else {
            return Ok(None);
        };
        let files = match tree(&folder, &sha) {
            Some(files) => Some(files),
            None if partial => {
                tracing::warn!(%repo, sha, "the cache has no listing of this commit; taking the files that are there");
                snapshot(&folder.join("snapshots").join(&sha))
            }
            None if folder.join("snapshots").join(&sha).is_dir() => {
                return Err(Error::PartlyCached {
                    repo: repo.to_string(),
                    commit: sha,
                });
            }
            None => None,
        };
        let repo = repo.clone();
        Ok(files.map(|files| ResolvedRepo { repo, sha, files }))
    }

    /// Where a file of a commit lies, if it is here whole.
    pub(crate) fn file(&self, repo: &RepoRef, sha: &str, file: &RepoFile) -> Option<PathBuf> {
        if leads_out(&file.path) || leads_out(sha) {
            return None;
        }
        let path = self
            .folder_of(repo)
            .join("snapshots")
            .join(sha)
            .join(&file.path);
        let is_whole = fs::metadata(&path).is_ok_and(|found| found.len() == file.size);
        // A link's target is named by its content; a copy, as on systems without links, is not.
        let is_that = blob(&path).is_none_or(|id| id == file.content_id());
        (is_whole && is_that).then_some(path)
    }

    fn folder_of(&self, repo: &RepoRef) -> PathBuf {
        let id = repo.id().replace('/', "--");
        self.folder.join(format!("{}--{id}", repo.kind().plural()))
    }
}

/// The commit that a revision was when it was last fetched.
fn commit(folder: &Path, revision: &str) -> Option<String> {
    if leads_out(revision) {
        return None;
    }
    if folder.join("snapshots").join(revision).is_dir() {
        return Some(revision.to_owned());
    }
    let sha = fs::read_to_string(folder.join("refs").join(revision)).ok()?;
    let sha = sha.trim();
    (!sha.is_empty() && sha.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| sha.to_owned())
}

fn tree(folder: &Path, sha: &str) -> Option<Vec<RepoFile>> {
    let bytes = fs::read(folder.join("trees").join(format!("{sha}.json"))).ok()?;
    let tree: Tree = serde_json::from_slice(&bytes).ok()?;
    if tree.format_version != TREE_VERSION || tree.files.keys().any(|path| leads_out(path)) {
        return None;
    }
    let file = |(path, file): (String, TreeFile)| RepoFile {
        path,
        size: file.lfs_size.unwrap_or(file.size),
        oid: file.blob_id,
        lfs_sha256: file.lfs_sha256,
    };
    Some(tree.files.into_iter().map(file).collect())
}

/// The files of a snapshot's folder, sorted; `None` if there is no such folder.
fn snapshot(folder: &Path) -> Option<Vec<RepoFile>> {
    let mut files = Vec::new();
    walk(folder, "", &mut files).ok()?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Some(files)
}

fn walk(folder: &Path, prefix: &str, files: &mut Vec<RepoFile>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let (path, place) = (format!("{prefix}{name}"), entry.path());
        // Followed: the entries are links. One whose blob is gone is not here.
        let Ok(found) = fs::metadata(&place) else {
            continue;
        };
        if found.is_dir() {
            walk(&place, &format!("{path}/"), files)?;
            continue;
        }
        let (oid, lfs_sha256) = match blob(&place) {
            Some(sha256) if sha256.len() == 64 => (String::new(), Some(sha256)),
            Some(oid) => (oid, None),
            None => (
                String::new(),
                Some(FileHashes::from_env().hash(&place)?.sha256),
            ),
        };
        files.push(RepoFile {
            path,
            size: found.len(),
            oid,
            lfs_sha256,
        });
    }
    Ok(())
}

/// The name of the blob that a snapshot's link points to.
fn blob(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// A file's bytes, read a block at a time.
pub(crate) fn read(
    path: PathBuf,
    range: Range<u64>,
) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
    stream::try_unfold((path, range.start), move |(path, at)| async move {
        let end = range.end.min(at + BLOCK_BYTES);
        if at >= end {
            return Ok(None);
        }
        let name = path.display().to_string();
        let block = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || block(&path, at..end)).await
        };
        let failed = |source: crate::BoxError| Error::Store { url: name, source };
        match block {
            Ok(Ok(bytes)) => Ok(Some((bytes, (path, end)))),
            Ok(Err(error)) => Err(failed(error.into())),
            Err(error) => Err(failed(error.into())),
        }
    })
}

fn block(path: &Path, range: Range<u64>) -> std::io::Result<Bytes> {
    let mut file = fs::File::open(path)?;
    file.seek(SeekFrom::Start(range.start))?;
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
    file.read_exact(&mut bytes)?;
    Ok(bytes.into())
}
