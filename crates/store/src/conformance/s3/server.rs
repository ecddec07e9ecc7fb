//! The server: connections in, signed requests answered, faults at the wire.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::http::{Reply, Request};
use super::objects::Objects;
use super::signature;
use crate::Store;

const KEY_ID: &str = "updraft-test";
const SECRET: &str = "only/for+tests";

/// What happens to the chosen request, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireFault {
    /// The connection closes and nothing was done.
    DropBefore,
    /// The request takes effect, and the connection closes without an answer.
    DropAfter,
    /// 503 and nothing was done.
    Refuse,
    /// The request takes effect, and the answer is 500.
    FailAfter,
}

impl WireFault {
    /// Every fault.
    pub const ALL: [Self; 4] = [
        Self::DropBefore,
        Self::DropAfter,
        Self::Refuse,
        Self::FailAfter,
    ];
}

/// An S3 server on a free port of the loopback; stops when it is dropped.
#[derive(Debug)]
pub struct S3Server {
    address: SocketAddr,
    state: Arc<State>,
    accepting: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    objects: Mutex<Objects>,
    requests: AtomicU64,
    fault: Mutex<Option<(WireFault, u64)>>,
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl S3Server {
    /// Starts an empty server, with every bucket there.
    ///
    /// # Panics
    /// If the loopback has no free port.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let accepting = tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(serve(connection, Arc::clone(&shared)));
            }
        });
        Self {
            address,
            state,
            accepting,
        }
    }

    /// A store on this server, opened by its URL as any other.
    ///
    /// # Panics
    /// If the crate is built without the feature `s3`.
    pub fn store(&self, prefix: &str) -> Store {
        self.store_signed_with(prefix, SECRET)
    }

    /// [`store`](Self::store), but with a secret of the caller's.
    ///
    /// # Panics
    /// As [`store`](Self::store).
    pub fn store_signed_with(&self, prefix: &str, secret: &str) -> Store {
        let env = self.environment_signed_with(secret);
        let env = env.map(|(name, value)| (name.to_owned(), value));
        Store::open_with(&format!("s3://bucket/{prefix}"), env).expect("the settings fit")
    }

    /// What another process needs in its environment to open `s3://bucket/…` on this server.
    pub fn environment(&self) -> [(&'static str, String); 4] {
        self.environment_signed_with(SECRET)
    }

    fn environment_signed_with(&self, secret: &str) -> [(&'static str, String); 4] {
        [
            ("AWS_ENDPOINT_URL_S3", format!("http://{}", self.address)),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", KEY_ID.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", secret.to_owned()),
        ]
    }

    /// Makes the `at`-th request from now on, from 1, meet a fault.
    pub fn fail_at(&self, fault: WireFault, at: u64) {
        let at = self.requests() + at;
        *lock(&self.state.fault) = Some((fault, at));
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// Parts that take space: those of multipart uploads neither completed nor aborted.
    pub fn orphaned_parts(&self) -> usize {
        lock(&self.state.objects).orphaned_parts()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers one connection's requests until either side ends it.
async fn serve(connection: TcpStream, state: Arc<State>) {
    let mut connection = BufReader::new(connection);
    while let Ok(Some(request)) = Request::read(&mut connection).await {
        let number = state.requests.fetch_add(1, Ordering::SeqCst) + 1;
        let fault = lock(&state.fault).and_then(|(fault, at)| (at == number).then_some(fault));
        let reply = match fault {
            Some(WireFault::DropBefore) => return,
            Some(WireFault::Refuse) => Reply::error(503, "SlowDown"),
            None | Some(WireFault::DropAfter | WireFault::FailAfter) => answer(&state, &request),
        };
        let reply = match fault {
            Some(WireFault::DropAfter) => return,
            Some(WireFault::FailAfter) => Reply::error(500, "InternalError"),
            _ => reply,
        };
        if reply.write(&mut connection, &request.method).await.is_err() {
            return;
        }
    }
}

fn answer(state: &State, request: &Request) -> Reply {
    if signature::is_valid(request, KEY_ID, SECRET) {
        lock(&state.objects).answer(request)
    } else {
        Reply::error(403, "SignatureDoesNotMatch")
    }
}
