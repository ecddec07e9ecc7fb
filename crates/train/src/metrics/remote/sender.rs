//! The thread that brings a log's lines to a server, in order, until they are there.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::http::Failure;
use super::state::{Identity, SentFile};
use crate::metrics::entry::Entry;

/// What one request may carry: services take at most a thousand figures, and a line has up to six.
const MOST_LINES: usize = 100;
const MOST_BYTES: u64 = 64 << 10;

/// A tracking server.
pub(super) trait Service: Send + 'static {
    /// Server and place within it; a log belongs to one.
    fn target(&self) -> String;

    /// Is shown each line that earlier processes brought there, before the run is opened.
    fn recall(&mut self, _place: u64, _entry: &Entry) {}

    /// Makes the run, or finds the one made before; returns the server's name for it.
    async fn open(&mut self, identity: &Identity) -> Result<String, Failure>;

    /// Brings lines there, `first` being the index of the first. After a failure the same lines
    /// come again, perhaps with more; they must not count twice.
    async fn send(&mut self, run: &str, first: u64, entries: &[Entry]) -> Result<(), Failure>;

    /// Says that the run is alive.
    async fn heartbeat(&mut self, run: &str) -> Result<(), Failure>;
}

/// How patient a sender is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Wait after the first failure; each further one doubles it.
    pub(super) first_wait: Duration,
    pub(super) longest_wait: Duration,
    /// The longest one request may take.
    pub(super) request: Duration,
    /// Between signs of life.
    pub(super) heartbeat: Duration,
    /// How long a closed sender goes on.
    pub(super) grace: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first_wait: Duration::from_secs(1),
            longest_wait: Duration::from_secs(60),
            request: Duration::from_secs(30),
            heartbeat: Duration::from_secs(30),
            grace: Duration::from_secs(5),
        }
    }
}

/// What the recording and the sending thread tell each other.
#[derive(Debug)]
pub(super) struct Shared {
    progress: Mutex<Progress>,
    sent: Condvar,
    news: Notify,
    closing: Notify,
}

#[derive(Debug)]
struct Progress {
    written: u64,
    sent: u64,
    closed: bool,
    /// The sender has given up.
    over: bool,
}

impl Shared {
    pub(super) fn new(written: u64, sent: u64) -> Self {
        Self {
            progress: Mutex::new(Progress {
                written,
                sent,
                closed: false,
                over: false,
            }),
            sent: Condvar::new(),
            news: Notify::new(),
            closing: Notify::new(),
        }
    }

    /// The log has this many bytes.
    pub(super) fn wrote(&self, bytes: u64) {
        self.lock().written = bytes;
        self.news.notify_one();
    }

    /// Nothing more will come.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.news.notify_one();
        self.closing.notify_one();
    }

    /// Waits until everything has arrived; says whether it has.
    pub(super) fn wait_sent(&self, at_most: Duration) -> bool {
        let waits = |progress: &mut Progress| progress.sent < progress.written && !progress.over;
        let waited = self.sent.wait_timeout_while(self.lock(), at_most, waits);
        let (progress, _) = waited.unwrap_or_else(PoisonError::into_inner);
        progress.sent >= progress.written
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        // Each critical section is one assignment: nothing is ever half-done.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrived(&self, bytes: u64) {
        self.lock().sent = bytes;
        self.sent.notify_all();
    }
}

/// Starts the thread; it ends when the log is closed and has arrived, or the grace is over.
pub(super) fn spawn<S: Service>(
    service: S,
    log: PathBuf,
    sent: SentFile,
    shared: Arc<Shared>,
    pace: Pace,
) -> io::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let sender = Sender {
        service,
        log,
        sent,
        shared: Arc::clone(&shared),
        pace,
    };
    let run = move || {
        runtime.block_on(async {
            tokio::select! {
                () = sender.run() => {}
                () = async { shared.closing.notified().await; sleep(pace.grace).await } => {}
            }
        });
        let mut progress = shared.lock();
        progress.over = true;
        if progress.sent < progress.written {
            let bytes = progress.written - progress.sent;
            tracing::warn!(
                bytes,
                "metrics wait in their log: open it again to send them"
            );
        }
        drop(progress);
        shared.sent.notify_all();
    };
    std::thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(run)
}

