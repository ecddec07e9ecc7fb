//! The shell around a job: it claims the job, records itself, and leaves the outcome in a file.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::queue::{JobSpec, QueueStatus};
use crate::error::{Error, Result};
use crate::shell::quote;

/// Run by `bash` in the node's home, with the job's folder as `$1` and the number of the attempt as
/// `$2`.
///
/// The claim is made by whoever comes first, this script or an agent that was restarted and found
/// none: a wrapper that comes too late runs nothing.
///
/// The record of its group stays: what the job leaves running ends with the node. As SkyPilot has it,
/// the user's shell is set up before the task's own variables are, so that `conda activate` works; the
/// task's home is the node's, where its files are. The job's variables are known to its two phases
/// alone: no name can be in the script's way.
pub(super) const SCRIPT: &str = r#"
read -r -a stat < /proc/$$/stat
set -o noclobber
{ printf '%s %s' $$ "${stat[21]}" > "$1/claim.$2"; } 2>/dev/null || exit 0
set +o noclobber
if [ -n "$UPDRAFT_GROUPS" ]; then printf %s "${stat[21]}" > "$UPDRAFT_GROUPS/$$"; fi
unset stat
finish() {
  printf '%s %s %(%s)T' "$2" "$3" -1 > "$1/end.tmp"
  rm -f "$1/env"
  mv "$1/end.tmp" "$1/end"
  exit 0
}
enter() {
  if [ -f ~/.bashrc ]; then . ~/.bashrc > /dev/null 2>&1; fi
  local base=
  if command -v conda > /dev/null; then base=$(conda info --base 2> /dev/null); fi
  for base in "$base" ~/miniconda3 ~/miniforge3 ~/anaconda3 /opt/conda; do
    if [ -f "$base/etc/profile.d/conda.sh" ]; then
      set -a; . "$base/etc/profile.d/conda.sh" > /dev/null 2>&1; set +a
      break
    fi
  done
  # Rust's own tools lie under the home that was left.
  [ -d ~/.rustup ] && export RUSTUP_HOME="${RUSTUP_HOME:-$HOME/.rustup}"
  [ -d ~/.cargo ] && export CARGO_HOME="${CARGO_HOME:-$HOME/.cargo}"
  if [ "$HOME" != "$2" ]; then
    export HOME="$2"
    if [ -f ~/.bashrc ]; then . ~/.bashrc > /dev/null 2>&1; fi
  fi
  export PYTHONUNBUFFERED=1
  if [ -s "$1/devices" ]; then export CUDA_VISIBLE_DEVICES=$(< "$1/devices"); fi
}
phase() {
  enter "$1" "$3"
  . "$1/env"
  . "$1/$2"
}
IFS= read -r -d '' work < "$1/workdir"
set -- "$1" "$PWD" "$work"
unset work
[ -d "$3" ] || mkdir -p "$3"
cd "$3" || finish "$1" FAILED_SETUP 1
if [ -s "$1/setup.sh" ]; then
  ( phase "$1" setup.sh "$2" ) < /dev/null
  code=$?
  [ $code -eq 0 ] || finish "$1" FAILED_SETUP $code
fi
# A job of several nodes begins on all of them, or on none: the agents say when.
if [ -s "$1/gather" ]; then
  : > "$1/ready"
  until [ -e "$1/go" ]; do sleep 0.1; done
fi
: > "$1/running"
if [ -s "$1/run.sh" ]; then
  ( phase "$1" run.sh "$2" ) < /dev/null
  code=$?
  [ $code -eq 0 ] || finish "$1" FAILED $code
fi
finish "$1" SUCCEEDED 0
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
    if spec.nodes > 1 {
        put("gather", &spec.nodes.to_string())?;
    }
    put("run.sh", spec.run.as_deref().unwrap_or_default())?;
    put("run.log", "")
}

/// Gives a job the accelerators of these numbers.
pub(super) fn assign(dir: &Path, devices: &[u32]) -> Result<()> {
    let words: Vec<_> = devices.iter().map(ToString::to_string).collect();
    let path = dir.join("devices");
    fs::write(&path, words.join(",")).map_err(Error::io(path))
}

/// The accelerators that a job was given.
pub(super) fn devices(dir: &Path) -> Vec<u32> {
    let text = fs::read_to_string(dir.join("devices")).unwrap_or_default();
    text.split(',')
        .filter_map(|word| word.trim().parse().ok())
        .collect()
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

/// How many nodes a job is on that is through with its setup here; `None` before, and once it has gone on.
pub(super) fn gathering(dir: &Path) -> Option<u32> {
    if !dir.join("ready").exists() || dir.join("go").exists() {
        return None;
    }
    fs::read_to_string(dir.join("gather")).ok()?.parse().ok()
}

/// Lets a job go on from its setup to its commands.
pub(super) fn let_go(dir: &Path) -> Result<()> {
    let path = dir.join("go");
    fs::write(&path, "").map_err(Error::io(path))
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
