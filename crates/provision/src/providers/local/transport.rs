//! Commands as child processes of this one.

use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::BufReader;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::groups::{self, replace};
use crate::transport::{
    ExitStatus, Forward, HostTransport, LogStream, Process, ProcessControl, ShellCommand,
    send_lines,
};

/// Lines that may wait for a slow reader before the process is held back.
const BUFFERED_LINES: usize = 1024;

/// Runs commands on this machine, each in a process group of its own.
#[derive(Debug, Clone)]
pub struct LocalTransport {
    dir: PathBuf,
}

impl LocalTransport {
    /// Commands belong to the instance whose folder is `dir`, which must be there.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    fn files(&self) -> PathBuf {
        self.dir.join("files")
    }

    fn error(&self, source: std::io::Error) -> Error {
        Error::Transport {
            host: self.host(),
            source: source.into(),
        }
    }
}

#[async_trait]
impl HostTransport for LocalTransport {
    fn host(&self) -> String {
        "localhost".to_owned()
    }

    async fn start(&self, command: &ShellCommand) -> Result<Process> {
        let files = self.files();
        // Not the folder above it: an instance that is gone must not come back as an empty one.
        match std::fs::create_dir(&files) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(self.error(error));
            }
            _ => {}
        }
        let mut bash = Command::new("bash");
        bash.arg("-c").arg(&command.script);
        bash.current_dir(files.join(command.workdir.as_deref().unwrap_or_default()));
        // What escapes the group of this command is to record its own here.
        bash.env(groups::FOLDER, self.dir.join("groups"));
        bash.envs(
            command
                .environment
                .iter()
                .map(|(name, value)| (name, value.expose())),
        );
        bash.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        bash.process_group(0);
        let mut child = bash.spawn().map_err(|error| self.error(error))?;
        let (sender, lines) = mpsc::channel(BUFFERED_LINES);
        if let Some(stdout) = child.stdout.take() {
            let stdout = BufReader::new(stdout);
            tokio::spawn(send_lines(stdout, LogStream::Stdout, sender.clone()));
        }
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(send_lines(
                BufReader::new(stderr),
                LogStream::Stderr,
                sender,
            ));
        }
        // `id` is `None` only after the child was waited for.
        let pid = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .unwrap_or_default();
        let record = match groups::record(&self.dir, pid) {
            Ok(record) => record,
            Err(error) => {
                // What is not recorded must not run: nobody would find it.
                groups::end(pid, Duration::ZERO).await;
                return Err(error);
            }
        };
        let control = LocalProcess {
            child,
            pid,
            record,
            host: self.host(),
        };
        Ok(Process {
            lines,
            control: Box::new(control),
        })
    }

    async fn put(&self, local: &Path, remote: &Path) -> Result<()> {
        if !self.dir.is_dir() {
            return Err(self.error(std::io::ErrorKind::NotFound.into()));
        }
        copy(local, &self.files().join(remote))
    }

    async fn get(&self, remote: &Path, local: &Path) -> Result<()> {
        copy(&self.files().join(remote), local)
    }

    /// The node is this machine: its ports are at hand.
    async fn forward(&self, port: u16) -> Result<Forward> {
        Ok(Forward::new((Ipv4Addr::LOCALHOST, port).into(), ()))
    }
}

#[derive(Debug)]
struct LocalProcess {
    child: Child,
    pid: i32,
    record: PathBuf,
    host: String,
}

#[async_trait]
impl ProcessControl for LocalProcess {
    async fn end(&mut self, grace: Duration) -> Result<ExitStatus> {
        // Waiting at the same time reaps the leader, or its zombie would keep the group alive.
        let (status, ()) = tokio::join!(self.child.wait(), groups::end(self.pid, grace));
        self.ended(status)
    }

    async fn wait(&mut self) -> Result<ExitStatus> {
        let status = self.child.wait().await;
        self.ended(status)
    }
}

impl LocalProcess {
    fn ended(&self, status: std::io::Result<std::process::ExitStatus>) -> Result<ExitStatus> {
        let status = status.map_err(|error| Error::Transport {
            host: self.host.clone(),
            source: error.into(),
        })?;
        // A leader that ended may have left children; they stay recorded and `terminate` ends them.
        if groups::is_empty(self.pid) {
            let _ = std::fs::remove_file(&self.record);
        }
        Ok(match (status.code(), status.signal()) {
            (Some(code), _) => ExitStatus::Code(code),
            (None, signal) => ExitStatus::Signal(signal.unwrap_or_default()),
        })
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let bytes = std::fs::read(from).map_err(Error::io(from))?;
    replace(to, &bytes)
}
