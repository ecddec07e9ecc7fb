//! Workers on several machines, or several processes of one, over TCP.
//!
//! They meet at the first one: each tells it where it listens, hears where the others do, and connects to those of
//! lower rank. Nothing is encrypted or authenticated, as with torch's own: keep it within a private network.

mod link;

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use self::link::TcpLink;
use updraft_store::CancelToken;

use super::mesh::Mesh;
use super::{Collective, Launch, MAX_MESSAGE};
use crate::{Error, Result};

/// Between two looks at a listener or a port that has no waiting of its own.
const POLL: Duration = Duration::from_millis(20);

/// What tells a worker of ours from whoever else knocks.
const GREETING: &str = "updraft collective 2";

/// A worker from which nothing comes for so long is dead, or as good as.
const SILENCE: Duration = Duration::from_secs(120);

/// A worker among processes.
#[derive(Debug)]
pub struct TcpCollective(Mesh<TcpLink>);

/// A worker's first words.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    greeting: String,
    rank: usize,
    num_workers: usize,
    /// Where it listens for those of higher rank.
    port: u16,
}

/// The first worker's answer: where each worker listens, or why not.
#[derive(Debug, Serialize, Deserialize)]
enum Welcome {
    Addresses(Vec<SocketAddr>),
    Refused(String),
}

impl TcpCollective {
    /// Meets the other workers; `timeout` bounds the meeting.
    ///
    /// Later a worker waits for another as long as that one lives, be it evaluating or writing a checkpoint: each says a
    /// word every 20 seconds on a thread of its own, whatever else it does. One that has ended closes its connection,
    /// which is noticed at once; one that stands still, or whose machine or network is gone, after two minutes of silence.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] names the workers that did not come, or says what they do not agree on.
    pub fn join(launch: &Launch, timeout: Duration) -> Result<Self> {
        Self::join_unless(launch, timeout, &[])
    }

    /// [`join`](Self::join), which ends when any of these is cancelled.
    ///
    /// # Errors
    /// As [`join`](Self::join).
    pub fn join_unless(
        launch: &Launch,
        timeout: Duration,
        cancels: &[CancelToken],
    ) -> Result<Self> {
        Self::join_with(launch, timeout, SILENCE, cancels)
    }

    fn join_with(
        launch: &Launch,
        timeout: Duration,
        silence: Duration,
        cancels: &[CancelToken],
    ) -> Result<Self> {
        let Launch {
            rank,
            num_workers,
            master,
        } = launch;
        let meeting = Meeting {
            rank: *rank,
            num_workers: *num_workers,
            deadline: Instant::now() + timeout,
            cancels: cancels.to_vec(),
        };
        let links = match meeting.rank {
            0 => meeting.host(master),
            _ => meeting.attend(master),
        };
        let linked = |stream: Option<TcpStream>| {
            let link = |stream| TcpLink::new(stream, silence);
            stream.map(link).transpose()
        };
        let links = links.and_then(|streams| streams.into_iter().map(linked).collect());
        let links = links.map_err(|source| Error::Rendezvous {
            master: master.clone(),
            source,
        })?;
        Ok(Self(Mesh::new(meeting.rank, links)))
    }
}

impl Collective for TcpCollective {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn num_workers(&self) -> usize {
        self.0.num_workers()
    }
    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.0.exchange(mine)
    }
    fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        self.0.sum(values)
    }
}

struct Meeting {
    rank: usize,
    num_workers: usize,
    deadline: Instant,
    cancels: Vec<CancelToken>,
}

type Links = Vec<Option<TcpStream>>;

