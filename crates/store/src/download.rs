//! A large object into memory, by several requests at a time.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;

use crate::stage_key::{hex, sha256_hex};
use crate::{Error, Result, Store};

/// Bytes of one request; an object up to this size is one GET.
const PIECE_BYTES: u64 = 8 << 20;
/// Requests on their way at a time: enough to fill a link whose single connections are slow.
const PIECES_AT_ONCE: usize = 16;

impl Store {
    /// The bytes of an object that should have this size, and their SHA-256; `None` if it is not
    /// there. Needs memory for the object and for the requests on their way.
    pub(crate) async fn get_hashed(
        &self,
        path: &str,
        size: u64,
    ) -> Result<Option<(Bytes, String)>> {
        if size <= PIECE_BYTES {
            let bytes = self.get(path).await?;
            return Ok(bytes.map(|bytes| {
                let sha256 = sha256_hex(&bytes);
                (bytes, sha256)
            }));
        }
        match self.in_pieces(path, size).await {
            Err(Error::Missing { .. }) => Ok(None),
            done => done.map(Some),
        }
    }

    async fn in_pieces(&self, path: &str, size: u64) -> Result<(Bytes, String)> {
        let starts = (0..size).step_by(PIECE_BYTES as usize);
        let pieces = starts.map(|start| self.piece(path, start..size.min(start + PIECE_BYTES)));
        let mut pieces = futures::stream::iter(pieces).buffered(PIECES_AT_ONCE);
        let mut whole = BytesMut::with_capacity(usize::try_from(size).unwrap_or(0));
        let mut hasher = Sha256::new();
        while let Some(piece) = pieces.try_next().await? {
            hasher.update(&piece);
            whole.extend_from_slice(&piece);
        }
        Ok((whole.freeze(), hex(&hasher.finalize())))
    }

    /// One range, read by a task of its own, so that bytes keep coming while others are hashed.
    async fn piece(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        let (store, path) = (self.clone(), path.to_owned());
        let url = self.url_of(&path);
        let reading = tokio::spawn(async move { store.get_range(&path, range).await });
        let mut reading = AbortOnDrop(reading);
        (&mut reading.0).await.map_err(|error| Error::Store {
            url,
            source: error.into(),
        })?
    }
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::count;

    #[tokio::test]
    async fn a_large_object_comes_whole_by_several_requests() {
        let whole: Bytes = (0..=250u8).cycle().take((20 << 20) + 3).collect();
        let store = Store::memory();
        store.put("a", whole.clone()).await.expect("put");
        let (counted, calls) = count(&store);
        let size = whole.len() as u64;
        let (bytes, sha256) = counted
            .get_hashed("a", size)
            .await
            .expect("read")
            .expect("there");
        assert!(bytes == whole);
        assert_eq!((sha256, calls.reads()), (sha256_hex(&whole), 3));
        assert!(counted.get_hashed("b", size).await.expect("read").is_none());
        store.put("a", whole.slice(..17 << 20)).await.expect("put");
        let (short, _) = store
            .get_hashed("a", size)
            .await
            .expect("read")
            .expect("there");
        assert_eq!(short.len(), 17 << 20, "shorter than it should be");
    }
}
