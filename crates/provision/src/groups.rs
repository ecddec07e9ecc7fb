//! Process groups, recorded so that nobody's are ever ended but ours.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

use crate::error::{Error, Result};

/// The variable that tells a command where its instance records process groups.
pub(crate) const FOLDER: &str = "UPDRAFT_GROUPS";

/// How often a group that was asked to end is looked at.
const POLL: Duration = Duration::from_millis(20);

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

/// Ends every recorded group: SIGTERM, then SIGKILL to what is left after `grace`.
pub(crate) async fn end_all(dir: &Path, grace: Duration) -> Result<()> {
    let groups = dir.join("groups");
    let entries = match std::fs::read_dir(&groups) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(groups)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(Error::io(&groups))?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue; // a half-written record: its process was never told apart from others
        };
        let recorded = std::fs::read_to_string(entry.path()).unwrap_or_default();
        // The leader may have ended while its children run on. Then the group keeps the number,
        // and the system gives it to no new process.
        if start_time(pid).is_none_or(|now| now == recorded) {
            end(pid, grace).await;
        }
    }
    Ok(())
}

/// Ends one group; returns when none of its processes is left.
pub(crate) async fn end(pid: i32, grace: Duration) {
    signal(pid, Signal::TERM);
    let asked = Instant::now();
    while !is_empty(pid) {
        if asked.elapsed() >= grace {
            signal(pid, Signal::KILL);
        }
        tokio::time::sleep(POLL).await;
        if asked.elapsed() >= grace + Duration::from_secs(5) {
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
    let group = pid.to_string();
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Pid::from_raw(pid).is_none_or(|group| test_kill_process_group(group).is_err());
    };
    !processes.flatten().any(|process| {
        let fields = stat_fields(&process.path()).unwrap_or_default();
        fields.get(2) == Some(&group) && fields[0] != "Z"
    })
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

/// The fields of `/proc/<pid>/stat` from the third on: state, parent, group, …
fn stat_fields(process: &Path) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(process.join("stat")).ok()?;
    // The second field, the command, may hold spaces and parentheses; the rest does not.
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}
