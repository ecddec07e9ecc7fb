//! Several processes of one program on this machine, one for each worker.

use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, getpid, getppid, kill_process};
use updraft_store::CancelToken;

use super::Launch;
use crate::{Error, Result};

/// Between two looks at the processes.
const POLL: Duration = Duration::from_millis(50);

/// What a program says that ended because SIGTERM asked it to, as a shell says of one that did not listen.
const STOPPED: i32 = 128 + 15;

/// Tells a process who started it as a worker.
const PARENT: &str = "UPDRAFT_WORKER_OF";

/// Running processes; those that still run when this is dropped are killed.
#[derive(Debug)]
pub struct Processes {
    /// With their ranks.
    running: Vec<(usize, Child)>,
}

/// How processes ended that ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// They did what they were to do.
    Done,
    /// They were asked to stop, and did.
    Stopped,
}

impl Processes {
    /// Starts `num_local` processes of `program`, each with the variables of a worker as torchrun sets them, so that
    /// [`Launch::from_env`] understands them.
    ///
    /// Alone on this machine they meet on loopback. Where a launcher has started this process as one of several, one on
    /// each machine, `launch` is what it says, and all of theirs make one group.
    ///
    /// # Errors
    /// [`Error::Process`] when one does not start.
    pub fn start(
        launch: Option<&Launch>,
        num_local: usize,
        program: impl Fn() -> Command,
    ) -> Result<Self> {
        let failed = |rank, source| Error::Process {
            rank,
            what: "did not start".to_owned(),
            source: Some(source),
        };
        let (machine, machines) = launch.map_or((0, 1), |launch| (launch.rank, launch.num_workers));
        let master = match launch {
            Some(launch) => launch.master.clone(),
            None => free_port().map_err(|source| failed(0, source))?,
        };
        let (host, port) = master.rsplit_once(':').unwrap_or((&master, ""));
        let host = host.trim_matches(['[', ']']);
        let mut started = Self {
            running: Vec::new(),
        };
        for local in 0..num_local {
            let rank = machine * num_local + local;
            let mut command = program();
            // Signals of a terminal come here, and go on once.
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
            command
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", (machines * num_local).to_string())
                .env("LOCAL_RANK", local.to_string())
                .env("LOCAL_WORLD_SIZE", num_local.to_string())
                .env("MASTER_ADDR", host)
                .env("MASTER_PORT", port)
                .env(PARENT, std::process::id().to_string())
                .env_remove("TORCHELASTIC_USE_AGENT_STORE");
            let child = command.spawn().map_err(|source| failed(rank, source))?;
            started.running.push((rank, child));
        }
        Ok(started)
    }

    /// Whether this process is one of them. Then it gets SIGTERM when whoever started it is gone (on Linux), so that no
    /// worker goes on beside those of a next run; and a second SIGTERM, which may be that one or another's, says no more
    /// than the first: who wants it to end at once has its parent kill it.
    pub fn is_one() -> bool {
        let Ok(parent) = std::env::var(PARENT) else {
            return false;
        };
        #[cfg(target_os = "linux")]
        if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::TERM)) {
            tracing::warn!(%error, "this worker will not notice when its parent ends");
        }
        let is_there = getppid().is_some_and(|own| own.as_raw_pid().to_string() == parent);
        if !is_there {
            // It was gone before the system was asked to tell.
            let _ = kill_process(getpid(), Signal::TERM);
        }
        true
    }

    /// Waits until all have ended. Once `cancel` is, they are sent SIGTERM, and may take as long as they need, unless
    /// `at_once` is cancelled too: then they are killed.
    ///
    /// # Errors
    /// [`Error::Process`] names the first that failed; the others are killed.
    pub fn wait(mut self, cancel: &CancelToken, at_once: &CancelToken) -> Result<Ended> {
        let (mut ended, mut asked) = (Ended::Done, false);
        while !self.running.is_empty() {
            if at_once.is_cancelled() {
                return Ok(Ended::Stopped);
            }
            if cancel.is_cancelled() && !asked {
                asked = true;
                for (_, child) in &self.running {
                    // One that has just ended needs no telling.
                    let _ = kill_process(Pid::from_child(child), Signal::TERM);
                }
            }
            let mut left = Vec::new();
            let mut failures = Vec::new();
            for (rank, mut child) in self.running.drain(..) {
                match child.try_wait() {
                    Ok(None) => left.push((rank, child)),
                    Ok(Some(status)) if status.success() => {}
                    Ok(Some(status)) if status.code() == Some(STOPPED) => ended = Ended::Stopped,
                    Ok(Some(status)) => failures.push((rank, Ok(status))),
                    Err(error) => failures.push((rank, Err(error))),
                }
            }
            self.running = left;
            // One that was killed said nothing itself, and the others failed because it was gone.
            let was_killed = |ended: &std::io::Result<ExitStatus>| {
                ended.as_ref().is_ok_and(|status| status.code().is_none())
            };
            failures.sort_by_key(|(_, ended)| !was_killed(ended));
            if let Some((rank, ended)) = failures.into_iter().next() {
                return Err(failed(rank, ended));
            }
            if !self.running.is_empty() {
                thread::sleep(POLL);
            }
        }
        Ok(ended)
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            // One that has just ended cannot be killed, and need not be.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn failed(rank: usize, ended: std::io::Result<ExitStatus>) -> Error {
    match ended {
        Ok(status) => Error::Process {
            rank,
            what: format!("ended with {status}"),
            source: None,
        },
        Err(source) => Error::Process {
            rank,
            what: "cannot be waited for".to_owned(),
            source: Some(source),
        },
    }
}