impl Meeting {
    /// The first worker: waits for all others, then tells each where all are.
    fn host(&self, master: &str) -> io::Result<Links> {
        let listener = listen_at(master)?;
        let mut links = self.no_links();
        let mut addresses = vec![listener.local_addr()?; self.num_workers];
        while links[1..].iter().any(Option::is_none) {
            let stream = self.accept(&listener, &links)?;
            let Ok(hello) = self.hear::<Hello>(&stream) else {
                continue; // Somebody else's connection.
            };
            if let Some(reason) = self.objection(&hello, &links) {
                self.tell(&stream, &Welcome::Refused(reason.clone()))?;
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            addresses[hello.rank] = SocketAddr::new(stream.peer_addr()?.ip(), hello.port);
            links[hello.rank] = Some(stream);
        }
        let welcome = Welcome::Addresses(addresses);
        for link in links.iter().flatten() {
            self.tell(link, &welcome)?;
        }
        Ok(links)
    }

    /// The others: connect to those of lower rank, and wait for those of higher.
    fn attend(&self, master: &str) -> io::Result<Links> {
        let first = self.connect(master)?;
        let listener = TcpListener::bind((first.local_addr()?.ip(), 0))?;
        let hello = Hello {
            greeting: GREETING.to_owned(),
            rank: self.rank,
            num_workers: self.num_workers,
            port: listener.local_addr()?.port(),
        };
        self.tell(&first, &hello)?;
        let addresses = match self.hear(&first)? {
            Welcome::Addresses(addresses) if addresses.len() == self.num_workers => addresses,
            Welcome::Addresses(_) => return Err(invalid("addresses of another group")),
            Welcome::Refused(reason) => return Err(invalid(reason)),
        };
        let mut links = self.no_links();
        links[0] = Some(first);
        for rank in 1..self.rank {
            let stream = self.connect(addresses[rank])?;
            self.tell(&stream, &hello)?;
            links[rank] = Some(stream);
        }
        while links[self.rank + 1..].iter().any(Option::is_none) {
            let stream = self.accept(&listener, &links)?;
            let Ok(hello) = self.hear::<Hello>(&stream) else {
                continue;
            };
            match self.objection(&hello, &links) {
                Some(reason) => return Err(invalid(reason)),
                None => links[hello.rank] = Some(stream),
            }
        }
        Ok(links)
    }

    fn no_links(&self) -> Links {
        (0..self.num_workers).map(|_| None).collect()
    }

    /// Why a worker cannot be the one it says it is.
    fn objection(&self, hello: &Hello, links: &Links) -> Option<String> {
        let Hello {
            greeting,
            rank,
            num_workers,
            ..
        } = hello;
        if greeting != GREETING {
            return Some(format!("a worker of another version, {greeting:?}"));
        }
        if *num_workers != self.num_workers {
            let own = self.num_workers;
            return Some(format!(
                "worker {rank} counts {num_workers} workers, worker {} {own}",
                self.rank
            ));
        }
        match links.get(*rank) {
            Some(None) if *rank > self.rank => None,
            _ => Some(format!("two workers of rank {rank}")),
        }
    }

    /// Whether somebody waits for this to end.
    fn check(&self) -> io::Result<()> {
        match self.cancels.iter().any(CancelToken::is_cancelled) {
            true => Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled")),
            false => Ok(()),
        }
    }

    fn time_left(&self) -> io::Result<Duration> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::Error::new(io::ErrorKind::TimedOut, "out of time")),
            left => Ok(left),
        }
    }

    /// A listener has no waiting with an end, so it is asked again and again.
    fn accept(&self, listener: &TcpListener, links: &Links) -> io::Result<TcpStream> {
        listener.set_nonblocking(true)?;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            self.check()?;
            if self.time_left().is_err() {
                let missing = |rank: &usize| *rank > self.rank && links[*rank].is_none();
                let missing: Vec<usize> = (0..links.len()).filter(missing).collect();
                let what = format!("workers {missing:?} did not come");
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            thread::sleep(POLL);
        }
    }

    /// The other side may start later than we do.
    fn connect(&self, address: impl ToSocketAddrs) -> io::Result<TcpStream> {
        loop {
            match TcpStream::connect(&address) {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    self.check()?;
                    if self.time_left().is_err() {
                        return Err(error);
                    }
                }
            }
            thread::sleep(POLL);
        }
    }

    fn tell(&self, mut stream: &TcpStream, what: &impl Serialize) -> io::Result<()> {
        let words = serde_json::to_vec(what)?;
        let len = u32::try_from(words.len()).map_err(io::Error::other)?;
        stream.set_write_timeout(Some(self.time_left()?))?;
        stream.write_all(&len.to_le_bytes())?;
        stream.write_all(&words)
    }

    fn hear<T: DeserializeOwned>(&self, mut stream: &TcpStream) -> io::Result<T> {
        stream.set_read_timeout(Some(self.time_left()?))?;
        let mut len = [0; 4];
        stream.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > MAX_MESSAGE {
            return Err(invalid("not a worker"));
        }
        let mut words = vec![0; len];
        stream.read_exact(&mut words)?;
        serde_json::from_slice(&words).map_err(io::Error::from)
    }
}

