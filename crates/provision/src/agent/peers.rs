//! What the agents of a cluster tell each other, so that no node ends while another works for it.
//!
//! Every node but the head connects to the head's agent once a second, proves by a secret that it
//! belongs there, and tells whether it is busy and how its parts of jobs stand; it hears whether anybody
//! else is busy, and which jobs are over because a part of them has failed. Where no connection can be
//! made, each node is as if it were alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::queue::QueueStatus;
use crate::error::{Error, Result};

/// How often a node speaks to the head.
const EVERY: Duration = Duration::from_secs(1);

/// How long an answer may take, and how long what was said stays true.
const TIMEOUT: Duration = Duration::from_secs(5);
const VALID: Duration = Duration::from_secs(15);

/// How long a node may be silent before its parts of jobs count as lost.
const LOST: Duration = Duration::from_secs(600);

/// The longest message, and how many are read at once: anybody may connect.
const MAX_BYTES: u64 = 256 * 1024;
const MAX_OPEN: usize = 64;

/// How often the head looks for a connection.
const ACCEPT: Duration = Duration::from_millis(50);

/// Where the head of a cluster listens, and what it must be told.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The port.
    pub port: u16,
    /// What only nodes of the cluster know.
    pub secret: String,
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Head")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// The place of a node in its cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// It is the first, and listens to the others.
    Head {
        /// The address to listen at.
        bind: IpAddr,
        /// Its port and secret.
        head: Head,
    },
    /// It is another.
    Member {
        /// The head's address.
        address: String,
        /// The head's port and secret.
        head: Head,
        /// Its rank.
        rank: u32,
    },
}

/// How a node stands.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Standing {
    /// Whether it must not end.
    pub(super) busy: bool,
    /// Its parts of jobs, by their numbers on the head.
    pub(super) jobs: BTreeMap<i64, QueueStatus>,
    /// Those that are through with their setup and wait for the other nodes.
    #[serde(default)]
    pub(super) ready: BTreeSet<i64>,
}

impl Standing {
    /// Whether its part of a job has come to the job's commands, or is about to.
    fn is_through(&self, id: i64) -> bool {
        use QueueStatus::{Running, Succeeded};
        self.ready.contains(&id) || matches!(self.jobs.get(&id), Some(Running | Succeeded))
    }

    fn unfinished(&self) -> impl Iterator<Item = i64> {
        let open = self.jobs.iter().filter(|(_, status)| !status.is_final());
        open.map(|(id, _)| *id)
    }

    fn failed(&self) -> impl Iterator<Item = i64> {
        let failed = self
            .jobs
            .iter()
            .filter(|(_, status)| status.is_final() && **status != QueueStatus::Succeeded);
        failed.map(|(id, _)| *id)
    }
}

/// What a node tells the head.
#[derive(Serialize, Deserialize)]
struct Report {
    secret: String,
    rank: u32,
    standing: Standing,
}

/// What a node hears of all the others.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Heard {
    /// Whether one of them must not end.
    pub(super) busy: bool,
    /// The jobs a part of which has failed or was cancelled.
    pub(super) failed: BTreeSet<i64>,
    /// The jobs whose commands may begin: every node is through with their setup.
    #[serde(default)]
    pub(super) go: BTreeSet<i64>,
}

/// What one knows: of all others on the head, of the head elsewhere.
#[derive(Debug, Default)]
struct Known {
    own: Standing,
    ranks: BTreeMap<u32, (Instant, Standing)>,
    head: Option<(Instant, Heard)>,
}

impl Known {
    /// What the head hears of the others.
    fn of_members(&self, now: Instant) -> Heard {
        let mut heard = Heard::default();
        for (when, standing) in self.ranks.values() {
            let silent = now.duration_since(*when);
            heard.busy |= standing.busy && silent < VALID;
            heard.failed.extend(standing.failed());
            if silent > LOST {
                heard.failed.extend(standing.unfinished());
            }
        }
        heard
    }

    /// What the head answers a node: what it hears itself, and how it stands itself.
    fn answer(&self, asked: &Standing, now: Instant) -> Heard {
        let mut heard = self.of_members(now);
        heard.busy |= self.own.busy;
        heard.failed.extend(self.own.failed());
        // The head goes first: where it has, everybody may.
        let begun = |id: &&i64| self.own.is_through(**id) && !self.own.ready.contains(id);
        heard.go = asked.ready.iter().filter(begun).copied().collect();
        // Only what can still be ended matters.
        let open: BTreeSet<i64> = asked.unfinished().collect();
        heard.failed.retain(|id| open.contains(id));
        heard
    }

    /// Whether every other node of a job of so many is through with its setup.
    fn has_gathered(&self, id: i64, nodes: u32) -> bool {
        (1..nodes).all(|rank| {
            let standing = self.ranks.get(&rank);
            standing.is_some_and(|(_, standing)| standing.is_through(id))
        })
    }

