//! A run's checkpoints in a store: committed by manifest, newest sound one
//! found again, old ones deleted.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use updraft_model::ModelConfig;
use updraft_store::{ObjectEntry, Store, sha256_hex};

use crate::checkpoint::{Checkpoint, Parts, RunState, Snapshot};
use crate::identity::{SHAPE, shape_of};
use crate::{Error, Result};

const MANIFEST: &str = "checkpoint.json";
const FORMAT_VERSION: u32 = 2;

/// The folder of one run's checkpoints.
///
/// Each lies in a folder named by its step and counts only once its
/// `checkpoint.json`, written last, lists the others with their hashes. Being
/// killed at any call leaves the previous checkpoint as it was. Old ones are deleted when the step
/// after a newer one has shown that the run can go on from there.
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

/// What a manifest of any version says.
#[derive(Debug, Deserialize)]
struct Version {
    format_version: u32,
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

    /// Commits a checkpoint beside the earlier ones. Its files go out in bounded pieces, those
    /// beyond 16 MiB as multipart uploads.
    ///
    /// # Errors
    /// [`Error::Store`]; earlier checkpoints are then intact.
    pub(crate) async fn save(&self, checkpoint: &Snapshot<'_>) -> Result<()> {
        let step = checkpoint.state.cursor.step;
        let mut objects = Vec::new();
        for (name, pieces) in checkpoint.files()? {
            let mut writer = self.store.writer(&self.path(step, name))?;
            for piece in pieces {
                writer.write(piece?).await?;
            }
            let entry = writer.finish().await?;
            objects.push(ObjectEntry {
                path: name.to_owned(),
                ..entry
            });
        }
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            state: checkpoint.state.clone(),
            objects,
        };
        let manifest = serde_json::to_vec_pretty(&manifest).expect("plain data serializes");
        Ok(self
            .store
            .put(&self.path(step, MANIFEST), manifest.into())
            .await?)
    }

    /// The newest checkpoint whose bytes are what its manifest lists; a
    /// damaged one is passed over with a warning.
    ///
    /// # Errors
    /// [`Error::ForeignCheckpoint`] when the newest is of a base model of another shape, or of
    /// another version of this crate: nothing is passed over, overwritten or deleted then;
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
        let unreadable = |error: serde_json::Error| damaged(MANIFEST, error.to_string());
        let foreign = |what| Error::ForeignCheckpoint { step, what };
        let manifest = self.object(step, MANIFEST).await?;
        let version: Version = serde_json::from_slice(&manifest).map_err(unreadable)?;
        if version.format_version != FORMAT_VERSION {
            return Err(foreign("the format"));
        }
        let manifest: Manifest = serde_json::from_slice(&manifest).map_err(unreadable)?;
        // Told before any tensor is read: of another shape none of them could be.
        if manifest.state.run.shape != shape_of(model) {
            return Err(foreign(SHAPE));
        }
        let mut parts = Parts::default();
        for entry in manifest.objects {
            let bytes = self.object(step, &entry.path).await?;
            if bytes.len() as u64 != entry.bytes || sha256_hex(&bytes) != entry.sha256 {
                return Err(damaged(&entry.path, "its hash differs".to_owned()));
            }
            let taken = parts.take(&entry.path, bytes, model);
            taken.map_err(|what| damaged(MANIFEST, what))?;
        }
        let whole = parts.finish(manifest.state);
        whole.map_err(|what| damaged(MANIFEST, what))
    }

    async fn object(&self, step: u64, name: &str) -> Result<Bytes> {
        let path = self.path(step, name);
        let found = self.store.get(&path).await?;
        found.ok_or_else(|| Error::DamagedCheckpoint {
            path,
            what: "it is missing".to_owned(),
        })
    }

    /// Keeps the newest complete checkpoints up to `newest`, which a run has gone on from, and
    /// deletes the rest, cut-short saves included.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub(crate) async fn prune(&self, newest: u64) -> Result<()> {
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
