//! The commit protocol: a stage is open until its manifest exists.

use std::collections::HashMap;

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};

use crate::finished::read_manifest;
use crate::layout::{MANIFEST, check_object_name};
use crate::stage_key::canonical;
use crate::{
    Created, Error, FinishedStage, Hashed, Manifest, ManifestDraft, ObjectEntry, ObjectWriter,
    Result, StageId, StageKey, Store, current,
};

/// What [`open_stage`] found.
#[derive(Debug)]
pub enum Opened {
    /// The stage is finished; there is nothing to do.
    Finished(FinishedStage),
    /// The stage is to be made, or to be made to its end.
    Open(StageWriter),
}

/// A stage being made.
///
/// Clones write to the same stage, so shards may be made by several tasks, or processes, at once.
#[derive(Clone, Debug)]
pub struct StageWriter {
    store: Store,
    id: StageId,
    stage: String,
    key: StageKey,
    inputs: Value,
    dir: String,
}

/// Finds the stage that these inputs decide, finished or not.
///
/// The key is the hash of `stage` and `inputs`, which hold everything that decides the
/// output, the stage's own version included. With nothing to do this costs one GET and no
/// PUT: `current.json` names the key. If it names another and ours is finished all the same
/// (a run with earlier options, or a kill between manifest and pointer), the pointer is
/// moved to it.
///
/// # Errors
/// Those of [`Store::get`] and [`Store::put`], [`Error::Json`], and [`Error::Corrupt`] for a
/// manifest that cannot be read.
pub async fn open_stage(
    store: &Store,
    id: &StageId,
    stage: &str,
    inputs: &impl Serialize,
) -> Result<Opened> {
    let inputs = canonical(inputs, "a stage's inputs")?;
    let key = StageKey::of(&json!({ "inputs": inputs, "stage": stage }))?;
    if let Some(found) = current(store, id).await?
        && *found.key() == key
    {
        return Ok(Opened::Finished(found));
    }
    if let Some((found, manifest)) = read_manifest(store, id, &key.key16()).await? {
        if manifest.key != key {
            return Err(Error::Corrupt {
                url: store.url_of(&found.path(MANIFEST)),
                reason: "it is another stage's".to_owned(),
            });
        }
        found.point().await?;
        return Ok(Opened::Finished(found));
    }
    let dir = id.dir(&key);
    let stage = stage.to_owned();
    Ok(Opened::Open(StageWriter {
        store: store.clone(),
        id: id.clone(),
        stage,
        key,
        inputs,
        dir,
    }))
}

impl StageWriter {
    /// The store it writes to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The stage's area and name.
    pub fn id(&self) -> &StageId {
        &self.id
    }

    /// The stage's key.
    pub fn key(&self) -> &StageKey {
        &self.key
    }

    /// The stage's folder, from the store's root.
    pub fn dir(&self) -> &str {
        &self.dir
    }

    /// The path of one of its objects, from the store's root.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    /// Writes an object that fits in memory. One that is there already with these bytes is
    /// not written again; one with others, left by a killed try, is replaced.
    ///
    /// Give objects whose bytes the key does not decide names with their hash in: then no
    /// process can ever replace another's.
    ///
    /// # Errors
    /// Those of [`Store::create`]; [`Error::Superseded`] if another process has committed the stage
    /// with other bytes under this name.
    pub async fn put_object(&self, name: &str, bytes: Bytes) -> Result<ObjectEntry> {
        self.put_hashed(name, &Hashed::new(bytes)).await
    }

    /// [`put_object`](Self::put_object) of bytes that are hashed already, for a name perhaps.
    ///
    /// # Errors
    /// As [`put_object`](Self::put_object).
    pub async fn put_hashed(&self, name: &str, hashed: &Hashed) -> Result<ObjectEntry> {
        check_object_name(name)?;
        let path = self.path(name);
        let bytes = hashed.bytes();
        let entry = ObjectEntry {
            path: name.to_owned(),
            rows: None,
            bytes: bytes.len() as u64,
            sha256: hashed.sha256().to_owned(),
        };
        if !self.store.create_or_compare(&path, bytes).await? && !self.committed(&entry).await? {
            self.store.put(&path, bytes.clone()).await?;
        }
        Ok(entry)
    }