struct Sender<S> {
    service: S,
    log: PathBuf,
    sent: SentFile,
    shared: Arc<Shared>,
    pace: Pace,
}

impl<S: Service> Sender<S> {
    async fn run(mut self) {
        let (mut run, mut wait) = (None, self.pace.first_wait);
        loop {
            let turn = self.turn(&mut run).await;
            match turn {
                Ok(Turn::Over) => return,
                Ok(Turn::Sent) => wait = self.pace.first_wait,
                Err(Failure::Down(reason)) => {
                    if wait == self.pace.first_wait {
                        tracing::warn!(reason, "metrics cannot be sent now, trying on");
                    }
                    sleep(wait).await;
                    wait = (wait * 2).min(self.pace.longest_wait);
                }
                Err(failure) => {
                    let log = self.log.display();
                    tracing::warn!(%failure, %log, "metrics are refused, they stay in their log");
                    return;
                }
            }
        }
    }

    /// Opens the run, sends some lines, or waits for some.
    async fn turn(&mut self, run: &mut Option<String>) -> Result<Turn, Failure> {
        let Some(run) = run else {
            *run = Some(self.open().await?);
            return Ok(Turn::Sent);
        };
        let (written, closed) = {
            let progress = self.shared.lock();
            (progress.written, progress.closed)
        };
        let from = self.sent.bytes();
        if from < written {
            let entries = self.read(from, written.min(from + MOST_BYTES))?;
            let entries = &entries[..entries.len().min(MOST_LINES)];
            let sending = self.service.send(run, self.sent.lines(), entries);
            within(self.pace.request, sending).await?;
            let bytes: usize = entries.iter().map(|entry| entry.line().len()).sum();
            self.sent.advance(entries.len() as u64, bytes as u64);
            self.shared.arrived(self.sent.bytes());
            return Ok(Turn::Sent);
        }
        if closed {
            return Ok(Turn::Over);
        }
        if timeout(self.pace.heartbeat, self.shared.news.notified())
            .await
            .is_err()
        {
            within(self.pace.request, self.service.heartbeat(run)).await?;
        }
        Ok(Turn::Sent)
    }

    async fn open(&mut self) -> Result<String, Failure> {
        let (mut place, mut from) = (0, 0);
        while from < self.sent.bytes() {
            let to = self.sent.bytes().min(from + MOST_BYTES);
            for entry in self.read(from, to)? {
                from += entry.line().len() as u64;
                self.service.recall(place, &entry);
                place += 1;
            }
        }
        if let Some(known) = self.sent.run() {
            return Ok(known.to_owned());
        }
        // It takes several requests.
        let opening = self.service.open(self.sent.identity());
        let opened = within(self.pace.request * 4, opening).await?;
        self.sent.set_run(opened.clone());
        Ok(opened)
    }

    /// The whole lines within a range of the log's bytes.
    fn read(&self, from: u64, to: u64) -> Result<Vec<Entry>, Failure> {
        read_entries(&self.log, from, to)
            .map_err(|error| Failure::Down(format!("the log cannot be read: {error}")))
    }
}

enum Turn {
    Sent,
    Over,
}

async fn within<T>(
    at_most: Duration,
    request: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let late = |_| Failure::Down(format!("no answer within {at_most:?}"));
    timeout(at_most, request).await.map_err(late)?
}

fn read_entries(log: &Path, from: u64, to: u64) -> io::Result<Vec<Entry>> {
    let mut bytes = Vec::new();
    let mut file = File::open(log)?;
    file.seek(SeekFrom::Start(from))?;
    file.take(to - from).read_to_end(&mut bytes)?;
    let lines = bytes.split_inclusive(|&byte| byte == b'\n');
    let whole = lines.filter(|line| line.ends_with(b"\n"));
    whole
        .map(|line| Ok(serde_json::from_slice(line)?))
        .collect()
}
