//! Running commands on a node, whatever lies between.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::error::Result;
use crate::secret::Secret;

/// A way to one node.
///
/// # Contract
/// - `start` returns once the command runs; its lines arrive in the order written per stream, none
///   is lost, and the channel closes when the process and its output have ended.
/// - Ending a process ends everything it started.
/// - `put` and `get` copy one file, replace atomically, and make missing folders.
/// - What connects to a [`Forward`] reaches the port on the node's own loopback address, until the
///   forward is dropped; nobody needs to listen there yet.
#[async_trait]
pub trait HostTransport: fmt::Debug + Send + Sync {
    /// The node's name, for messages.
    fn host(&self) -> String;

    /// Starts a shell command.
    async fn start(&self, command: &ShellCommand) -> Result<Process>;

    /// Copies a file to the node; relative paths are under the instance's folder.
    async fn put(&self, local: &Path, remote: &Path) -> Result<()>;

    /// Copies a file from the node.
    async fn get(&self, remote: &Path, local: &Path) -> Result<()>;

    /// Leads a port of this machine to one of the node.
    async fn forward(&self, port: u16) -> Result<Forward>;
}

/// A port of this machine that leads to a port of a node, until it is dropped.
#[derive(Debug)]
pub struct Forward {
    address: SocketAddr,
    _open: Box<dyn Any + Send + Sync>,
}

impl Forward {
    /// A forward that is open for as long as `open` lives.
    pub fn new(address: SocketAddr, open: impl Any + Send + Sync) -> Self {
        Self {
            address,
            _open: Box::new(open),
        }
    }

    /// Where to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// A command for the node's `bash`.
#[derive(Debug, Clone, Default)]
pub struct ShellCommand {
    /// The script.
    pub script: String,
    /// Where it runs: under the instance's folder, unless absolute.
    pub workdir: Option<String>,
    /// Variables on top of the node's own.
    pub environment: BTreeMap<String, Secret<String>>,
}

/// A running command.
#[derive(Debug)]
pub struct Process {
    /// What it writes, line by line.
    pub lines: mpsc::Receiver<LogLine>,
    /// How to end it and how it ended.
    pub control: Box<dyn ProcessControl>,
}

/// Ending and awaiting a [`Process`].
#[async_trait]
pub trait ProcessControl: fmt::Debug + Send {
    /// Asks the process and its children to end (SIGTERM), and after `grace` ends them (SIGKILL).
    async fn end(&mut self, grace: Duration) -> Result<ExitStatus>;

    /// Waits until the process has ended.
    async fn wait(&mut self) -> Result<ExitStatus>;
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl ExitStatus {
    /// Whether the code is zero.
    pub fn success(self) -> bool {
        self == ExitStatus::Code(0)
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitStatus::Code(code) => write!(f, "exit code {code}"),
            ExitStatus::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// One line of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Which stream it came from.
    pub stream: LogStream,
    /// The line without its newline; bytes that are not UTF-8 are replaced.
    pub text: String,
}

/// The stream a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Sends each line that `reader` has until it ends; bytes that are not UTF-8 are replaced.
#[cfg(any(feature = "local", feature = "ssh"))]
pub(crate) async fn send_lines(
    mut reader: impl tokio::io::AsyncBufRead + Unpin,
    stream: LogStream,
    sender: mpsc::Sender<LogLine>,
) {
    use tokio::io::AsyncBufReadExt;
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line)
            .trim_end_matches(['\n', '\r'])
            .to_owned();
        // A reader that has gone away must not stop the command: its output is read and dropped.
        let _ = sender.send(LogLine { stream, text }).await;
    }
}
