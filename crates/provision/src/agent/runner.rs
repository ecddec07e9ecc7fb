//! The agent's loop: start what is due, notice what has ended, end the node when it is idle.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;

use super::idle::has_sessions;
use super::peers::{Heard, Peers, Standing};
use super::queue::{JobRow, Queue, QueueStatus, Started};
use super::wrapper::{self, Claim};
use crate::error::{BoxError, Error, Result};
use crate::groups;
use crate::provider::Lease;

/// How often new jobs, cancels and adopted jobs are looked for.
const TICK: Duration = Duration::from_millis(100);

/// How often idleness is judged and written down.
const IDLE_TICK: Duration = Duration::from_secs(1);

/// How long a cancelled job may take to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// How long the agent waits after something went wrong before it looks again.
const AGAIN: Duration = Duration::from_millis(500);

/// The longest pause between attempts to end the node.
const END_AGAIN: Duration = Duration::from_secs(60);

/// How many seconds it takes at most until a node has heard of the others.
const SETTLE: i64 = 5;

/// How often a job's processes are tried to be started.
const STARTS: i64 = 5;

/// How long a claim may be without a name before its writer counts as dead.
const NAMING: Duration = Duration::from_secs(2);

/// How long a job waits between its setup and its commands for nodes that were never heard of.
const ALONE: Duration = Duration::from_secs(15);

/// The one process that runs a node's jobs.
#[derive(Debug)]
pub struct Agent {
    queue: Queue,
    boot: String,
    gpus: u32,
    slots: usize,
    /// Job by job, when it was asked to end.
    ending: HashMap<i64, Instant>,
    unnamed: HashMap<i64, Instant>,
    /// By number on the head, since when a job waits for the other nodes.
    gathering: HashMap<i64, Instant>,
    /// The wrappers of this process that have not ended.
    spawned: HashSet<i64>,
    ended: (Sender<i64>, Receiver<i64>),
    /// Where the node's process groups are recorded.
    groups: Option<PathBuf>,
    peers: Option<Peers>,
    others_work: bool,
    /// The next attempt to end the node, and the pause after that.
    end: (Instant, Duration),
    _lock: File,
}

impl Agent {
    /// Takes over the queue in `dir`; `None` if another agent has it.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::State`].
    pub fn take(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let queue = Queue::open(&dir)?;
        let path = queue.dir().join("agent.lock");
        let lock = File::create(&path).map_err(Error::io(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(Error::io(path)(error)),
        }
        let number = |name: &str| -> Result<Option<usize>> {
            Ok(queue.setting(name)?.and_then(|text| text.parse().ok()))
        };
        // An agent that the machine itself has started is told by nobody else.
        let groups = match std::env::var_os(groups::FOLDER) {
            Some(groups) => Some(PathBuf::from(groups)),
            None => queue.setting("groups")?.map(PathBuf::from),
        };
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Some(Self {
            gpus: number("gpus")?
                .and_then(|gpus| u32::try_from(gpus).ok())
                .unwrap_or(0),
            // As SkyPilot has it: a job that asks for no accelerator counts as half a CPU.
            slots: number("slots")?.unwrap_or(2 * cpus),
            boot: boot_id(),
            queue,
            ending: HashMap::new(),
            unnamed: HashMap::new(),
            gathering: HashMap::new(),
            spawned: HashSet::new(),
            ended: mpsc::channel(),
            groups,
            peers: None,
            others_work: false,
            end: (Instant::now(), AGAIN),
            _lock: lock,
        }))
    }

