//! Reading and writing single objects by path.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStoreExt, PutMode, PutPayload};

use crate::{Error, Result, Store};

/// What a listing says about one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Path from the store's root.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// The store's own version tag, if it has one; changes with the content.
    pub etag: Option<String>,
}

impl From<ObjectMeta> for ObjectInfo {
    fn from(meta: ObjectMeta) -> Self {
        Self {
            path: meta.location.to_string(),
            bytes: meta.size,
            etag: meta.e_tag,
        }
    }
}

/// What a [`Store::create`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Created {
    /// The path now holds exactly the bytes given, written by this call, by an earlier try
    /// of it whose answer was lost, or by an equal writer.
    New,
    /// Other bytes were there first and still are.
    Existed(Bytes),
}

/// How often a create whose outcome is unknown, and which left nothing, is tried.
const CREATE_ATTEMPTS: u32 = 3;

impl Store {
    /// The bytes at `path`; `None` if there is no such object.
    ///
    /// # Errors
    /// [`Error::Unreachable`], [`Error::Denied`] or [`Error::Store`].
    pub async fn get(&self, path: &str) -> Result<Option<Bytes>> {
        match self.inner.get(&self.path(path)?).await {
            Ok(found) => found
                .bytes()
                .await
                .map(Some)
                .map_err(|error| self.error(path, error)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.error(path, error)),
        }
    }

    /// Bytes `range` of the object at `path`.
    ///
    /// # Errors
    /// As [`get`](Self::get), and [`Error::Missing`] if there is no such object.
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        self.get_range_of(path, range, None).await
    }

    /// [`get_range`](Self::get_range) of one version of the object: the one whose
    /// [`etag`](ObjectInfo::etag) a listing told.
    ///
    /// # Errors
    /// As [`get_range`](Self::get_range), and [`Error::Changed`] if it is another version now.
    pub async fn get_range_of(
        &self,
        path: &str,
        range: Range<u64>,
        etag: Option<&str>,
    ) -> Result<Bytes> {
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: etag.map(str::to_owned),
            ..GetOptions::default()
        };
        let found = self.inner.get_opts(&self.path(path)?, options).await;
        match found {
            Ok(found) => found.bytes().await.map_err(|error| self.error(path, error)),
            Err(object_store::Error::Precondition { .. }) => Err(Error::Changed {
                url: self.url_of(path),
            }),
            Err(error) => Err(self.error(path, error)),
        }
    }

    /// What the store knows of the object at `path`; `None` if there is none.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn head(&self, path: &str) -> Result<Option<ObjectInfo>> {
        match self.inner.head(&self.path(path)?).await {
            Ok(meta) => Ok(Some(meta.into())),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.error(path, error)),
        }
    }

    /// Writes `bytes` at `path`, replacing what is there. Readers see the old or the new bytes.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Unreachable`], [`Error::Denied`] or [`Error::Store`].
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        let done = self
            .inner
            .put(&self.path(path)?, PutPayload::from_bytes(bytes))
            .await;
        done.map(|_| ()).map_err(|error| self.error(path, error))
    }

    /// Writes `bytes` at `path` only if nothing is there.
    ///
    /// An answer that leaves the outcome open (a timeout, a dropped connection, "exists already"
    /// after a retried server error) is settled by reading the object back and comparing bytes,
    /// so one call means one thing: afterwards the path holds these bytes, or the call tells
    /// which others it holds.
    ///
    /// # Errors
    /// As [`put`](Self::put), when the bytes are not there after all.
    pub async fn create(&self, path: &str, bytes: Bytes) -> Result<Created> {
        if self.create_or_compare(path, &bytes).await? {
            return Ok(Created::New);
        }
        let theirs = self.get(path).await?;
        theirs.map(Created::Existed).ok_or_else(|| Error::Missing {
            url: self.url_of(path),
            next: "another process has just deleted it; run again",
        })
    }

    /// Every object under a folder, at any depth, sorted by path; `""` lists all.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let prefix = prefix.trim_end_matches('/');
        let location = (!prefix.is_empty())
            .then(|| self.path(prefix))
            .transpose()?;
        let mut found: Vec<ObjectInfo> = self
            .inner
            .list(location.as_ref())
            .map_ok(ObjectInfo::from)
            .try_collect()
            .await
            .map_err(|error| self.error(prefix, error))?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Deletes the object at `path`; one that is not there is as good as deleted.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete(&self, path: &str) -> Result<()> {
        if let Some(file) = self.staged_file(path) {
            return crate::staging::remove(&file).await;
        }
        match self.inner.delete(&self.path(path)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.error(path, error)),
        }
    }

    /// [`create`](Self::create) for bytes of any size: whether the path holds these afterwards.
    pub(crate) async fn create_or_compare(&self, path: &str, bytes: &Bytes) -> Result<bool> {
        let location = self.path(path)?;
        let mut attempt = 1;
        loop {
            let payload = PutPayload::from_bytes(bytes.clone());
            let error = match self
                .inner
                .put_opts(&location, payload, PutMode::Create.into())
                .await
            {
                Ok(_) => return Ok(true),
                Err(error) => error,
            };
            let exists = matches!(
                error,
                object_store::Error::AlreadyExists { .. }
                    | object_store::Error::Precondition { .. }
            );
            let error = self.error(path, error);
            if !exists && !error.is_retryable() {
                return Err(error);
            }
            match self.compare(&location, bytes).await {
                Ok(Some(same)) => return Ok(same),
                // The store answers and the object is not there: the write was lost.
                Ok(None) if attempt < CREATE_ATTEMPTS => {
                    tokio::time::sleep(Duration::from_millis(100) * 2u32.pow(attempt)).await;
                    attempt += 1;
                }
                Ok(None) | Err(_) => return Err(error),
            }
        }
    }

    /// Whether an object is exactly `bytes`, compared as it streams; `None` if there is none.
    async fn compare(&self, location: &Path, bytes: &[u8]) -> object_store::Result<Option<bool>> {
        let found = match self.inner.get(location).await {
            Ok(found) if found.meta.size != bytes.len() as u64 => return Ok(Some(false)),
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut rest = bytes;
        let mut body = found.into_stream();
        while let Some(chunk) = body.try_next().await? {
            match rest.strip_prefix(chunk.as_ref()) {
                Some(left) => rest = left,
                None => return Ok(Some(false)),
            }
        }
        Ok(Some(rest.is_empty()))
    }

    pub(crate) fn path(&self, path: &str) -> Result<Path> {
        Path::parse(path).map_err(|_| Error::InvalidName {
            name: path.to_owned(),
            reason: "a part is empty, relative or not plain text",
        })
    }

    pub(crate) fn error(&self, path: &str, error: object_store::Error) -> Error {
        Error::from_store(self.url_of(path), error)
    }
}
