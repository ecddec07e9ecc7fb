//! From what a person types to a [`Files`] source: paths, folders, store URLs, Hub names.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use updraft_store::{
    CancelToken, FileHash, FileHashes, FinishedStage, NoProgress, ObjectEntry, ObjectInfo,
    Progress, ProgressSink, Store,
};

use super::card::CARD;
use super::choose::choose;
use super::files::{DataFile, Files, Kind};
use crate::location::{Location, Remote};
use crate::{Error, Result};

/// Which part of a source to take.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// The split of a folder, prefix or repository: `train`, `test` or `validation`, or a name
    /// that its dataset card gives. A single file is taken whole.
    pub split: String,
    /// The configuration (subset), where the dataset card has several and none is the default.
    pub config: Option<String>,
    /// The branch, tag or commit of a Hub dataset; pinned to a commit when resolved.
    pub revision: String,
    /// Take the Hub's own Parquet export of a dataset even if it holds a part of it only.
    pub partial_export: bool,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            split: "train".to_owned(),
            config: None,
            partial_export: false,
            revision: "main".to_owned(),
        }
    }
}

/// Finds what `spec` names: a file, a folder, an object-store URL (`s3://bucket/prefix`), or a
/// Hub dataset (`owner/name`, with the feature `hub`). A path that exists wins over a Hub dataset of the same name.
///
/// Every file is pinned by content: local files are hashed (large ones once, as long as they stay
/// untouched: [`FileHashes`]), store objects are known by their ETag, Hub files by the commit. A
/// file that changes before it is read is an error.
///
/// # Errors
/// [`Error::NotFound`] if nothing is there, [`Error::UnknownFile`] if a file's name does not
/// tell its format, [`Error::NoDataFiles`] if a folder or repository holds none of the split.
pub async fn resolve_source(spec: &str, options: &SourceOptions) -> Result<Arc<Files>> {
    resolve_source_with(spec, options, &NoProgress, &CancelToken::new()).await
}

/// [`resolve_source`] with progress, in bytes hashed, and a way to stop it.
///
/// # Errors
/// As [`resolve_source`], and [`updraft_store::Error::Cancelled`].
pub async fn resolve_source_with(
    spec: &str,
    options: &SourceOptions,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<Arc<Files>> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(updraft_store::Error::Cancelled.into()),
        found = find(spec, options, progress, cancel) => found.map(Arc::new),
    }
}

async fn find(
    spec: &str,
    options: &SourceOptions,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<Files> {
    let path = PathBuf::from(spec.strip_prefix("file://").unwrap_or(spec));
    match tokio::fs::metadata(&path).await {
        Ok(found) => {
            let (spec, options) = (spec.to_owned(), options.clone());
            let (hashed, mut events) = mpsc::unbounded_channel();
            let mut hashing = Hashing {
                cancel: cancel.clone(),
                hashed,
                done: 0,
                total: 0,
            };
            let resolving = tokio::task::spawn_blocking(move || {
                if found.is_dir() {
                    local_folder(&spec, &path, &options, &mut hashing)
                } else {
                    local_file(&spec, &path, &mut hashing)
                }
            });
            while let Some((done, total)) = events.recv().await {
                progress.report(&Progress::new("hash", done, Some(total), "bytes"));
            }
            resolving
                .await
                .map_err(|err| Error::read("the source", err))?
        }
        Err(err)
            if err.kind() != io::ErrorKind::NotFound
                && err.kind() != io::ErrorKind::NotADirectory =>
        {
            Err(Error::read(spec, err))
        }
        Err(_) if spec.contains("://") && !spec.starts_with("file://") => {
            object_url(spec, options).await
        }
        #[cfg(feature = "hub")]
        Err(_) if super::hub::is_repo_name(spec) => super::hub::resolve(spec, options).await,
        Err(_) => Err(Error::NotFound {
            spec: spec.to_owned(),
        }),
    }
}

/// The hashing of local files, on a thread of its own.
struct Hashing {
    cancel: CancelToken,
    /// Told of the bytes done and of all.
    hashed: mpsc::UnboundedSender<(u64, u64)>,
    done: u64,
    total: u64,
}

/// Bytes between two events.
const EVENT_BYTES: u64 = 64 << 20;

impl Hashing {
    /// Counts files that are to be hashed.
    fn plan<'p>(&mut self, paths: impl IntoIterator<Item = &'p Path>) {
        let sizes = paths.into_iter().filter_map(|path| fs::metadata(path).ok());
        self.total = sizes.map(|metadata| metadata.len()).sum();
    }

    fn hash(&mut self, path: &Path) -> io::Result<FileHash> {
        FileHashes::from_env().hash_with(path, |bytes| {
            self.cancel.check().map_err(io::Error::other)?;
            let before = self.done;
            self.done += bytes;
            if before / EVENT_BYTES < self.done / EVENT_BYTES {
                // Nobody listens any more: the next look at `cancel` tells.
                self.hashed.send((self.done, self.total)).ok();
            }
            Ok(())
        })
    }
}

fn local_file(spec: &str, path: &Path, hashing: &mut Hashing) -> Result<Files> {
    hashing.plan([path]);
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let (file, identity) = local(path, &name, hashing)?.ok_or_else(|| Error::UnknownFile {
        file: spec.to_owned(),
    })?;
    Ok(Files {
        label: spec.to_owned(),
        identity: json!({ "files": [identity] }),
        files: [file].into(),
    })
}

