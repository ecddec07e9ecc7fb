//! Process groups, recorded so that nobody's are ever ended but ours.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};

use crate::error::{Error, Result};

/// The variable that tells a command where its instance records process groups. Whatever a command
/// starts inherits it, and is known by it where it has left its group.
pub(crate) const FOLDER: &str = "UPDRAFT_GROUPS";

/// How often a group that was asked to end is looked at.
const POLL: Duration = Duration::from_millis(20);

/// How long after SIGKILL a process counts as one that nobody can end.
const STUCK: Duration = Duration::from_secs(5);

/// Records that the process `pid` leads a group of the instance in `dir`.
///
/// The record carries the process's start time: a pid that the system has given to somebody else
/// since then does not match it.
pub(crate) fn record(dir: &Path, pid: i32) -> Result<PathBuf> {
    let groups = dir.join("groups");
    match std::fs::create_dir(&groups) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io(groups)(error));
        }
        _ => {}
    }
    let path = groups.join(pid.to_string());
    replace(&path, start_time(pid).unwrap_or_default().as_bytes())?;
    Ok(path)
}

/// What runs of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ours {
    /// A group that was recorded.
    Group(i32),
    /// A process that has left its group and bears the instance's mark.
    Process(i32),
}

impl Ours {
    pub(crate) fn signal(self, signal: Signal) {
        match self {
            Ours::Group(group) => self::signal(group, signal),
            Ours::Process(pid) => {
                if let Some(pid) = Pid::from_raw(pid) {
                    let _ = kill_process(pid, signal); // it may have ended in this moment
                }
            }
        }
    }
}

/// Everything that runs of the instance whose groups are recorded in `groups`, but for the group
/// `except` and this process.
pub(crate) fn ours(groups: &Path, except: Option<i32>) -> Result<Vec<Ours>> {
    let records = records(groups)?;
    let running = running();
    let mut found: Vec<Ours> = Vec::new();
    for (group, recorded) in records {
        // The leader may have ended while its children run on. Then the group keeps the number,
        // and the system gives it to no new process.
        let is_ours = start_time(group).is_none_or(|now| now == recorded);
        let runs = running.iter().any(|process| process.group == group);
        if is_ours && runs && except != Some(group) {
            found.push(Ours::Group(group));
        }
    }
    let mark = format!("{FOLDER}={}", groups.display());
    for process in running {
        let is_found = found.contains(&Ours::Group(process.group));
        let is_self = u32::try_from(process.pid) == Ok(std::process::id());
        if !is_found && !is_self && except != Some(process.group) && process.bears(&mark) {
            found.push(Ours::Process(process.pid));
        }
    }
    Ok(found)
}

/// Forgets the groups that have ended, so that their numbers may be somebody else's.
#[cfg(feature = "agent")]
pub(crate) fn prune(groups: &Path) -> Result<()> {
    let records = records(groups)?;
    let running: std::collections::BTreeSet<i32> =
        running().iter().map(|process| process.group).collect();
    for (group, _) in records {
        if !running.contains(&group) {
            let _ = std::fs::remove_file(groups.join(group.to_string())); // it may be gone already
        }
    }
    Ok(())
}

/// Ends everything of the instance in `dir`: SIGTERM, then SIGKILL to what is left after `grace`.
#[cfg(feature = "local")]
pub(crate) async fn end_all(dir: &Path, grace: Duration) -> Result<()> {
    let groups = dir.join("groups");
    for ours in ours(&groups, None)? {
        ours.signal(Signal::TERM);
    }
    let asked = std::time::Instant::now();
    loop {
        let left = ours(&groups, None)?;
        if left.is_empty() || asked.elapsed() >= grace + STUCK {
            return Ok(());
        }
        if asked.elapsed() >= grace {
            left.iter().for_each(|ours| ours.signal(Signal::KILL));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Ends one group; returns when none of its processes is left.
#[cfg(feature = "local")]
pub(crate) async fn end(pid: i32, grace: Duration) {
    signal(pid, Signal::TERM);
    let asked = std::time::Instant::now();
    while !is_empty(pid) {
        if asked.elapsed() >= grace {
            signal(pid, Signal::KILL);
        }
        tokio::time::sleep(POLL).await;
        if asked.elapsed() >= grace + STUCK {
            return; // only processes in uninterruptible sleep, or zombies of another parent, remain
        }
    }
}

pub(crate) fn signal(pid: i32, signal: Signal) {
    if let Some(group) = Pid::from_raw(pid) {
        // The group may have ended by itself in this moment, which is what was asked for.
        let _ = kill_process_group(group, signal);
    }
}

/// Whether no process of the group runs any more.
///
/// A zombie has ended: it only waits for its parent, which may be a client that is busy elsewhere.
pub(crate) fn is_empty(pid: i32) -> bool {
    if Pid::from_raw(pid).is_none_or(|group| test_kill_process_group(group).is_err()) {
        return true;
    }
    !running().iter().any(|process| process.group == pid)
}

/// Writes a sibling and renames it, so that a reader sees all or nothing.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let sibling = path.with_extension(format!("tmp-{}", std::process::id()));
    std::fs::write(&sibling, bytes).map_err(Error::io(&sibling))?;
    std::fs::rename(&sibling, path).map_err(Error::io(path))
}

/// When the process was started, in clock ticks since boot; `None` when there is no such process.
pub(crate) fn start_time(pid: i32) -> Option<String> {
    stat_fields(Path::new(&format!("/proc/{pid}")))?
        .into_iter()
        .nth(19)
}

/// The recorded groups with the start times of their leaders.
fn records(groups: &Path) -> Result<Vec<(i32, String)>> {
    let entries = match std::fs::read_dir(groups) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(groups)(error)),
    };
    let mut records = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io(groups))?;
        let name = entry.file_name();
        // A half-written record: its process was never told apart from others.
        if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
            records.push((
                pid,
                std::fs::read_to_string(entry.path()).unwrap_or_default(),
            ));
        }
    }
    Ok(records)
}

/// A process that has not ended.
struct Running {
    pid: i32,
    group: i32,
    folder: PathBuf,
}

impl Running {
    /// Whether it was started with this variable, written as `NAME=value`.
    fn bears(&self, variable: &str) -> bool {
        let environment = std::fs::read(self.folder.join("environ")).unwrap_or_default();
        let mut words = environment.split(|byte| *byte == 0);
        words.any(|word| word == variable.as_bytes())
    }
}

fn running() -> Vec<Running> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let read = processes.filter_map(|process| {
        let folder = process.path();
        let pid = process.file_name().to_str()?.parse().ok()?;
        let fields = stat_fields(&folder)?;
        let group = fields.get(2)?.parse().ok()?;
        (fields[0] != "Z").then_some(Running { pid, group, folder })
    });
    read.collect()
}

/// The fields of `/proc/<pid>/stat` from the third on: state, parent, group, …
fn stat_fields(process: &Path) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(process.join("stat")).ok()?;
    // The second field, the command, may hold spaces and parentheses; the rest does not.
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}
