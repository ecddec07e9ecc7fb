//! A store that forgets what is large: for tests of memory, where the result would fill it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::Store;

/// Smaller objects are kept: manifests, journals.
const KEPT_BYTES: usize = 1 << 20;

/// An empty store in memory that lists objects of a MiB and more, but has dropped their bytes.
pub fn sink() -> Store {
    Store::from_object_store(Arc::new(Sink::default()), "sink://")
}

#[derive(Debug, Default)]
struct Sink {
    kept: InMemory,
    dropped: Mutex<BTreeMap<Path, ObjectMeta>>,
}

impl Sink {
    fn dropped(&self) -> MutexGuard<'_, BTreeMap<Path, ObjectMeta>> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a sink")
    }
}

#[async_trait]
impl ObjectStore for Sink {
    async fn put_opts(
        &self,
        to: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let size = payload.content_length() as u64;
        if payload.content_length() < KEPT_BYTES {
            return self.kept.put_opts(to, payload, opts).await;
        }
        // An empty object stands for it, so that the other's rules about what is there hold.
        let put = self.kept.put_opts(to, PutPayload::new(), opts).await?;
        let meta = self.kept.head(to).await?;
        self.dropped()
            .insert(to.clone(), ObjectMeta { size, ..meta });
        Ok(put)
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(Error::NotImplemented {
            operation: "multipart uploads".to_owned(),
            implementer: "a sink".to_owned(),
        })
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        self.kept.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.kept.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let dropped = self.dropped().clone();
        let of = move |meta: ObjectMeta| dropped.get(&meta.location).cloned().unwrap_or(meta);
        self.kept.list(prefix).map_ok(of).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.kept.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.kept.copy_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn small_objects_stay_and_large_ones_are_listed() {
        let store = sink();
        store.put("a/small", "x".into()).await.expect("put");
        store
            .put("a/large", vec![1; KEPT_BYTES].into())
            .await
            .expect("put");
        assert_eq!(store.get("a/small").await.expect("get"), Some("x".into()));
        let sizes: Vec<u64> = store
            .list("a")
            .await
            .expect("list")
            .iter()
            .map(|object| object.bytes)
            .collect();
        assert_eq!(sizes, [KEPT_BYTES as u64, 1]);
        assert_eq!(
            store.get("a/large").await.expect("get"),
            Some(Default::default())
        );
    }
}