/// A port of loopback that was free a moment ago.
fn free_port() -> std::io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each process does, a script of the shell.
    fn shell(script: &'static str) -> impl Fn() -> Command {
        move || {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        }
    }

    fn wait(launch: Option<&Launch>, count: usize, script: &'static str) -> Result<Ended> {
        let never = CancelToken::new();
        Processes::start(launch, count, shell(script))?.wait(&never, &never)
    }

    #[test]
    fn each_is_told_who_it_is() {
        let alone = r#"case $RANK,$LOCAL_RANK in 0,0|1,1|2,2) ;; *) exit 3;; esac
            test $WORLD_SIZE,$LOCAL_WORLD_SIZE,$MASTER_ADDR = 3,3,127.0.0.1 && test $MASTER_PORT -gt 0"#;
        assert_eq!(wait(None, 3, alone).expect("all know"), Ended::Done);
        let second = Launch {
            rank: 1,
            num_workers: 2,
            master: "[fd00::1]:29500".to_owned(),
        };
        let of_two = r#"case $RANK,$LOCAL_RANK in 2,0|3,1) ;; *) exit 3;; esac
            test $WORLD_SIZE,$LOCAL_WORLD_SIZE,$MASTER_ADDR,$MASTER_PORT = 4,2,fd00::1,29500"#;
        assert_eq!(
            wait(Some(&second), 2, of_two).expect("all know"),
            Ended::Done
        );
    }

    /// The others would have slept for a minute.
    #[test]
    fn when_one_fails_the_others_are_ended() {
        let began = std::time::Instant::now();
        let script = "test $RANK = 1 && exit 7; exec sleep 60";
        let error = wait(None, 3, script).expect_err("one fails");
        assert_eq!(
            error.to_string(),
            "worker 1 ended with exit status: 7: look at what it said; the others were ended"
        );
        assert!(began.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn who_is_asked_to_stop_may_take_its_time() {
        let cancel = CancelToken::new();
        let script = "trap 'exit 143' TERM; echo; while :; do sleep 0.05; done";
        let program = || {
            let mut command = shell(script)();
            command.stdout(std::process::Stdio::piped());
            command
        };
        let mut processes = Processes::start(None, 2, program).expect("they start");
        for (_, child) in &mut processes.running {
            // A line says that it listens.
            let said = child.stdout.as_mut().expect("piped");
            std::io::Read::read_exact(said, &mut [0]).expect("a line");
        }
        cancel.cancel();
        let ended = processes.wait(&cancel, &CancelToken::new());
        assert_eq!(ended.expect("they stop"), Ended::Stopped);
    }

    /// They listen to nothing, and would have slept for a minute.
    #[test]
    fn who_does_not_listen_is_killed_when_asked_again() {
        let began = std::time::Instant::now();
        let script = "trap '' TERM; sleep 60 & wait; sleep 60";
        let processes = Processes::start(None, 2, shell(script)).expect("they start");
        let cancel = CancelToken::new();
        cancel.cancel();
        let ended = processes.wait(&cancel, &cancel);
        assert_eq!(ended.expect("they are ended"), Ended::Stopped);
        assert!(began.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let error = Processes::start(None, 2, || Command::new("no such program"));
        assert!(
            error
                .expect_err("none")
                .to_string()
                .contains("worker 0 did not start")
        );
    }
}
