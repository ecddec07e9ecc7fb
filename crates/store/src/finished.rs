//! A finished stage: found by its name or key, read through its manifest.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::layout::MANIFEST;
use crate::manifest::FORMAT_VERSION;
use crate::stage_key::sha256_hex;
use crate::{Error, Manifest, ObjectEntry, Result, StageId, StageKey, Store};

/// A stage whose manifest exists.
#[derive(Clone, Debug)]
pub struct FinishedStage {
    store: Store,
    id: StageId,
    key: StageKey,
    manifest_sha256: String,
    counts: BTreeMap<String, u64>,
    reused: bool,
}

/// The one mutable object of a stage name.
#[derive(Debug, Serialize, Deserialize)]
struct Current {
    format_version: u32,
    key: StageKey,
    manifest_sha256: String,
    counts: BTreeMap<String, u64>,
    /// Which part of the folder's name is the dataset's, where it is a model's and a dataset's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dataset: Option<String>,
}

impl FinishedStage {
    /// The stage that this manifest, of these bytes, has just finished.
    pub(crate) fn committed(store: Store, id: StageId, manifest: Manifest, bytes: &[u8]) -> Self {
        let (key, counts, manifest_sha256) = (manifest.key, manifest.counts, sha256_hex(bytes));
        Self {
            store,
            id,
            key,
            manifest_sha256,
            counts,
            reused: false,
        }
    }

    /// The store it lies in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its area and name.
    pub fn id(&self) -> &StageId {
        &self.id
    }

    /// Its key, by which later stages name it among their inputs.
    pub fn key(&self) -> &StageKey {
        &self.key
    }

    /// Rows, tokens and other totals, known without reading the manifest.
    pub fn counts(&self) -> &BTreeMap<String, u64> {
        &self.counts
    }

    /// Whether it was finished before, so that nothing was made this time.
    pub fn reused(&self) -> bool {
        self.reused
    }

    /// Its folder, from the store's root.
    pub fn dir(&self) -> String {
        self.id.dir(&self.key)
    }

    /// The path of one of its objects, from the store's root.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir())
    }

    /// Its manifest, checked against the hash it was committed with.
    ///
    /// # Errors
    /// Those of [`Store::get`]; [`Error::Missing`] and [`Error::Corrupt`] if somebody removed or changed it.
    pub async fn manifest(&self) -> Result<Manifest> {
        let path = self.path(MANIFEST);
        let url = self.store.url_of(&path);
        let Some(bytes) = self.store.get(&path).await? else {
            return Err(Error::Missing {
                url,
                next: "delete the current.json above it and run again",
            });
        };
        if sha256_hex(&bytes) != self.manifest_sha256 {
            return Err(Error::Corrupt {
                url,
                reason: "it is not the one that was committed".to_owned(),
            });
        }
        Manifest::from_bytes(&bytes, &url)
    }

    /// The bytes of one of its objects, checked against the manifest's entry. A large one comes
    /// by several requests at a time, as fast as the link allows.
    ///
    /// # Errors
    /// Those of [`Store::get`]; [`Error::Missing`] and [`Error::Corrupt`] if the bytes are not those.
    pub async fn read(&self, entry: &ObjectEntry) -> Result<Bytes> {
        let path = self.path(&entry.path);
        let url = self.store.url_of(&path);
        let Some((bytes, sha256)) = self.store.get_hashed(&path, entry.bytes).await? else {
            return Err(Error::Missing {
                url,
                next: "delete its folder and the current.json above it, and run again",
            });
        };
        if bytes.len() as u64 != entry.bytes || sha256 != entry.sha256 {
            return Err(Error::Corrupt {
                url,
                reason: "its bytes are not those the manifest lists".to_owned(),
            });
        }
        Ok(bytes)
    }

    /// Makes `current.json` name this stage.
    pub(crate) async fn point(&self) -> Result<()> {
        let current = Current {
            format_version: FORMAT_VERSION,
            key: self.key,
            manifest_sha256: self.manifest_sha256.clone(),
            counts: self.counts.clone(),
            dataset: self.id.dataset().map(str::to_owned),
        };
        let mut json = serde_json::to_vec_pretty(&current).map_err(|source| Error::Json {
            what: "current.json",
            source,
        })?;
        json.push(b'\n');
        self.store.put(&self.id.current_path(), json.into()).await
    }
}

/// The newest finished stage of a name, or `None` if there is none yet. One GET.
///
/// # Errors
/// Those of [`Store::get`]; [`Error::Corrupt`] if a newer program wrote the pointer;
/// [`Error::NameTaken`] if the folder is another pair's of model and dataset.
pub async fn current(store: &Store, id: &StageId) -> Result<Option<FinishedStage>> {
    let path = id.current_path();
    let Some(bytes) = store.get(&path).await? else {
        return Ok(None);
    };
    let current: Current = match serde_json::from_slice(&bytes) {
        Ok(current) => current,
        Err(error) => {
            // Only a pointer: the manifests tell what is finished, and the next commit rewrites it.
            tracing::warn!(path, %error, "cannot be read and is ignored");
            return Ok(None);
        }
    };
    if current.format_version != FORMAT_VERSION {
        return Err(Error::Corrupt {
            url: store.url_of(&path),
            reason: format!(
                "its format is version {}, this program reads version {FORMAT_VERSION}",
                current.format_version
            ),
        });
    }
    if let (Some(wanted), Some(dataset)) = (id.dataset(), current.dataset)
        && *wanted != dataset
    {
        return Err(Error::NameTaken {
            url: store.url_of(&id.to_string()),
            dataset,
        });
    }
    Ok(Some(FinishedStage {
        store: store.clone(),
        id: id.clone(),
        key: current.key,
        manifest_sha256: current.manifest_sha256,
        counts: current.counts,
        reused: true,
    }))
}

/// The finished stage in the folder `key16`, whatever `current.json` says; `None` if it is not finished.
///
/// # Errors
/// Those of [`Store::get`], and [`Error::Corrupt`].
pub async fn finished(store: &Store, id: &StageId, key16: &str) -> Result<Option<FinishedStage>> {
    Ok(read_manifest(store, id, key16)
        .await?
        .map(|(found, _)| found))
}

pub(crate) async fn read_manifest(
    store: &Store,
    id: &StageId,
    key16: &str,
) -> Result<Option<(FinishedStage, Manifest)>> {
    let path = format!("{id}/{key16}/{MANIFEST}");
    let Some(bytes) = store.get(&path).await? else {
        return Ok(None);
    };
    let manifest = Manifest::from_bytes(&bytes, &store.url_of(&path))?;
    let found = FinishedStage {
        store: store.clone(),
        id: id.clone(),
        key: manifest.key,
        manifest_sha256: sha256_hex(&bytes),
        counts: manifest.counts.clone(),
        reused: true,
    };
    Ok(Some((found, manifest)))
}