    /// A writer for an object of any size, with bounded memory.
    ///
    /// # Errors
    /// [`Error::InvalidName`].
    pub fn object_writer(&self, name: &str) -> Result<StageObjectWriter> {
        check_object_name(name)?;
        let inner = self.store.writer(&self.path(name))?.named(name);
        Ok(StageObjectWriter {
            stage: self.clone(),
            inner,
        })
    }

    /// Whether the stage has been committed with this very object.
    async fn committed(&self, entry: &ObjectEntry) -> Result<bool> {
        let Some((_, manifest)) = read_manifest(&self.store, &self.id, &self.key.key16()).await?
        else {
            return Ok(false);
        };
        let listed = manifest.object(&entry.path);
        if listed.is_some_and(|listed| listed.sha256 == entry.sha256) {
            return Ok(true);
        }
        Err(Error::Superseded {
            url: self.store.url_of(&self.path(&entry.path)),
        })
    }

    /// Finishes the stage: checks that every object is there with its size, creates the
    /// manifest, and then makes `current.json` name it.
    ///
    /// If another process has committed the stage meanwhile, its manifest stands and is the result.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Corrupt`] if an object is not as the draft says, and those
    /// of [`Store::create`]. The stage is then still open.
    pub async fn commit(self, draft: ManifestDraft) -> Result<FinishedStage> {
        self.check_objects(&draft).await?;
        let manifest = Manifest::from_draft(&self.stage, self.key, self.inputs.clone(), draft)?;
        let bytes = manifest.to_bytes()?;
        let path = self.path(MANIFEST);
        let (bytes, manifest) = match self.store.create(&path, bytes.clone()).await? {
            Created::New => (bytes, manifest),
            Created::Existed(theirs) => {
                let url = self.store.url_of(&path);
                let manifest = Manifest::from_bytes(&theirs, &url)?;
                if manifest.key != self.key {
                    return Err(Error::Corrupt {
                        url,
                        reason: "it is another stage's".to_owned(),
                    });
                }
                tracing::warn!(
                    path,
                    "another process committed this stage first; its result stands"
                );
                (theirs, manifest)
            }
        };
        let finished = FinishedStage::committed(self.store, self.id, manifest, &bytes);
        finished.point().await?;
        Ok(finished)
    }

    async fn check_objects(&self, draft: &ManifestDraft) -> Result<()> {
        let listed: HashMap<String, u64> = self
            .store
            .list(&self.dir)
            .await?
            .into_iter()
            .map(|object| (object.path, object.bytes))
            .collect();
        for object in draft.all_objects() {
            let path = self.path(&object.path);
            let url = || self.store.url_of(&path);
            match listed.get(&path) {
                Some(&bytes) if bytes == object.bytes => {}
                Some(&bytes) => {
                    let reason = format!("it has {bytes} bytes instead of {}", object.bytes);
                    return Err(Error::Corrupt { url: url(), reason });
                }
                None => {
                    return Err(Error::Missing {
                        url: url(),
                        next: "delete the stage's folder and run again",
                    });
                }
            }
        }
        Ok(())
    }
}

/// An [`ObjectWriter`] that will not replace what a committed stage lists.
#[derive(Debug)]
pub struct StageObjectWriter {
    stage: StageWriter,
    inner: ObjectWriter,
}

impl StageObjectWriter {
    /// Takes the next bytes; waits while too many are on their way.
    ///
    /// # Errors
    /// Those of [`ObjectWriter::write`].
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.inner.write(bytes).await
    }

    /// Bytes taken so far.
    pub fn written(&self) -> u64 {
        self.inner.written()
    }

    /// What the entry will be if nothing more is written.
    pub(crate) fn entry(&self) -> ObjectEntry {
        self.inner.entry()
    }

    /// The object's URL, for messages.
    pub(crate) fn url(&self) -> String {
        self.inner.url()
    }

    /// Makes the object visible.
    ///
    /// # Errors
    /// Those of [`ObjectWriter::finish`], and [`Error::Superseded`] if another process has committed
    /// the stage with other bytes under this name.
    pub async fn finish(self) -> Result<ObjectEntry> {
        let entry = self.inner.entry();
        match self.stage.committed(&entry).await {
            Ok(false) => self.inner.finish().await,
            Ok(true) => {
                self.inner.abort().await;
                Ok(entry)
            }
            Err(error) => {
                self.inner.abort().await;
                Err(error)
            }
        }
    }

    /// Gives up and removes what was sent. Dropping the writer does the same in the background.
    pub async fn abort(self) {
        self.inner.abort().await;
    }
}
