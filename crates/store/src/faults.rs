//! Stores that count their calls, and stores that fail or die at a chosen one.
//!
//! For tests of stages, here and in the crates above:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use updraft_store::{Store, faults};
//!
//! let (store, calls) = faults::count(&Store::memory());
//! store.get("nothing").await.expect("memory answers");
//! assert_eq!((calls.reads(), calls.writes()), (1, 0));
//! # }
//! ```

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
    UploadPart,
};

use crate::Store;

/// The same store, with every call counted.
pub fn count(store: &Store) -> (Store, Calls) {
    let calls = Calls::default();
    let counted = store.map_object_store(|inner| {
        Arc::new(Gated {
            inner,
            gate: calls.clone(),
        })
    });
    (counted, calls)
}

/// The same store, in which the `at`-th call, from 1, meets a fault.
pub fn inject(store: &Store, fault: Fault, at: u64) -> (Store, Injected) {
    let injected = Injected {
        fault,
        at,
        seen: Arc::default(),
    };
    let faulty = store.map_object_store(|inner| {
        Arc::new(Gated {
            inner,
            gate: injected.clone(),
        })
    });
    (faulty, injected)
}

/// The same store, which calls `before` ahead of each call with its number, from 1.
pub fn watch(store: &Store, before: impl Fn(u64) + Send + Sync + 'static) -> Store {
    let watched = Watched {
        before: Arc::new(before),
        seen: Arc::default(),
    };
    store.map_object_store(|inner| {
        Arc::new(Gated {
            inner,
            gate: watched,
        })
    })
}

/// What happens at the chosen call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails and does nothing; later calls work. A request that never arrived.
    Fail,
    /// It takes effect but fails for the caller; later calls work. A timeout after success.
    LoseAnswer,
    /// It and all later calls are refused. The process was killed just before it.
    KillBefore,
    /// It takes effect, and then it and all later calls are refused. The process was killed
    /// while it waited for the answer.
    KillAfter,
}

impl Fault {
    /// Every fault.
    pub const ALL: [Self; 4] = [
        Self::Fail,
        Self::LoseAnswer,
        Self::KillBefore,
        Self::KillAfter,
    ];
}

/// How many calls of each kind a store has seen.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<[AtomicU64; 4]>);

impl Calls {
    /// GET and HEAD requests.
    pub fn reads(&self) -> u64 {
        self.of(Call::Read)
    }

    /// PUT requests, each part of a multipart upload and its start, end or abort included.
    pub fn writes(&self) -> u64 {
        self.of(Call::Write)
    }

    /// Listings.
    pub fn lists(&self) -> u64 {
        self.of(Call::List)
    }

    /// Deletions.
    pub fn deletes(&self) -> u64 {
        self.of(Call::Delete)
    }

    /// All calls.
    pub fn total(&self) -> u64 {
        self.reads() + self.writes() + self.lists() + self.deletes()
    }

    fn of(&self, call: Call) -> u64 {
        self.0[call as usize].load(Ordering::Relaxed)
    }
}

/// Tells whether an injected fault has struck.
#[derive(Clone, Debug)]
pub struct Injected {
    fault: Fault,
    at: u64,
    seen: Arc<AtomicU64>,
}

impl Injected {
    /// Whether the chosen call was ever made.
    pub fn struck(&self) -> bool {
        self.seen.load(Ordering::Relaxed) >= self.at
    }
}

#[derive(Clone, Copy)]
enum Call {
    Read,
    Write,
    List,
    Delete,
}

/// Decides about each call before it is made.
trait Gate: Clone + fmt::Debug + Send + Sync + 'static {
    fn enter(&self, call: Call) -> Pass;
}

/// What becomes of a call.
enum Pass {
    Go,
    Refuse(Error),
    GoThenFail(Error),
}

impl Pass {
    async fn through<T>(self, call: impl Future<Output = Result<T>>) -> Result<T> {
        match self {
            Self::Go => call.await,
            Self::Refuse(error) => Err(error),
            Self::GoThenFail(error) => {
                call.await?;
                Err(error)
            }
        }
    }
}

