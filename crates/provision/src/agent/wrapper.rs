//! The shell around a job: it claims the job, records itself, and leaves the outcome in a file.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::queue::{JobSpec, QueueStatus};
use crate::error::{Error, Result};
use crate::shell::quote;

/// Run by `bash` with the job's folder as `$1` and the number of the attempt as `$2`.
///
/// The claim is made by whoever comes first, this script or an agent that was restarted and found
/// none: a wrapper that comes too late runs nothing.
pub(super) const SCRIPT: &str = r#"
d=$1
read -r -a stat < /proc/$$/stat
set -o noclobber
{ printf '%s %s' $$ "${stat[21]}" > "$d/claim.$2"; } 2>/dev/null || exit 0
set +o noclobber
if [ -n "$UPDRAFT_GROUPS" ]; then printf %s "${stat[21]}" > "$UPDRAFT_GROUPS/$$"; fi
finish() {
  printf '%s %s %(%s)T' "$1" "$2" -1 > "$d/end.tmp"
  rm -f "$d/env" "$UPDRAFT_GROUPS/$$"
  mv "$d/end.tmp" "$d/end"
  exit 0
}
. "$d/env"
cd "$(cat "$d/workdir")" || finish FAILED_SETUP 1
if [ -s "$d/setup.sh" ]; then
  ( . "$d/setup.sh" ) < /dev/null
  code=$?
  [ $code -eq 0 ] || finish FAILED_SETUP $code
fi
: > "$d/running"
if [ -s "$d/run.sh" ]; then
  ( . "$d/run.sh" ) < /dev/null
  code=$?
  [ $code -eq 0 ] || finish FAILED $code
fi
finish SUCCEEDED 0
"#;

/// Writes what the wrapper reads. Only the owner can read the variables, and they go with the job.
pub(super) fn write(dir: &Path, spec: &JobSpec, id: i64) -> Result<()> {
    // A number whose transaction was not committed is given again.
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io(dir)(error));
        }
        _ => {}
    }
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        let mut options = fs::OpenOptions::new();
        let file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(Error::io(path))
    };
    let mut env = String::new();
    for (name, value) in &spec.environment {
        env.push_str(&format!("export {name}={}\n", quote(value)));
    }
    let id = spec.head.unwrap_or(id); // one number on all nodes
    env.push_str(&format!(
        "export UPDRAFT_JOB_ID={id} SKYPILOT_INTERNAL_JOB_ID={id}\n"
    ));
    env.push_str("export SKYPILOT_TASK_ID=\"updraft_${UPDRAFT_CLUSTER}_$UPDRAFT_JOB_ID\"\n");
    put("env", &env)?;
    put("workdir", spec.workdir.as_deref().unwrap_or("."))?;
    put("setup.sh", spec.setup.as_deref().unwrap_or_default())?;
    put("run.sh", spec.run.as_deref().unwrap_or_default())?;
    put("run.log", "")
}

/// What the wrapper said at its end: status, code, and when.
pub(super) fn outcome(dir: &Path) -> Option<(QueueStatus, i32, i64)> {
    let text = fs::read_to_string(dir.join("end")).ok()?;
    let mut words = text.split_whitespace();
    let status = QueueStatus::of(words.next()?)?;
    Some((
        status,
        words.next()?.parse().ok()?,
        words.next()?.parse().ok()?,
    ))
}

/// Whether the job has gone on from setup to run.
pub(super) fn is_running(dir: &Path) -> bool {
    dir.join("running").exists()
}

/// Who has claimed an attempt.
pub(super) enum Claim {
    /// Nobody.
    None,
    /// The wrapper with this process id and start time.
    By(i32, String),
    /// A wrapper that has not yet written its name, or the agent.
    Unnamed,
}

pub(super) fn claim(dir: &Path, attempt: i64) -> Claim {
    let Ok(text) = fs::read_to_string(dir.join(format!("claim.{attempt}"))) else {
        return Claim::None;
    };
    match text.split_once(' ') {
        Some((pid, start)) => match pid.parse() {
            Ok(pid) => Claim::By(pid, start.to_owned()),
            Err(_) => Claim::Unnamed,
        },
        None => Claim::Unnamed,
    }
}

/// Claims an attempt for the agent, so that a wrapper that is yet to come does not run; says whether
/// nobody had.
pub(super) fn void(dir: &Path, attempt: i64) -> bool {
    let path = dir.join(format!("claim.{attempt}"));
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .is_ok()
}