    /// Runs jobs until the node ends itself; then runs the node's own command for that and returns.
    /// Whatever else goes wrong is said to `about`, and tried again.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::State`]: the folder of the queue is gone.
    pub fn run(mut self, about: &mut dyn Write) -> Result<()> {
        let mut judged = Instant::now();
        let mut said = String::new();
        loop {
            match self.turn(&mut judged) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if !self.queue.is_there() => return Err(error),
                Err(error) => {
                    let text = error.with_causes();
                    if text != said {
                        let _ = writeln!(about, "{}: {text}; trying again", now()); // nobody may read it
                        said = text;
                    }
                    std::thread::sleep(AGAIN);
                }
            }
        }
    }

    /// One turn; says whether the node has ended.
    fn turn(&mut self, judged: &mut Instant) -> Result<bool> {
        // What stands in a job's way must not keep the node from ending.
        let looked = self.look();
        let tick = match self.gathering.is_empty() {
            true => IDLE_TICK,
            false => 2 * TICK,
        };
        if judged.elapsed() >= tick {
            *judged = Instant::now();
            // Open files outlive their folder: nothing else would tell.
            if !self.queue.is_there() {
                let gone = std::io::ErrorKind::NotFound.into();
                return Err(Error::io(self.queue.dir())(gone));
            }
            let met = self.meet();
            if self.is_over()? && self.end.0 <= Instant::now() {
                let pause = self.end.1;
                self.end = (Instant::now() + pause, (2 * pause).min(END_AGAIN));
                return self.end_node().map(|()| true);
            }
            met?;
            if let Some(groups) = &self.groups {
                groups::prune(groups)?;
            }
        }
        let wait = if looked? { Duration::ZERO } else { TICK };
        match self.ended.1.recv_timeout(wait) {
            Ok(id) => drop(self.spawned.remove(&id)),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        Ok(false)
    }

    /// One look at everything; says whether a job has ended.
    fn look(&mut self) -> Result<bool> {
        let started = self.queue.started()?;
        let mut running = 0;
        let mut taken = BTreeSet::new();
        for job in &started {
            if !self.watch(job)? {
                running += 1;
                taken.extend(wrapper::devices(&self.queue.job_dir(job.id)));
            }
        }
        let finished = running < started.len();
        // Strictly in order: a job that does not fit holds back those behind it.
        while running < self.slots {
            match self.queue.next()? {
                Some((id, wanted)) if wanted as usize + taken.len() <= self.gpus as usize => {
                    let free = (0..self.gpus).filter(|device| !taken.contains(device));
                    let devices: Vec<u32> = free.take(wanted as usize).collect();
                    wrapper::assign(&self.queue.job_dir(id), &devices)?;
                    running += 1;
                    taken.extend(devices);
                    self.start(id)?;
                }
                Some((id, wanted)) if wanted > self.gpus => {
                    tracing::warn!(
                        id,
                        wanted,
                        have = self.gpus,
                        "a job asks for more than the node has"
                    );
                    let log = format!(
                        "this node has {} accelerators, the job asks for {wanted}\n",
                        self.gpus
                    );
                    let path = self.queue.log(id);
                    std::fs::write(&path, log).map_err(Error::io(path))?;
                    self.queue
                        .finish(id, QueueStatus::FailedSetup, None, now())?;
                }
                _ => break,
            }
        }
        Ok(finished)
    }

    /// Sees to a started job; says whether it has ended.
    fn watch(&mut self, job: &Started) -> Result<bool> {
        let dir = self.queue.job_dir(job.id);
        let claim = wrapper::claim(&dir, job.attempt);
        if let Some((status, code, when)) = wrapper::outcome(&dir) {
            let cancelled = self.ending.remove(&job.id).is_some();
            let status = match status {
                QueueStatus::Failed | QueueStatus::FailedSetup if cancelled => {
                    QueueStatus::Cancelled
                }
                status => status,
            };
            self.queue.finish(job.id, status, Some(code), when)?;
            return Ok(true);
        }
        if wrapper::is_running(&dir) {
            self.queue.running(job.id)?;
        }
        if job.boot != self.boot {
            return self.lost(job, &dir);
        }
        match claim {
            // The agent that started it was killed before the wrapper came to life.
            Claim::None if !self.spawned.contains(&job.id) && wrapper::void(&dir, job.attempt) => {
                self.queue.unclaim(job.id)?;
                Ok(true)
            }
            Claim::None => Ok(false),
            Claim::Unnamed => {
                let since = *self.unnamed.entry(job.id).or_insert_with(Instant::now);
                if since.elapsed() < NAMING {
                    return Ok(false);
                }
                self.unnamed.remove(&job.id);
                self.lost(job, &dir)
            }
            Claim::By(pid, start) => {
                let leads = groups::start_time(pid).is_some_and(|now| now == start);
                if job.cancel {
                    self.cancel(job.id, pid);
                }
                if leads || wrapper::outcome(&dir).is_some() {
                    return Ok(false);
                }
                // The wrapper is gone without a word: killed. What it left behind goes too, after the
                // time it has to end by itself where it was asked to.
                if !groups::is_empty(pid) {
                    let asked = self.ending.get(&job.id);
                    if asked.is_none_or(|asked| asked.elapsed() >= GRACE) {
                        groups::signal(pid, Signal::KILL);
                    }
                    return Ok(false);
                }
                self.lost(job, &dir)
            }
        }
    }

    /// The job's processes are gone and said nothing.
    fn lost(&mut self, job: &Started, dir: &Path) -> Result<bool> {
        let status = match self.ending.remove(&job.id).is_some() || job.cancel {
            true => QueueStatus::Cancelled,
            false => QueueStatus::FailedDriver,
        };
        let _ = std::fs::remove_file(dir.join("env")); // it may be gone with the wrapper's end
        self.queue.finish(job.id, status, None, now())?;
        Ok(true)
    }

    fn cancel(&mut self, id: i64, pid: i32) {
        match self.ending.get(&id) {
            None => {
                self.ending.insert(id, Instant::now());
                groups::signal(pid, Signal::TERM);
            }
            Some(asked) if asked.elapsed() >= GRACE => groups::signal(pid, Signal::KILL),
            Some(_) => {}
        }
    }

    fn start(&mut self, id: i64) -> Result<()> {
        let Some(attempt) = self.queue.claim(id, &self.boot, now())? else {
            return Ok(()); // cancelled in this moment
        };
        let spawned = self.spawn(id, attempt);
        if spawned.is_err() && attempt >= STARTS {
            self.queue
                .finish(id, QueueStatus::FailedDriver, None, now())?;
        }
        spawned
    }

    fn spawn(&mut self, id: i64, attempt: i64) -> Result<()> {
        let dir = self.queue.job_dir(id);
        let log_path = self.queue.log(id);
        let log = OpenOptions::new().append(true).create(true).open(&log_path);
        let log = log.map_err(Error::io(&log_path))?;
        let errors = log.try_clone().map_err(Error::io(&log_path))?;
        let mut command = Command::new("bash");
        command.args(["-c", wrapper::SCRIPT, "updraft-job"]);
        command.arg(absolute(&dir)?).arg(attempt.to_string());
        command.current_dir(self.home()?);
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        // A group of its own: it outlives the agent, and ends as a whole.
        command.process_group(0);
        let mut child = command.spawn().map_err(|source| Error::Transport {
            host: "this node".to_owned(),
            source: source.into(),
        })?;
        self.spawned.insert(id);
        let ended = self.ended.0.clone();
        std::thread::spawn(move || {
            let _ = child.wait(); // the wrapper's file says how it went
            let _ = ended.send(id); // the agent may be on its way out
        });
        Ok(())
    }

    /// The folder that relative paths mean: the one the agent's own folder is in.
    fn home(&self) -> Result<PathBuf> {
        let dir = absolute(self.queue.dir())?;
        Ok(dir.parent().map_or(dir.clone(), Path::to_path_buf))
    }

    fn is_over(&mut self) -> Result<bool> {
        let Some(lease) = self.queue.lease()? else {
            return Ok(false);
        };
        let now = now();
        if self.works(lease)? || self.others_work {
            self.queue.touch(now)?;
            return Ok(false);
        }
        if self.queue.is_held(now)? {
            return Ok(false);
        }
        // A node whose agent was down has not been seen idle: the time is taken from its record.
        match self.queue.last_active()? {
            // Others have a moment to say that they work, before this one is idle.
            Some(last) if self.peers.is_some() => Ok(lease.is_over(last + SETTLE, now)),
            Some(last) => Ok(lease.is_over(last, now)),
            None => self.queue.touch(now).map(|()| false),
        }
    }

    fn works(&self, lease: Lease) -> Result<bool> {
        let unfinished = self.queue.next()?.is_some() || !self.queue.started()?.is_empty();
        let held = self.queue.is_held(now())?;
        Ok(lease.is_busy(unfinished || held, has_sessions()))
    }

    /// Says to the other nodes of the cluster how this one stands, and hears of them. Jobs that have
    /// failed on one of them are cancelled here.
    fn meet(&mut self) -> Result<()> {
        self.others_work = false;
        let place = self.queue.place()?;
        if self.peers.as_ref().map(Peers::place) != place.as_ref() {
            self.peers = None; // its port may be wanted again
            self.peers = place.map(Peers::at).transpose()?;
        }
        let jobs = self.queue.recent()?;
        let open = jobs.iter().filter(|job| !job.status.is_final());
        let gathering = open.filter_map(|job| {
            let nodes = wrapper::gathering(&self.queue.job_dir(job.id))?;
            Some((job.head, nodes))
        });
        let gathering: BTreeMap<i64, u32> = gathering.collect();
        let heard = match &self.peers {
            Some(peers) => {
                let busy = match self.queue.lease()? {
                    Some(lease) => self.works(lease)?,
                    None => false,
                };
                let own = Standing {
                    busy,
                    jobs: jobs.iter().map(|job| (job.head, job.status)).collect(),
                    ready: gathering.keys().copied().collect(),
                };
                peers.exchange(own, &gathering)
            }
            None => Heard::default(),
        };
        self.others_work = heard.busy;
        for job in &jobs {
            if !job.status.is_final() && heard.failed.contains(&job.head) {
                self.queue.cancel(Some(job.head), now())?;
            }
        }
        self.gather(&jobs, &gathering, &heard)
    }

    /// Lets the jobs go on that every node is through with the setup of. Where the other nodes cannot be
    /// heard, each begins by itself.
    fn gather(
        &mut self,
        jobs: &[JobRow],
        gathering: &BTreeMap<i64, u32>,
        heard: &Heard,
    ) -> Result<()> {
        self.gathering.retain(|id, _| gathering.contains_key(id));
        for job in jobs {
            let Some(nodes) = gathering.get(&job.head) else {
                continue;
            };
            let since = *self.gathering.entry(job.head).or_insert_with(Instant::now);
            let is_alone = self
                .peers
                .as_ref()
                .is_none_or(|peers| peers.is_alone(*nodes));
            if heard.go.contains(&job.head) || is_alone && since.elapsed() >= ALONE {
                wrapper::let_go(&self.queue.job_dir(job.id))?;
            }
        }
        Ok(())
    }

    /// Ends everything that still runs, then the node: what runs on a node that is gone is forgotten.
    fn end_node(&self) -> Result<()> {
        let down = self.queue.lease()?.is_some_and(|lease| lease.down);
        let name = if down { "end_down" } else { "end_stop" };
        let script = self.queue.setting(name)?.unwrap_or_default();
        tracing::info!(down, "idle for as long as it may be; this node ends itself");
        self.end_jobs()?;
        let mut command = Command::new("bash");
        let output = command.arg("-c").arg(&script).current_dir("/").output();
        let failed = |source: BoxError| Error::Transport {
            host: "this node".to_owned(),
            source,
        };
        let output = output.map_err(|error| failed(error.into()))?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let said = String::from_utf8_lossy(&output.stderr);
                let said = format!("its own end failed, {}: {}", output.status, said.trim());
                Err(failed(said.into()))
            }
        }
    }

    fn end_jobs(&self) -> Result<()> {
        let asked = Instant::now();
        let mut signal = Some(Signal::TERM);
        loop {
            let mut left = false;
            for job in self.queue.started()? {
                let dir = self.queue.job_dir(job.id);
                match wrapper::claim(&dir, job.attempt) {
                    // A wrapper that comes later finds its claim taken.
                    Claim::None => drop(wrapper::void(&dir, job.attempt)),
                    Claim::Unnamed => left |= asked.elapsed() < NAMING,
                    Claim::By(pid, _)
                        if wrapper::outcome(&dir).is_some() || groups::is_empty(pid) => {}
                    // Found below, by its mark.
                    Claim::By(..) if self.groups.is_some() => {}
                    Claim::By(pid, _) => {
                        if let Some(signal) = signal {
                            groups::signal(pid, signal);
                        }
                        left = true;
                    }
                }
            }
            // What earlier jobs have left running; this process is in a group of its own, or alone.
            if let Some(groups) = &self.groups {
                let own = rustix::process::getpgrp().as_raw_nonzero().get();
                for ours in groups::ours(groups, Some(own))? {
                    if let Some(signal) = signal {
                        ours.signal(signal);
                    }
                    left = true;
                }
            }
            if !left || asked.elapsed() >= 2 * GRACE {
                return Ok(());
            }
            // Asked once, so that what ends in good order is not asked again; then ended.
            signal = (asked.elapsed() >= GRACE).then_some(Signal::KILL);
            std::thread::sleep(TICK);
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(Error::io(path))
}

/// Changes whenever the machine is started.
fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // Tests pretend a reboot; nothing else sets this.
    std::env::var("UPDRAFT_BOOT_ID")
        .unwrap_or(id)
        .trim()
        .to_owned()
}

pub(super) fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
