//! Reading a byte range that goes on where its body broke off.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt, TryStreamExt};

use crate::{BoxError, CancelToken, Error, ObjectEntry, Result, StageObjectWriter};

/// How often in a row a body may bring nothing new before the read fails.
const TRIES: u32 = 5;

/// One answer to a range request: the bytes from where they were asked for.
pub struct Part {
    /// The version of the whole, if the server names it.
    pub etag: Option<String>,
    /// The body; it may break off anywhere.
    pub bytes: BoxStream<'static, Result<Bytes, BoxError>>,
}

/// The bytes of `range`, asking again from the first missing one whenever a body breaks off,
/// and failing when the version changes in between, so that the result is never a mixture.
///
/// `open` asks for a range of the version given, or of any version the first time. It waits for
/// busy servers itself: its errors end the stream. Five bodies in a row that bring
/// nothing end it with [`Error::Interrupted`]. `url` is for messages.
pub fn resumable<O, F>(
    url: String,
    range: Range<u64>,
    open: O,
) -> impl Stream<Item = Result<Bytes>> + Send + 'static
where
    O: Fn(Range<u64>, Option<String>) -> F + Send + 'static,
    F: Future<Output = Result<Part>> + Send,
{
    let reading = Reading {
        url,
        at: range.start,
        end: range.end,
        etag: None,
        body: None,
        failed: 0,
        open,
    };
    stream::try_unfold(reading, |mut reading| async move {
        Ok(reading.next().await?.map(|bytes| (bytes, reading)))
    })
}

struct Reading<O> {
    url: String,
    at: u64,
    end: u64,
    etag: Option<String>,
    body: Option<BoxStream<'static, Result<Bytes, BoxError>>>,
    failed: u32,
    open: O,
}

impl<O, F> Reading<O>
where
    O: Fn(Range<u64>, Option<String>) -> F,
    F: Future<Output = Result<Part>>,
{
    async fn next(&mut self) -> Result<Option<Bytes>> {
        while self.at < self.end {
            let body = match &mut self.body {
                Some(body) => body,
                None => {
                    let part = (self.open)(self.at..self.end, self.etag.clone()).await?;
                    if self.etag.is_some() && part.etag != self.etag {
                        return Err(Error::Changed {
                            url: self.url.clone(),
                        });
                    }
                    self.etag = part.etag;
                    self.body.insert(part.bytes)
                }
            };
            let broken: BoxError = match body.next().await {
                Some(Ok(bytes)) if bytes.is_empty() => continue,
                Some(Ok(mut bytes)) => {
                    let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
                    bytes.truncate(left);
                    self.at += bytes.len() as u64;
                    self.failed = 0;
                    return Ok(Some(bytes));
                }
                Some(Err(error)) => error,
                None => "the body is shorter than announced".into(),
            };
            self.body = None;
            self.failed += 1;
            if self.failed >= TRIES {
                return Err(Error::Interrupted {
                    url: self.url.clone(),
                    at: self.at,
                    source: broken,
                });
            }
            tracing::debug!(url = self.url, at = self.at, error = %broken, "a download broke off and goes on");
            tokio::time::sleep(Duration::from_millis(100) * 2u32.pow(self.failed)).await;
        }
        Ok(None)
    }
}

/// Cuts a range into pieces and reads several at a time; the bytes come in order.
///
/// Holds up to `at_once` pieces in memory.
pub fn in_pieces<S>(
    range: Range<u64>,
    piece_bytes: u64,
    at_once: usize,
    read: impl Fn(Range<u64>) -> S + Send + 'static,
) -> impl Stream<Item = Result<Bytes>> + Send + 'static
where
    S: Stream<Item = Result<Bytes>> + Send + 'static,
{
    let starts =
        (range.start..range.end).step_by(usize::try_from(piece_bytes).unwrap_or(usize::MAX));
    let pieces =
        starts.map(move |start| read(start..range.end.min(start.saturating_add(piece_bytes))));
    stream::iter(pieces)
        .map(TryStreamExt::try_collect::<Vec<Bytes>>)
        .buffered(at_once.max(1))
        .map_ok(|bytes| stream::iter(bytes.into_iter().map(Ok)))
        .try_flatten()
}