fn local_folder(
    spec: &str,
    folder: &Path,
    options: &SourceOptions,
    hashing: &mut Hashing,
) -> Result<Files> {
    let mut names = Vec::new();
    walk(folder, "", &mut names).map_err(|err| Error::read(spec, err))?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let card = names
        .contains(&CARD)
        .then(|| fs::read_to_string(folder.join(CARD)));
    let card = card.transpose().map_err(|err| Error::read(CARD, err))?;
    let chosen = choose(spec, &names, card.as_deref(), options)?;
    let mut files = Vec::new();
    let mut identities = Vec::new();
    let paths: Vec<PathBuf> = chosen.iter().map(|name| folder.join(name)).collect();
    hashing.plan(paths.iter().map(PathBuf::as_path));
    for (name, path) in chosen.into_iter().zip(&paths) {
        if let Some((file, identity)) = local(path, name, hashing)? {
            files.push(file);
            identities.push(identity);
        }
    }
    Ok(Files {
        label: spec.to_owned(),
        identity: json!({ "files": identities }),
        files: files.into(),
    })
}

/// Collects the paths of all files below `folder`, sorted, with `/` between parts.
fn walk(folder: &Path, prefix: &str, names: &mut Vec<String>) -> io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let name = if prefix.is_empty() {
            name
        } else {
            format!("{prefix}/{name}")
        };
        if entry.path().is_dir() {
            walk(&entry.path(), &name, names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

/// A local file and what pins its content; `None` if its name tells no format.
fn local(path: &Path, name: &str, hashing: &mut Hashing) -> Result<Option<(DataFile, Value)>> {
    let Some((kind, compression)) = Kind::of(name) else {
        return Ok(None);
    };
    let hash = hashing.hash(path).map_err(|err| Error::read(name, err))?;
    let identity = json!({ "name": name, "bytes": hash.bytes, "sha256": hash.sha256 });
    let file = DataFile {
        name: name.into(),
        size: hash.bytes,
        location: Location::Local(path.to_owned(), Arc::new(hash)),
        kind,
        compression,
    };
    Ok(Some((file, identity)))
}

/// A URL of an object with a data file's name, or of a prefix.
async fn object_url(url: &str, options: &SourceOptions) -> Result<Files> {
    let Some((base, name)) = url
        .rsplit_once('/')
        .filter(|(_, name)| Kind::of(name).is_some())
    else {
        return Files::in_store(&Store::open(url)?, "", options).await;
    };
    let store = Store::open(base)?;
    let found = store.head(name).await?;
    let found = found.ok_or_else(|| Error::NotFound {
        spec: url.to_owned(),
    })?;
    Ok(objects(&store, url, [&found]))
}

impl Files {
    /// The data files of a split below a prefix of a store, known by their ETags.
    ///
    /// # Errors
    /// [`Error::NoDataFiles`] if there are none, and the store's errors.
    pub async fn in_store(store: &Store, prefix: &str, options: &SourceOptions) -> Result<Self> {
        let (url, prefix) = (store.url_of(prefix), prefix.trim_matches('/'));
        let found = store.list(prefix).await?;
        let below = |path: &'_ str| -> usize {
            if prefix.is_empty() || !path.starts_with(prefix) {
                0
            } else {
                prefix.len() + 1
            }
        };
        let names: Vec<&str> = found
            .iter()
            .map(|object| &object.path[below(&object.path)..])
            .collect();
        let card = match names.iter().position(|name| *name == CARD) {
            Some(at) => store.get(&found[at].path).await?,
            None => None,
        };
        let card = card.map(|card| String::from_utf8_lossy(&card).into_owned());
        let chosen = choose(&url, &names, card.as_deref(), options)?;
        let by_name: HashMap<&str, &ObjectInfo> = names.iter().copied().zip(&found).collect();
        let object = |name: &&str| by_name.get(name).copied();
        Ok(objects(store, &url, chosen.iter().filter_map(object)))
    }
}

impl Files {
    /// The data files that a finished stage lists, such as a raw copy's; others beside them are
    /// nobody's.
    ///
    /// # Errors
    /// [`Error::NoDataFiles`] if it lists none, and the store's errors.
    pub async fn in_stage(stage: &FinishedStage) -> Result<Self> {
        let manifest = stage.manifest().await?;
        let object = |object: &ObjectEntry| ObjectInfo {
            path: stage.path(&object.path),
            bytes: object.bytes,
            etag: None,
        };
        let listed: Vec<ObjectInfo> = manifest.objects.iter().map(object).collect();
        let url = stage.store().url_of(&stage.dir());
        let mut files = objects(stage.store(), &url, &listed);
        if files.files.is_empty() {
            return Err(Error::NoDataFiles {
                spec: url,
                expected: "a raw copy".to_owned(),
            });
        }
        files.identity = json!({ "stage": stage.key() });
        Ok(files)
    }
}

fn objects<'a>(
    store: &Store,
    label: &str,
    found: impl IntoIterator<Item = &'a ObjectInfo>,
) -> Files {
    let (mut files, mut identities) = (Vec::new(), Vec::new());
    for object in found {
        let Some((kind, compression)) = Kind::of(&object.path) else {
            continue;
        };
        let path = object.path.clone();
        let remote = Remote::Object {
            store: store.clone(),
            path,
            etag: object.etag.clone(),
        };
        files.push(DataFile {
            name: object.path.as_str().into(),
            location: Location::Remote(remote),
            size: object.bytes,
            kind,
            compression,
        });
        identities.push(json!({ "name": object.path, "bytes": object.bytes, "etag": object.etag }));
    }
    Files {
        label: label.to_owned(),
        identity: json!({ "files": identities }),
        files: files.into(),
    }
}
