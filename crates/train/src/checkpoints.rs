//! A run's checkpoints in a store: committed by manifest, newest sound one
//! found again, old ones deleted.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use updraft_model::ModelConfig;
use updraft_store::{ObjectEntry, Store, sha256_hex};

use crate::checkpoint::{Checkpoint, RunState};
use crate::{Error, Result};

const MANIFEST: &str = "checkpoint.json";
const FORMAT_VERSION: u32 = 1;

/// The folder of one run's checkpoints.
///
/// Each lies in a folder named by its step and counts only once its
/// `checkpoint.json`, written last, lists the others with their hashes. Being
/// killed at any call leaves the previous checkpoint as it was.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    store: Store,
    dir: String,
    keep: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format_version: u32,
    state: RunState,
    objects: Vec<ObjectEntry>,
}

impl Checkpoints {
    /// Checkpoints under `dir`, of which the newest `keep` are kept.
    pub fn new(store: &Store, dir: impl Into<String>, keep: usize) -> Self {
        Self {
            store: store.clone(),
            dir: dir.into(),
            keep: keep.max(1),
        }
    }

    /// Commits a checkpoint, then deletes what is no longer needed.
    ///
    /// # Errors
    /// [`Error::Store`]; earlier checkpoints are then intact.
    pub async fn save(&self, checkpoint: &Checkpoint) -> Result<()> {
        let step = checkpoint.state.cursor.step;
        let mut objects = Vec::new();
        for (name, bytes) in checkpoint.files()? {
            objects.push(ObjectEntry {
                path: name.to_owned(),
                rows: None,
                bytes: bytes.len() as u64,
                sha256: sha256_hex(&bytes),
            });
            self.store.put(&self.path(step, name), bytes).await?;
        }
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            state: checkpoint.state.clone(),
            objects,
        };
        let manifest = serde_json::to_vec_pretty(&manifest).expect("plain data serializes");
        self.store
            .put(&self.path(step, MANIFEST), manifest.into())
            .await?;
        self.prune(step).await
    }

    /// The newest checkpoint whose bytes are what its manifest lists; a
    /// damaged one is passed over with a warning.
    ///
    /// # Errors
    /// [`Error::Store`] when the store does not answer.
    pub async fn latest(&self, model: &ModelConfig) -> Result<Option<Checkpoint>> {
        for (step, names) in self.folders().await?.into_iter().rev() {
            if !names.contains(MANIFEST) {
                continue; // A save that was cut short.
            }
            match self.read(step, model).await {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error @ Error::DamagedCheckpoint { .. }) => {
                    tracing::warn!(%error, "passing over a checkpoint");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Deletes all of them.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn delete_all(&self) -> Result<()> {
        for (step, names) in self.folders().await? {
            self.delete(step, &names).await?;
        }
        Ok(())
    }

    async fn read(&self, step: u64, model: &ModelConfig) -> Result<Checkpoint> {
        let damaged = |name: &str, what: String| Error::DamagedCheckpoint {
            path: self.path(step, name),
            what,
        };
        let manifest = self.object(step, MANIFEST).await?;
        let manifest: Manifest = serde_json::from_slice(&manifest)
            .map_err(|error| damaged(MANIFEST, error.to_string()))?;
        if manifest.format_version != FORMAT_VERSION {
            return Err(damaged(
                MANIFEST,
                format!("format {}", manifest.format_version),
            ));
        }
        let mut files = BTreeMap::new();
        for entry in manifest.objects {
            let bytes = self.object(step, &entry.path).await?;
            if bytes.len() as u64 != entry.bytes || sha256_hex(&bytes) != entry.sha256 {
                return Err(damaged(&entry.path, "its hash differs".to_owned()));
            }
            files.insert(entry.path, bytes);
        }
        Checkpoint::from_files(manifest.state, &files, model)
            .map_err(|what| damaged(MANIFEST, what))
    }

    async fn object(&self, step: u64, name: &str) -> Result<Bytes> {
        let path = self.path(step, name);
        let found = self.store.get(&path).await?;
        found.ok_or_else(|| Error::DamagedCheckpoint {
            path,
            what: "it is missing".to_owned(),
        })
    }

    /// Keeps the newest complete checkpoints up to `newest` and deletes the
    /// rest, cut-short saves included.
    async fn prune(&self, newest: u64) -> Result<()> {
        let folders = self.folders().await?;
        let complete = folders
            .range(..=newest)
            .rev()
            .filter(|(_, names)| names.contains(MANIFEST));
        let kept: BTreeSet<u64> = complete.map(|(&step, _)| step).take(self.keep).collect();
        for (step, names) in folders
            .range(..newest)
            .filter(|(step, _)| !kept.contains(step))
        {
            self.delete(*step, names).await?;
        }
        Ok(())
    }

    /// The manifest goes first, so that what is half deleted is not taken for
    /// a checkpoint.
    async fn delete(&self, step: u64, names: &BTreeSet<String>) -> Result<()> {
        if names.contains(MANIFEST) {
            self.store.delete(&self.path(step, MANIFEST)).await?;
        }
        for name in names.iter().filter(|name| *name != MANIFEST) {
            self.store.delete(&self.path(step, name)).await?;
        }
        Ok(())
    }

    /// The objects under each step's folder.
    async fn folders(&self) -> Result<BTreeMap<u64, BTreeSet<String>>> {
        let mut folders: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
        for object in self.store.list(&self.dir).await? {
            let relative = object
                .path
                .strip_prefix(&self.dir)
                .map(|path| path.trim_start_matches('/'));
            if let Some((step, name)) = relative.and_then(|path| path.split_once('/'))
                && let Ok(step) = step.parse()
            {
                folders.entry(step).or_default().insert(name.to_owned());
            }
        }
        Ok(folders)
    }

    fn path(&self, step: u64, name: &str) -> String {
        format!("{}/{step:08}/{name}", self.dir)
    }
}
