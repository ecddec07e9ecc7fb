//! From what a person types to a [`Files`] source: paths, folders, store URLs, Hub names.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use updraft_store::{ObjectInfo, Store};

use super::files::{DataFile, Files, Kind, hex};
use super::split::files_of_split;
use crate::location::{Location, Remote};
use crate::{Error, Result};

/// Which part of a source to take.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// The split of a folder, prefix or repository: `train`, `test` or `validation`. A single
    /// file is taken whole.
    pub split: String,
    /// The branch, tag or commit of a Hub dataset; pinned to a commit when resolved.
    pub revision: String,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            split: "train".to_owned(),
            revision: "main".to_owned(),
        }
    }
}

/// Finds what `spec` names: a file, a folder, an object-store URL (`s3://bucket/prefix`), or a
/// Hub dataset (`owner/name`, with the feature `hub`). A path that exists wins over a Hub dataset of the same name.
///
/// Every file is pinned by content: local files are hashed, store objects are known by their
/// ETag, Hub files by the commit.
///
/// # Errors
/// [`Error::NotFound`] if nothing is there, [`Error::UnknownFile`] if a file's name does not
/// tell its format, [`Error::NoDataFiles`] if a folder or repository holds none of the split.
pub async fn resolve_source(spec: &str, options: &SourceOptions) -> Result<Arc<Files>> {
    let path = PathBuf::from(spec.strip_prefix("file://").unwrap_or(spec));
    match tokio::fs::metadata(&path).await {
        Ok(found) => {
            let (spec, split) = (spec.to_owned(), options.split.clone());
            let resolve = move || {
                if found.is_dir() {
                    local_folder(&spec, &path, &split)
                } else {
                    local_file(&spec, &path)
                }
            };
            tokio::task::spawn_blocking(resolve)
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
            object_url(spec, &options.split).await
        }
        #[cfg(feature = "hub")]
        Err(_) if super::hub::is_repo_name(spec) => super::hub::resolve(spec, options).await,
        Err(_) => Err(Error::NotFound {
            spec: spec.to_owned(),
        }),
    }
    .map(Arc::new)
}

fn local_file(spec: &str, path: &Path) -> Result<Files> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let (file, identity) = local(path, &name)?.ok_or_else(|| Error::UnknownFile {
        file: spec.to_owned(),
    })?;
    Ok(Files {
        label: spec.to_owned(),
        identity: json!({ "files": [identity] }),
        files: [file].into(),
    })
}

fn local_folder(spec: &str, folder: &Path, split: &str) -> Result<Files> {
    let mut names = Vec::new();
    walk(folder, "", &mut names).map_err(|err| Error::read(spec, err))?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let chosen = choose(spec, &names, split)?;
    let mut files = Vec::new();
    let mut identities = Vec::new();
    for name in chosen {
        if let Some((file, identity)) = local(&folder.join(name), name)? {
            files.push(file);
            identities.push(identity);
        }
    }
    Ok(Files {
        label: spec.to_owned(),
        identity: json!({ "files": identities, "split": split }),
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

/// The data files of the split, or an error that says what was expected.
pub(super) fn choose<'a>(spec: &str, names: &[&'a str], split: &str) -> Result<Vec<&'a str>> {
    let data: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| Kind::of(name).is_some())
        .collect();
    let expected = if data.is_empty() {
        ".jsonl .ndjson .json .parquet .csv .tsv .txt, each also as .gz or .zst".to_owned()
    } else {
        format!("names with '{split}'; choose another split")
    };
    let chosen = files_of_split(&data, split);
    if chosen.is_empty() {
        Err(Error::NoDataFiles {
            spec: spec.to_owned(),
            expected,
        })
    } else {
        Ok(chosen)
    }
}

/// A local file and what pins its content; `None` if its name tells no format.
fn local(path: &Path, name: &str) -> Result<Option<(DataFile, Value)>> {
    let Some((kind, compression)) = Kind::of(name) else {
        return Ok(None);
    };
    let (size, sha256) = hash(path).map_err(|err| Error::read(name, err))?;
    let file = DataFile {
        name: name.into(),
        location: Location::Local(path.to_owned()),
        size,
        kind,
        compression,
    };
    Ok(Some((
        file,
        json!({ "name": name, "bytes": size, "sha256": sha256 }),
    )))
}

fn hash(path: &Path) -> io::Result<(u64, String)> {
    let mut file = fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        match file.read(&mut block)? {
            0 => return Ok((size, hex(&hash.finalize()))),
            read => {
                hash.update(&block[..read]);
                size += read as u64;
            }
        }
    }
}

/// A URL of an object with a data file's name, or of a prefix.
async fn object_url(url: &str, split: &str) -> Result<Files> {
    let Some((base, name)) = url
        .rsplit_once('/')
        .filter(|(_, name)| Kind::of(name).is_some())
    else {
        return Files::in_store(&Store::open(url)?, "", split).await;
    };
    let store = Store::open(base)?;
    let found = store.head(name).await?;
    let found = found.ok_or_else(|| Error::NotFound {
        spec: url.to_owned(),
    })?;
    Ok(objects(&store, url, split, [&found]))
}

impl Files {
    /// The data files of a split below a prefix of a store, known by their ETags.
    ///
    /// # Errors
    /// [`Error::NoDataFiles`] if there are none, and the store's errors.
    pub async fn in_store(store: &Store, prefix: &str, split: &str) -> Result<Self> {
        let url = store.url_of(prefix);
        let found = store.list(prefix).await?;
        let names: Vec<&str> = found.iter().map(|object| object.path.as_str()).collect();
        let chosen = choose(&url, &names, split)?;
        let files = found
            .iter()
            .filter(|object| chosen.contains(&object.path.as_str()));
        Ok(objects(store, &url, split, files))
    }
}

fn objects<'a>(
    store: &Store,
    label: &str,
    split: &str,
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
        identity: json!({ "files": identities, "split": split }),
        files: files.into(),
    }
}