    /// What another node has heard of the head.
    fn of_head(&self, now: Instant) -> Heard {
        let Some((when, heard)) = &self.head else {
            return Heard::default();
        };
        let silent = now.duration_since(*when);
        let mut heard = heard.clone();
        heard.busy &= silent < VALID;
        if silent > LOST {
            heard.failed.extend(self.own.unfinished());
        }
        heard
    }
}

/// The other nodes of this node's cluster.
#[derive(Debug)]
pub(super) struct Peers {
    place: Place,
    known: Arc<Mutex<Known>>,
    gone: Arc<AtomicBool>,
}

impl Peers {
    /// Begins to listen, or to speak.
    ///
    /// # Errors
    /// [`Error::Transport`] if the port is taken.
    pub(super) fn at(place: Place) -> Result<Self> {
        let known = Arc::new(Mutex::new(Known::default()));
        let gone = Arc::new(AtomicBool::new(false));
        let (of, until) = (known.clone(), gone.clone());
        match place.clone() {
            Place::Head { bind, head } => {
                let listener = TcpListener::bind((bind, head.port)).and_then(|listener| {
                    listener.set_nonblocking(true)?;
                    Ok(listener)
                });
                let listener = listener.map_err(|source| Error::Transport {
                    host: format!("{bind}:{}", head.port),
                    source: source.into(),
                })?;
                std::thread::spawn(move || listen(&listener, &head.secret, &of, &until));
            }
            Place::Member {
                address,
                head,
                rank,
            } => {
                std::thread::spawn(move || speak(&address, &head, rank, &of, &until));
            }
        }
        Ok(Self { place, known, gone })
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Tells the others how this node stands; says what it hears of them. `gathering` are its jobs that
    /// wait for the other nodes, with how many there are of them all.
    pub(super) fn exchange(&self, own: Standing, gathering: &BTreeMap<i64, u32>) -> Heard {
        let mut known = lock(&self.known);
        known.own = own;
        match &self.place {
            Place::Head { .. } => {
                let mut heard = known.of_members(Instant::now());
                let gathered = |(id, nodes): &(&i64, &u32)| known.has_gathered(**id, **nodes);
                heard.go = gathering
                    .iter()
                    .filter(gathered)
                    .map(|(id, _)| *id)
                    .collect();
                heard
            }
            Place::Member { .. } => known.of_head(Instant::now()),
        }
    }

    /// Whether one of so many nodes has never been heard of: it may be out of reach for good.
    pub(super) fn is_alone(&self, nodes: u32) -> bool {
        let known = lock(&self.known);
        match &self.place {
            Place::Head { .. } => (1..nodes).any(|rank| !known.ranks.contains_key(&rank)),
            Place::Member { .. } => known.head.is_none(),
        }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}

fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen(listener: &TcpListener, secret: &str, known: &Arc<Mutex<Known>>, gone: &AtomicBool) {
    let open = Arc::new(AtomicUsize::new(0));
    while !gone.load(Ordering::Relaxed) {
        // Nobody there, or out of files: both pass.
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(ACCEPT);
            continue;
        };
        if open.load(Ordering::Relaxed) >= MAX_OPEN {
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (open, known, secret) = (open.clone(), known.clone(), secret.to_owned());
        std::thread::spawn(move || {
            if let Err(error) = hear(stream, &secret, &known) {
                tracing::debug!(%error, "a node was cut off");
            }
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// One report and its answer; who does not know the secret gets none.
fn hear(stream: TcpStream, secret: &str, known: &Mutex<Known>) -> std::io::Result<()> {
    let (mut stream, line) = read_line(stream)?;
    let Ok(report) = serde_json::from_str::<Report>(&line) else {
        return Ok(());
    };
    if report.secret != secret {
        return Ok(());
    }
    let now = Instant::now();
    let answer = {
        let mut known = lock(known);
        known
            .ranks
            .insert(report.rank, (now, report.standing.clone()));
        known.answer(&report.standing, now)
    };
    let answer = serde_json::to_string(&answer).unwrap_or_default();
    writeln!(stream, "{answer}")
}

fn speak(address: &str, head: &Head, rank: u32, known: &Mutex<Known>, gone: &AtomicBool) {
    while !gone.load(Ordering::Relaxed) {
        let report = Report {
            secret: head.secret.clone(),
            rank,
            standing: lock(known).own.clone(),
        };
        match ask(address, head.port, &report) {
            Ok(heard) => lock(known).head = Some((Instant::now(), heard)),
            Err(error) => tracing::debug!(%error, "the head does not answer"),
        }
        // The others wait for what this node says, or it for them.
        let waits = !report.standing.ready.is_empty();
        std::thread::sleep(if waits { EVERY / 5 } else { EVERY });
    }
}

fn ask(address: &str, port: u16, report: &Report) -> std::io::Result<Heard> {
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for address in (address, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(mut stream) => {
                stream.set_write_timeout(Some(TIMEOUT))?;
                let text = serde_json::to_string(report).unwrap_or_default();
                writeln!(stream, "{text}")?;
                let (_, line) = read_line(stream)?;
                return serde_json::from_str(&line).map_err(Into::into);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn read_line(stream: TcpStream) -> std::io::Result<(TcpStream, String)> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut line = String::new();
    BufReader::new((&stream).take(MAX_BYTES)).read_line(&mut line)?;
    Ok((stream, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(busy: bool, jobs: &[(i64, QueueStatus)]) -> Standing {
        Standing {
            busy,
            jobs: jobs.iter().copied().collect(),
            ready: BTreeSet::new(),
        }
    }

    #[test]
    fn a_part_that_failed_ends_the_job_everywhere() {
        use QueueStatus::{Failed, Running, Succeeded};
        let now = Instant::now();
        let mut known = Known {
            own: standing(false, &[(1, Succeeded), (2, Running)]),
            ..Known::default()
        };
        known
            .ranks
            .insert(1, (now, standing(false, &[(1, Running), (2, Failed)])));
        known
            .ranks
            .insert(2, (now, standing(true, &[(1, Running), (2, Running)])));
        assert_eq!(known.of_members(now).failed, [2].into());
        let second = known.ranks[&2].1.clone();
        let answer = known.answer(&second, now);
        assert_eq!((answer.busy, answer.failed), (true, [2].into()));
        let first = known.ranks[&1].1.clone();
        assert!(known.answer(&first, now).failed.is_empty(), "it has ended");
    }

    #[test]
    fn commands_begin_when_every_node_is_through_with_its_setup() {
        use QueueStatus::{Running, SettingUp};
        let now = Instant::now();
        let ready = |status: QueueStatus, ready: &[i64]| Standing {
            ready: ready.iter().copied().collect(),
            ..standing(true, &[(7, status)])
        };
        let mut known = Known {
            own: ready(SettingUp, &[7]),
            ..Known::default()
        };
        known.ranks.insert(1, (now, ready(SettingUp, &[7])));
        assert!(known.has_gathered(7, 2));
        assert!(!known.has_gathered(7, 3), "nobody has heard of the third");
        known.ranks.insert(2, (now, ready(SettingUp, &[])));
        assert!(!known.has_gathered(7, 3), "the third still sets up");
        // The others go when the head has gone.
        let asks = ready(SettingUp, &[7]);
        assert_eq!(known.answer(&asks, now).go, [].into());
        known.own = ready(Running, &[]);
        assert_eq!(known.answer(&asks, now).go, [7].into());
        assert_eq!(known.answer(&ready(SettingUp, &[]), now).go, [].into());
    }

    #[test]
    fn who_is_silent_is_not_busy_and_at_last_lost() {
        let now = Instant::now();
        let mut known = Known::default();
        let busy = standing(true, &[(1, QueueStatus::Running)]);
        known.ranks.insert(1, (now, busy.clone()));
        assert!(known.of_members(now).busy);
        assert!(!known.of_members(now + VALID).busy);
        assert!(known.of_members(now + VALID).failed.is_empty());
        let lost = now + LOST + EVERY;
        assert_eq!(known.of_members(lost).failed, [1].into());
        // The same for one that no longer hears of its head; one that never has is alone.
        let mut member = Known {
            own: busy,
            ..Known::default()
        };
        assert_eq!(member.of_head(lost), Heard::default());
        let said = Heard {
            busy: true,
            ..Heard::default()
        };
        member.head = Some((now, said));
        assert!(member.of_head(now).busy);
        assert!(!member.of_head(now + VALID).busy);
        assert_eq!(member.of_head(lost).failed, [1].into());
    }

    #[test]
    fn only_who_knows_the_secret_is_heard() {
        let bind = IpAddr::from([127, 0, 0, 1]);
        let port = TcpListener::bind((bind, 0))
            .and_then(|bound| bound.local_addr())
            .expect("a free port")
            .port();
        let head = Head {
            port,
            secret: "right".into(),
        };
        let peers = Peers::at(Place::Head { bind, head }).expect("listens");
        let report = |secret: &str| Report {
            secret: secret.into(),
            rank: 1,
            standing: standing(true, &[]),
        };
        assert!(ask("127.0.0.1", port, &report("wrong")).is_err());
        assert!(!peers.exchange(Standing::default(), &BTreeMap::new()).busy);
        ask("127.0.0.1", port, &report("right")).expect("heard");
        assert!(peers.exchange(Standing::default(), &BTreeMap::new()).busy);
    }
}
