//! Writing an object of any size with bounded memory.

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::stage_key::hex;
use crate::{ObjectEntry, Result, Store};

/// Bytes per part. S3 takes 10,000 parts, so this allows objects of 160 GB.
const PART_BYTES: usize = 16 << 20;
/// Parts on their way at a time; memory is bounded by this plus one, times the part.
const PARTS_IN_FLIGHT: usize = 3;

/// Writes one object piece by piece, hashing as it goes.
///
/// Nothing is visible at the path before [`finish`](Self::finish) returns. Objects up to 16 MiB
/// are one PUT, larger ones a multipart upload, aborted when the writer is dropped or fails. (A killed
/// process cannot abort: give S3 buckets a lifecycle rule for incomplete uploads.)
#[derive(Debug)]
pub struct ObjectWriter {
    store: Store,
    path: String,
    location: Path,
    name: String,
    hasher: Sha256,
    written: u64,
    buffer: BytesMut,
    sent: Sent,
}

/// Where the bytes before the buffer are.
#[derive(Debug)]
enum Sent {
    /// There are none yet.
    Nothing,
    /// In the parts of an upload.
    Parts(Upload),
    /// In the finished object, or nowhere any more.
    Over,
}

#[derive(Debug)]
struct Upload {
    parts: JoinSet<object_store::Result<()>>,
    inner: Box<dyn MultipartUpload>,
}

impl Store {
    /// A writer for a large object at `path`, replacing what is there when it finishes.
    ///
    /// # Errors
    /// [`Error::InvalidName`](crate::Error::InvalidName) if `path` is no path.
    pub fn writer(&self, path: &str) -> Result<ObjectWriter> {
        let location = self.path(path)?;
        Ok(ObjectWriter {
            store: self.clone(),
            path: path.to_owned(),
            location,
            name: path.to_owned(),
            hasher: Sha256::new(),
            written: 0,
            buffer: BytesMut::new(),
            sent: Sent::Nothing,
        })
    }
}

impl ObjectWriter {
    /// Makes the entry call the object by its name within a stage.
    pub(crate) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Bytes taken so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Takes the next bytes; waits while too many are on their way.
    ///
    /// # Errors
    /// Those of [`Store::put`]. What was sent is removed then and the writer takes no more.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.hasher.update(&bytes);
        self.written += bytes.len() as u64;
        let mut rest = bytes;
        while self.buffer.len() + rest.len() >= PART_BYTES {
            self.buffer
                .extend_from_slice(&rest.split_to(PART_BYTES - self.buffer.len()));
            self.send_part().await?;
        }
        self.buffer.extend_from_slice(&rest);
        Ok(())
    }

    /// What the entry will be if nothing more is written.
    pub(crate) fn entry(&self) -> ObjectEntry {
        ObjectEntry {
            path: self.name.clone(),
            rows: None,
            bytes: self.written,
            sha256: hex(&self.hasher.clone().finalize()),
        }
    }

    pub(crate) fn url(&self) -> String {
        self.store.url_of(&self.path)
    }

    /// Makes the object visible.
    ///
    /// # Errors
    /// Those of [`Store::put`]; nothing is visible then.
    pub async fn finish(mut self) -> Result<ObjectEntry> {
        let done = match self.sent {
            Sent::Nothing => {
                let whole = PutPayload::from_bytes(self.buffer.split().freeze());
                self.store
                    .inner
                    .put(&self.location, whole)
                    .await
                    .map(|_| ())
            }
            Sent::Parts(_) | Sent::Over => self.complete().await,
        };
        let entry = self.entry();
        let done = match done {
            // The upload may be complete and only the answer lost: then it is unknown when the
            // client asks again.
            Err(_) if self.is_there(&entry).await => Ok(()),
            done => done,
        };
        self.settle(done).await?;
        self.sent = Sent::Over;
        Ok(entry)
    }

    /// Whether the path holds just these bytes; a store that does not answer is no yes.
    async fn is_there(&self, entry: &ObjectEntry) -> bool {
        let Ok(found) = self.store.inner.get(&self.location).await else {
            return false;
        };
        if found.meta.size != entry.bytes {
            return false;
        }
        let mut hasher = Sha256::new();
        let mut body = found.into_stream();
        while let Some(chunk) = body.next().await {
            match chunk {
                Ok(chunk) => hasher.update(&chunk),
                Err(_) => return false,
            }
        }
        hex(&hasher.finalize()) == entry.sha256
    }

    /// Gives up and removes what was sent. Dropping the writer does the same in the background.
    pub async fn abort(mut self) {
        self.remove_sent().await;
    }

    async fn send_part(&mut self) -> Result<()> {
        let part = PutPayload::from_bytes(self.buffer.split().freeze());
        let queued = self.queue(part).await;
        self.settle(queued).await
    }

    async fn queue(&mut self, part: PutPayload) -> object_store::Result<()> {
        if matches!(self.sent, Sent::Nothing) {
            let inner = self.store.inner.put_multipart(&self.location).await?;
            self.sent = Sent::Parts(Upload {
                parts: JoinSet::new(),
                inner,
            });
        }
        let upload = self.upload()?;
        while upload.parts.len() >= PARTS_IN_FLIGHT {
            joined(upload.parts.join_next().await)?;
        }
        upload.parts.spawn(upload.inner.put_part(part));
        Ok(())
    }

    async fn complete(&mut self) -> object_store::Result<()> {
        if !self.buffer.is_empty() {
            let rest = PutPayload::from_bytes(self.buffer.split().freeze());
            self.queue(rest).await?;
        }
        let upload = self.upload()?;
        while !upload.parts.is_empty() {
            joined(upload.parts.join_next().await)?;
        }
        upload.inner.complete().await.map(|_| ())
    }

    fn upload(&mut self) -> object_store::Result<&mut Upload> {
        match &mut self.sent {
            Sent::Parts(upload) => Ok(upload),
            Sent::Nothing | Sent::Over => Err(object_store::Error::Generic {
                store: "ObjectWriter",
                source: "an earlier write failed".into(),
            }),
        }
    }

    /// On failure removes what was sent at once: on a full disk it takes the space.
    async fn settle(&mut self, done: object_store::Result<()>) -> Result<()> {
        if let Err(error) = done {
            self.remove_sent().await;
            return Err(self.store.error(&self.path, error));
        }
        Ok(())
    }

    async fn remove_sent(&mut self) {
        if let Sent::Parts(upload) = std::mem::replace(&mut self.sent, Sent::Over) {
            upload.abort(&self.path).await;
        }
    }
}

impl Upload {
    async fn abort(mut self, path: &str) {
        self.parts.shutdown().await;
        if let Err(error) = self.inner.abort().await {
            tracing::warn!(path, %error, "an incomplete upload could not be aborted");
        }
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        let Sent::Parts(upload) = std::mem::replace(&mut self.sent, Sent::Over) else {
            return;
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let path = std::mem::take(&mut self.path);
            runtime.spawn(async move { upload.abort(&path).await });
        }
    }
}

fn joined(
    part: Option<Result<object_store::Result<()>, tokio::task::JoinError>>,
) -> object_store::Result<()> {
    part.transpose()?.transpose().map(|_| ())
}