/// The meeting point may be an address that the network gives this machine without its knowing.
fn listen_at(master: &str) -> io::Result<TcpListener> {
    match TcpListener::bind(master) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            let address = master.to_socket_addrs()?.next().ok_or(error)?;
            let any: IpAddr = match address {
                SocketAddr::V4(_) => [0; 4].into(),
                SocketAddr::V6(_) => [0; 16].into(),
            };
            TcpListener::bind((any, address.port()))
        }
        bound => bound,
    }
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    /// A port that was free a moment ago.
    fn meeting_point() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        listener.local_addr().expect("bound").to_string()
    }

    fn launch(rank: usize, num_workers: usize, master: &str) -> Launch {
        let master = master.to_owned();
        Launch {
            rank,
            num_workers,
            master,
        }
    }

    fn group(num_workers: usize) -> Vec<TcpCollective> {
        patient_group(num_workers, TIMEOUT)
    }

    /// Workers that wait so long for a word.
    fn patient_group(num_workers: usize, silence: Duration) -> Vec<TcpCollective> {
        let master = meeting_point();
        thread::scope(|scope| {
            let joining: Vec<_> = (0..num_workers)
                .map(|rank| {
                    let launch = launch(rank, num_workers, &master);
                    scope.spawn(move || TcpCollective::join_with(&launch, TIMEOUT, silence, &[]))
                })
                .collect();
            let joined = joining
                .into_iter()
                .map(|worker| worker.join().expect("no panic"));
            joined.map(|worker| worker.expect("all came")).collect()
        })
    }

    crate::collective_tests!(super::group);

    #[test]
    fn the_missing_are_named() {
        let master = meeting_point();
        let error = TcpCollective::join(&launch(0, 3, &master), Duration::from_millis(50));
        let error = error.expect_err("nobody came");
        let Error::Rendezvous { source, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(source.to_string(), "workers [1, 2] did not come");
        assert!(error.is_retryable());
    }

    /// The first worker evaluates, or writes a checkpoint, for more than twice as long as a silence may last.
    #[test]
    fn a_worker_that_is_busy_is_waited_for() {
        let mut workers = patient_group(2, Duration::from_secs(1));
        let (mut second, mut first) = (workers.remove(1), workers.remove(0));
        let words = first.0.link(1).words();
        let began = Instant::now();
        thread::scope(|scope| {
            let waiting = scope.spawn(move || second.exchange(b"done?"));
            while words() < 13 && !waiting.is_finished() {
                thread::yield_now();
            }
            assert!(
                began.elapsed() > Duration::from_secs(2),
                "six words a second"
            );
            first.exchange(b"done").expect("the other one waits");
            let heard = waiting.join().expect("no panic").expect("it waited");
            assert_eq!(heard, [b"done".to_vec(), b"done?".to_vec()]);
        });
    }

    /// Its connections are open, but nobody reads them or says a word, as on a machine that is gone.
    #[test]
    fn a_worker_that_stands_still_is_noticed() {
        let master = meeting_point();
        let silence = Duration::from_millis(300);
        thread::scope(|scope| {
            let (first, second) = (launch(0, 2, &master), launch(1, 2, &master));
            let still = scope.spawn(move || {
                let meeting = Meeting {
                    rank: 0,
                    num_workers: 2,
                    deadline: Instant::now() + TIMEOUT,
                    cancels: Vec::new(),
                };
                meeting.host(&first.master)
            });
            let mut worker =
                TcpCollective::join_with(&second, TIMEOUT, silence, &[]).expect("both came");
            let still = still.join().expect("no panic").expect("both came");
            // As many bytes as no connection holds for one that does not read.
            let error = worker
                .sum(&mut vec![1.0; 16 << 20])
                .expect_err("nobody there");
            let Error::Worker { rank: 0, source } = &error else {
                panic!("{error}");
            };
            let source = source.to_string();
            assert!(source.contains("no word for 300ms"), "{source}");
            drop(still);
        });
    }

    #[test]
    fn workers_of_two_groups_refuse_each_other() {
        let master = meeting_point();
        let [first, second] = thread::scope(|scope| {
            let join = |rank, count| {
                let launch = launch(rank, count, &master);
                scope.spawn(move || TcpCollective::join(&launch, TIMEOUT))
            };
            [join(0, 2), join(1, 3)].map(|worker| worker.join().expect("no panic"))
        });
        for worker in [first, second] {
            let error = worker.expect_err("another number of workers");
            let source = std::error::Error::source(&error)
                .expect("a reason")
                .to_string();
            assert_eq!(source, "worker 1 counts 3 workers, worker 0 2");
        }
    }

    #[test]
    fn who_is_no_worker_is_not_let_in() {
        let master = meeting_point();
        let workers = thread::scope(|scope| {
            let join = |rank| {
                let launch = launch(rank, 2, &master);
                scope.spawn(move || TcpCollective::join(&launch, TIMEOUT))
            };
            let first = join(0);
            let meeting = Meeting {
                rank: 1,
                num_workers: 2,
                deadline: Instant::now() + TIMEOUT,
                cancels: Vec::new(),
            };
            let mut stranger = meeting.connect(&*master).expect("it listens");
            stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
            [first, join(1)].map(|worker| worker.join().expect("no panic"))
        });
        assert!(workers.iter().all(Result::is_ok));
    }
}