/// Copies a body into a stage's object, which becomes visible only if its bytes have the hash
/// expected. `progress` hears how many bytes have just come.
///
/// # Errors
/// The body's and the writer's; [`Error::Cancelled`]; [`Error::Corrupt`] for another hash.
pub async fn copy(
    body: impl Stream<Item = Result<Bytes>>,
    mut writer: StageObjectWriter,
    sha256: Option<&str>,
    cancel: &CancelToken,
    mut progress: impl FnMut(u64),
) -> Result<ObjectEntry> {
    let mut body = std::pin::pin!(body);
    let copied = async {
        loop {
            let next = tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(Error::Cancelled),
                next = body.try_next() => next?,
            };
            let Some(bytes) = next else { break };
            let length = bytes.len() as u64;
            writer.write(bytes).await?;
            progress(length);
        }
        let found = writer.entry().sha256;
        match sha256 {
            Some(expected) if !expected.eq_ignore_ascii_case(&found) => {
                let reason = format!("its SHA-256 is {found} instead of {expected}");
                Err(Error::Corrupt {
                    url: writer.url(),
                    reason,
                })
            }
            _ => Ok(()),
        }
    }
    .await;
    match copied {
        Ok(()) => writer.finish().await,
        Err(error) => {
            writer.abort().await;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use serde_json::json;

    use super::*;
    use crate::{Opened, StageId, Store, open_stage};

    fn content() -> Bytes {
        (0..=255u8).cycle().take(10_000).collect()
    }

    type Answer = futures::future::Ready<Result<Part>>;

    /// A server whose bodies break off after `most` bytes, and whose versions are `etag(call)`.
    fn server(
        most: usize,
        etag: fn(u64) -> &'static str,
        calls: &Arc<AtomicU64>,
    ) -> impl Fn(Range<u64>, Option<String>) -> Answer + use<> {
        let calls = Arc::clone(calls);
        move |range: Range<u64>, _etag| {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            let whole = content().slice(range.start as usize..range.end as usize);
            let sent = whole.slice(..whole.len().min(most));
            let broken = (sent.len() < whole.len()).then(|| Err("connection reset".into()));
            let bytes = stream::iter([Ok(sent)].into_iter().chain(broken)).boxed();
            futures::future::ready(Ok(Part {
                etag: Some(etag(call).to_owned()),
                bytes,
            }))
        }
    }

    async fn all(body: impl Stream<Item = Result<Bytes>>) -> Result<Vec<u8>> {
        let chunks: Vec<Bytes> = body.try_collect().await?;
        Ok(chunks.concat())
    }

    #[tokio::test(start_paused = true)]
    async fn broken_bodies_are_joined() {
        let calls = Arc::default();
        let open = server(999, |_| "v1", &calls);
        let found = all(resumable("x".into(), 5..9_995, open))
            .await
            .expect("whole");
        assert!(found == content()[5..9_995]);
        assert_eq!(calls.load(Ordering::Relaxed), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_comes_ends() {
        let calls = Arc::default();
        let open = server(0, |_| "v1", &calls);
        let error = all(resumable("x".into(), 0..10, open))
            .await
            .expect_err("nothing comes");
        assert!(matches!(error, Error::Interrupted { at: 0, .. }), "{error}");
        assert_eq!(calls.load(Ordering::Relaxed), u64::from(TRIES));
    }

    #[tokio::test(start_paused = true)]
    async fn two_versions_are_never_mixed() {
        let open = server(
            999,
            |call| if call < 3 { "v1" } else { "v2" },
            &Arc::default(),
        );
        let error = all(resumable("x".into(), 0..10_000, open))
            .await
            .expect_err("it changed");
        assert!(matches!(error, Error::Changed { .. }), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn pieces_come_in_order() {
        let read = |range| resumable("x".into(), range, server(500, |_| "v1", &Arc::default()));
        let found = all(in_pieces(3..10_000, 1_024, 3, read))
            .await
            .expect("whole");
        assert!(found == content()[3..]);
    }

    #[tokio::test]
    async fn a_copy_with_another_hash_is_not_visible() {
        let store = Store::memory();
        let id = StageId::models("toy").expect("a name");
        let Opened::Open(stage) = open_stage(&store, &id, "toy", &json!(1))
            .await
            .expect("open")
        else {
            panic!("a new store has no finished stage")
        };
        let cancel = CancelToken::new();
        let body = || stream::iter([Ok(Bytes::from("abc"))]);
        let writer = || stage.object_writer("a").expect("a name");

        let wrong = copy(body(), writer(), Some("00"), &cancel, |_| {}).await;
        assert!(matches!(wrong, Err(Error::Corrupt { .. })));
        assert!(store.list("").await.expect("list").is_empty());

        let mut heard = 0;
        let right = crate::sha256_hex(b"abc").to_uppercase();
        let entry = copy(body(), writer(), Some(&right), &cancel, |bytes| {
            heard += bytes;
        })
        .await;
        assert_eq!((entry.expect("copied").bytes, heard), (3, 3));

        cancel.cancel();
        let stopped = copy(body(), writer(), None, &cancel, |_| {}).await;
        assert!(matches!(stopped, Err(Error::Cancelled)));
    }
}