impl Gate for Calls {
    fn enter(&self, call: Call) -> Pass {
        self.0[call as usize].fetch_add(1, Ordering::Relaxed);
        Pass::Go
    }
}

#[derive(Clone)]
struct Watched {
    before: Arc<dyn Fn(u64) + Send + Sync>,
    seen: Arc<AtomicU64>,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").finish_non_exhaustive()
    }
}

impl Gate for Watched {
    fn enter(&self, _call: Call) -> Pass {
        (self.before)(self.seen.fetch_add(1, Ordering::Relaxed) + 1);
        Pass::Go
    }
}

impl Gate for Injected {
    fn enter(&self, _call: Call) -> Pass {
        let call = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        let error = || Error::Generic {
            store: "injected",
            source: format!("{:?} at call {}", self.fault, self.at).into(),
        };
        let killed = matches!(self.fault, Fault::KillBefore | Fault::KillAfter);
        match call.cmp(&self.at) {
            std::cmp::Ordering::Less => Pass::Go,
            std::cmp::Ordering::Equal => match self.fault {
                Fault::Fail | Fault::KillBefore => Pass::Refuse(error()),
                Fault::LoseAnswer | Fault::KillAfter => Pass::GoThenFail(error()),
            },
            std::cmp::Ordering::Greater if killed => Pass::Refuse(error()),
            std::cmp::Ordering::Greater => Pass::Go,
        }
    }
}

/// A store behind a gate.
#[derive(Debug)]
struct Gated<G> {
    inner: Arc<dyn ObjectStore>,
    gate: G,
}

impl<G: fmt::Debug> fmt::Display for Gated<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} over {}", self.gate, self.inner)
    }
}

#[async_trait]
impl<G: Gate> ObjectStore for Gated<G> {
    async fn put_opts(
        &self,
        to: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        self.gate
            .enter(Call::Write)
            .through(self.inner.put_opts(to, payload, opts))
            .await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self
            .gate
            .enter(Call::Write)
            .through(self.inner.put_multipart_opts(to, opts))
            .await?;
        Ok(Box::new(GatedUpload {
            inner,
            gate: self.gate.clone(),
        }))
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        self.gate
            .enter(Call::Read)
            .through(self.inner.get_opts(from, options))
            .await
    }

    async fn get_ranges(&self, from: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.gate
            .enter(Call::Read)
            .through(self.inner.get_ranges(from, ranges))
            .await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let (inner, gate) = (Arc::clone(&self.inner), self.gate.clone());
        paths
            .then(move |path| {
                let (inner, gate) = (Arc::clone(&inner), gate.clone());
                async move {
                    let mut deleted = inner.delete_stream(stream::iter([path]).boxed());
                    let one = async move { deleted.next().await.expect("one in, one out") };
                    gate.enter(Call::Delete).through(one).await
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let listed = self.inner.list(prefix);
        match self.gate.enter(Call::List) {
            Pass::Go => listed,
            Pass::Refuse(error) => stream::iter([Err(error)]).boxed(),
            Pass::GoThenFail(error) => listed.chain(stream::iter([Err(error)])).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.gate
            .enter(Call::List)
            .through(self.inner.list_with_delimiter(prefix))
            .await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.gate
            .enter(Call::Write)
            .through(self.inner.copy_opts(from, to, options))
            .await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.gate
            .enter(Call::Write)
            .through(self.inner.rename_opts(from, to, options))
            .await
    }
}

#[derive(Debug)]
struct GatedUpload<G> {
    inner: Box<dyn MultipartUpload>,
    gate: G,
}

#[async_trait]
impl<G: Gate> MultipartUpload for GatedUpload<G> {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let part = self.inner.put_part(data);
        self.gate.enter(Call::Write).through(part).boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.gate
            .enter(Call::Write)
            .through(self.inner.complete())
            .await
    }

    async fn abort(&mut self) -> Result<()> {
        self.gate
            .enter(Call::Write)
            .through(self.inner.abort())
            .await
    }
}
