//! The commit protocol: a stage is open until its manifest exists.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::layout::{MANIFEST, check_object_name, is_key16};
use crate::manifest::FORMAT_VERSION;
use crate::stage_key::{canonical, sha256_hex};
use crate::{
    Created, Error, Manifest, ManifestDraft, ObjectEntry, ObjectInfo, ObjectWriter, Result,
    StageId, StageKey, Store,
};

/// What [`open_stage`] found.
#[derive(Debug)]
pub enum Opened {
    /// The stage is finished; there is nothing to do.
    Finished(FinishedStage),
    /// The stage is to be made, or to be made to its end.
    Open(StageWriter),
}

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

/// The one mutable object of a stage name.
#[derive(Debug, Serialize, Deserialize)]
struct Current {
    format_version: u32,
    key: StageKey,
    manifest_sha256: String,
    counts: BTreeMap<String, u64>,
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
        && found.key == key
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

/// The newest finished stage of a name, or `None` if there is none yet. One GET.
///
/// # Errors
/// Those of [`Store::get`]; [`Error::Corrupt`] if a newer program wrote the pointer.
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

/// Every object under a stage name that no manifest lists: journals, leftovers of killed
/// tries, and all of the stages that are still open, so delete only when none is running.
///
/// # Errors
/// Those of listing and of reading manifests.
pub async fn garbage(store: &Store, id: &StageId) -> Result<Vec<ObjectInfo>> {
    let prefix = format!("{id}/");
    let mut folders: BTreeMap<String, Vec<ObjectInfo>> = BTreeMap::new();
    for object in store.list(&id.to_string()).await? {
        let Some((key16, _)) = object
            .path
            .strip_prefix(&prefix)
            .and_then(|rest| rest.split_once('/'))
        else {
            continue;
        };
        if is_key16(key16) {
            folders.entry(key16.to_owned()).or_default().push(object);
        }
    }
    let mut garbage = Vec::new();
    for (key16, objects) in folders {
        let manifest = read_manifest(store, id, &key16)
            .await?
            .map(|(_, manifest)| manifest);
        let folder = format!("{prefix}{key16}/");
        garbage.extend(objects.into_iter().filter(|object| {
            let name = object.path.strip_prefix(&folder).unwrap_or(&object.path);
            !manifest
                .as_ref()
                .is_some_and(|manifest| name == MANIFEST || manifest.object(name).is_some())
        }));
    }
    Ok(garbage)
}

async fn read_manifest(
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

impl FinishedStage {
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

    /// The bytes of one of its objects, checked against the manifest's entry.
    ///
    /// # Errors
    /// Those of [`Store::get`]; [`Error::Missing`] and [`Error::Corrupt`] if the bytes are not those.
    pub async fn read(&self, entry: &ObjectEntry) -> Result<Bytes> {
        let path = self.path(&entry.path);
        let url = self.store.url_of(&path);
        let Some(bytes) = self.store.get(&path).await? else {
            return Err(Error::Missing {
                url,
                next: "delete its folder and the current.json above it, and run again",
            });
        };
        if bytes.len() as u64 != entry.bytes || sha256_hex(&bytes) != entry.sha256 {
            return Err(Error::Corrupt {
                url,
                reason: "its bytes are not those the manifest lists".to_owned(),
            });
        }
        Ok(bytes)
    }

    /// Makes `current.json` name this stage.
    async fn point(&self) -> Result<()> {
        let current = Current {
            format_version: FORMAT_VERSION,
            key: self.key,
            manifest_sha256: self.manifest_sha256.clone(),
            counts: self.counts.clone(),
        };
        let mut json = serde_json::to_vec_pretty(&current).map_err(|source| Error::Json {
            what: "current.json",
            source,
        })?;
        json.push(b'\n');
        self.store.put(&self.id.current_path(), json.into()).await
    }
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
        check_object_name(name)?;
        let path = self.path(name);
        let entry = ObjectEntry {
            path: name.to_owned(),
            rows: None,
            bytes: bytes.len() as u64,
            sha256: sha256_hex(&bytes),
        };
        if !self.store.create_or_compare(&path, &bytes).await? && !self.committed(&entry).await? {
            self.store.put(&path, bytes).await?;
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
        self.check_objects(&draft.objects).await?;
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
        let finished = FinishedStage {
            store: self.store,
            id: self.id,
            key: self.key,
            manifest_sha256: sha256_hex(&bytes),
            counts: manifest.counts,
            reused: false,
        };
        finished.point().await?;
        Ok(finished)
    }

    async fn check_objects(&self, objects: &[ObjectEntry]) -> Result<()> {
        let listed: HashMap<String, u64> = self
            .store
            .list(&self.dir)
            .await?
            .into_iter()
            .map(|object| (object.path, object.bytes))
            .collect();
        for object in objects {
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
