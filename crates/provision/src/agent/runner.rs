//! The agent's loop: start what is due, notice what has ended, end the node when it is idle.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;

use super::idle::has_sessions;
use super::queue::{Queue, QueueStatus, Started};
use super::wrapper::{self, Claim};
use crate::error::{Error, Result};
use crate::groups;

/// How often new jobs, cancels and adopted jobs are looked for.
const TICK: Duration = Duration::from_millis(100);

/// How often idleness is judged and written down.
const IDLE_TICK: Duration = Duration::from_secs(1);

/// How long a cancelled job may take to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// How long a claim may be without a name before its writer counts as dead.
const NAMING: Duration = Duration::from_secs(2);

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
    /// The wrappers of this process that have not ended.
    spawned: HashSet<i64>,
    ended: (Sender<i64>, Receiver<i64>),
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
            spawned: HashSet::new(),
            ended: mpsc::channel(),
            _lock: lock,
        }))
    }

    /// Runs jobs until the node ends itself; then runs the node's own command for that and returns.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::State`]: the folder of the queue is gone or broken.
    pub fn run(mut self) -> Result<()> {
        let mut judged = Instant::now();
        loop {
            let finished = self.look()?;
            if judged.elapsed() >= IDLE_TICK {
                judged = Instant::now();
                if self.is_over()? {
                    return self.end_node();
                }
            }
            let wait = if finished { Duration::ZERO } else { TICK };
            match self.ended.1.recv_timeout(wait) {
                Ok(id) => drop(self.spawned.remove(&id)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
    }

    /// One look at everything; says whether a job has ended.
    fn look(&mut self) -> Result<bool> {
        let started = self.queue.started()?;
        let mut running = 0;
        let mut gpus = 0;
        for job in &started {
            if !self.watch(job)? {
                running += 1;
                gpus += self.queue.job(job.id)?.map_or(0, |job| job.gpus);
            }
        }
        let finished = running < started.len();
        // Strictly in order: a job that does not fit holds back those behind it.
        while running < self.slots {
            match self.queue.next()? {
                Some((id, wanted)) if gpus + wanted <= self.gpus || wanted == 0 => {
                    running += 1;
                    gpus += wanted;
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
                // The wrapper is gone without a word: killed. What it left behind goes too.
                if !groups::is_empty(pid) {
                    groups::signal(pid, Signal::KILL);
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
        let unfinished = self.queue.next()?.is_some() || !self.queue.started()?.is_empty();
        let now = now();
        let held = self.queue.is_held(now)?;
        if lease.is_busy(unfinished || held, has_sessions()) {
            self.queue.touch(now)?;
            return Ok(false);
        }
        if held {
            return Ok(false);
        }
        // A node whose agent was down has not been seen idle: the time is taken from its record.
        match self.queue.last_active()? {
            Some(last) => Ok(lease.is_over(last, now)),
            None => self.queue.touch(now).map(|()| false),
        }
    }

    /// Ends the jobs that still run, then the node: what runs on a node that is gone is forgotten.
    fn end_node(&self) -> Result<()> {
        let down = self.queue.lease()?.is_some_and(|lease| lease.down);
        let name = if down { "end_down" } else { "end_stop" };
        let script = self.queue.setting(name)?.unwrap_or_default();
        tracing::info!(down, "idle for as long as it may be; this node ends itself");
        self.end_jobs()?;
        let mut command = Command::new("bash");
        let status = command.arg("-c").arg(&script).current_dir("/").status();
        status.map(drop).map_err(|source| Error::Transport {
            host: "this node".to_owned(),
            source: source.into(),
        })
    }

    fn end_jobs(&self) -> Result<()> {
        let asked = Instant::now();
        let mut signal = Signal::TERM;
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
                    Claim::By(pid, _) => {
                        groups::signal(pid, signal);
                        left = true;
                    }
                }
            }
            if !left || asked.elapsed() >= 2 * GRACE {
                return Ok(());
            }
            if asked.elapsed() >= GRACE {
                signal = Signal::KILL;
            }
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
