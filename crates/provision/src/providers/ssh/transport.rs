//! Commands and files on a machine, over one multiplexed ssh connection.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use openssh::{Child, ForwardType, KnownHosts, Session, SessionBuilder, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::{Mutex, mpsc};

use crate::error::{BoxError, Error, Result};
use crate::provider::SshTarget;
use crate::shell::quote;
use crate::transport::{
    ExitStatus, Forward, HostTransport, LogStream, Process, ProcessControl, ShellCommand,
    send_lines,
};

/// Lines that may wait for a slow reader before the command is held back.
const BUFFERED_LINES: usize = 1024;

/// How long a machine may take to answer at first, and how often it is asked for a sign of life.
const CONNECT: Duration = Duration::from_secs(20);
const ALIVE: Duration = Duration::from_secs(5);

/// Reads a script from its input and becomes it: the script, with its variables, is on no command
/// line. The first line it writes is the number of its process group, which the ssh server has made
/// for it alone.
const READER: &str = "exec bash -c 'script=$(cat); read -r -a stat < /proc/$$/stat; echo ${stat[4]}; exec bash /dev/fd/3 3<<<\"$script\" </dev/null'";

/// A way to one machine by the user's own `ssh`: its configuration, agent and keys are honoured.
#[derive(Debug, Clone)]
pub struct SshTransport {
    target: SshTarget,
    dir: String,
    session: Arc<Mutex<Option<Arc<Session>>>>,
}

impl SshTransport {
    /// Commands belong to the instance whose folder on the machine is `dir`, which must be there.
    /// Connects when the first is run.
    pub fn new(target: SshTarget, dir: impl Into<String>) -> Self {
        Self {
            target,
            dir: dir.into(),
            session: Arc::default(),
        }
    }

    /// The connection; one that was lost is made anew.
    async fn session(&self) -> Result<Arc<Session>> {
        let mut kept = self.session.lock().await;
        if let Some(session) = kept.as_ref() {
            match session.check().await {
                Ok(()) => return Ok(session.clone()),
                Err(error) => tracing::debug!(host = self.host(), %error, "connecting again"),
            }
        }
        let mut builder = SessionBuilder::default();
        builder
            .known_hosts_check(KnownHosts::Strict)
            .connect_timeout(CONNECT)
            .server_alive_interval(ALIVE);
        if let Some(user) = &self.target.user {
            builder.user(user.clone());
        }
        if let Some(port) = self.target.port {
            builder.port(port);
        }
        if let Some(identity) = &self.target.identity_file {
            builder.keyfile(identity);
        }
        if let Some(known_hosts) = &self.target.known_hosts {
            builder.user_known_hosts_file(known_hosts);
        }
        let session = builder.connect_mux(&self.target.host).await;
        let session = Arc::new(session.map_err(|error| self.failed(error))?);
        *kept = Some(session.clone());
        Ok(session)
    }

    fn failed(&self, source: impl Into<BoxError>) -> Error {
        Error::Transport {
            host: self.host(),
            source: source.into(),
        }
    }

    /// Runs a short script in the user's home and returns what it wrote.
    pub(super) async fn ask(&self, script: &str) -> Result<String> {
        let session = self.session().await?;
        let mut command = session.arc_raw_command(format!("exec bash -c {}", quote(script)));
        let output = command.output().await.map_err(|error| self.failed(error))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(self.failed(said));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The path of a file of the instance, as a word of shell in the user's home.
    fn path(&self, path: &Path) -> String {
        quote(
            &PathBuf::from(&self.dir)
                .join("files")
                .join(path)
                .to_string_lossy(),
        )
    }
}

#[async_trait]
impl HostTransport for SshTransport {
    fn host(&self) -> String {
        self.target.host.clone()
    }

    async fn start(&self, command: &ShellCommand) -> Result<Process> {
        let session = self.session().await?;
        let mut child = session
            .arc_raw_command(READER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .await
            .map_err(|error| self.failed(error))?;
        let mut stdin = child
            .stdin()
            .take()
            .ok_or_else(|| self.failed("no input"))?;
        let stdout = child
            .stdout()
            .take()
            .ok_or_else(|| self.failed("no output"))?;
        let stderr = child
            .stderr()
            .take()
            .ok_or_else(|| self.failed("no errors"))?;
        let script = self.script(command);
        let sent = async {
            stdin.write_all(script.as_bytes()).await?;
            stdin.shutdown().await
        };
        sent.await.map_err(|error| self.failed(error))?;
        drop(stdin);
        let mut stdout = BufReader::new(stdout);
        let mut first = String::new();
        stdout
            .read_line(&mut first)
            .await
            .map_err(|error| self.failed(error))?;
        let group: u32 = first
            .trim()
            .parse()
            .map_err(|_| self.failed("the machine has no bash, or no /proc"))?;
        let (sender, lines) = mpsc::channel(BUFFERED_LINES);
        tokio::spawn(send_lines(stdout, LogStream::Stdout, sender.clone()));
        let stderr = BufReader::new(stderr);
        tokio::spawn(send_lines(stderr, LogStream::Stderr, sender));
        let control = SshProcess {
            transport: self.clone(),
            child: Some(child),
            group,
            status: None,
        };
        Ok(Process {
            lines,
            control: Box::new(control),
        })
    }

    async fn put(&self, local: &Path, remote: &Path) -> Result<()> {
        let bytes = std::fs::read(local).map_err(Error::io(local))?;
        let to = self.path(remote);
        let session = self.session().await?;
        let script = format!(
            "set -e; test -d {}; mkdir -p \"$(dirname {to})\"; cat > {to}.tmp-$$; mv {to}.tmp-$$ {to}",
            quote(&self.dir)
        );
        let mut child = session
            .arc_raw_command(format!("exec bash -c {}", quote(&script)))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .await
            .map_err(|error| self.failed(error))?;
        if let Some(mut stdin) = child.stdin().take() {
            let sent = async {
                stdin.write_all(&bytes).await?;
                stdin.shutdown().await
            };
            sent.await.map_err(|error| self.failed(error))?;
        }
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr().take() {
            stderr
                .read_to_string(&mut said)
                .await
                .map_err(|error| self.failed(error))?;
        }
        match child
            .wait()
            .await
            .map_err(|error| self.failed(error))?
            .success()
        {
            true => Ok(()),
            false => Err(self.failed(said.trim())),
        }
    }

    async fn get(&self, remote: &Path, local: &Path) -> Result<()> {
        let session = self.session().await?;
        let mut command = session.arc_raw_command(format!("exec cat {}", self.path(remote)));
        let output = command.output().await.map_err(|error| self.failed(error))?;
        if !output.status.success() {
            return Err(self.failed(String::from_utf8_lossy(&output.stderr).trim()));
        }
        if let Some(folder) = local.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        let sibling = local.with_extension(format!("tmp-{}", std::process::id()));
        std::fs::write(&sibling, &output.stdout).map_err(Error::io(&sibling))?;
        std::fs::rename(&sibling, local).map_err(Error::io(local))
    }

    /// Over the connection there is: nothing but the ssh server need be reachable.
    async fn forward(&self, port: u16) -> Result<Forward> {
        let session = self.session().await?;
        let here = free_port().map_err(|error| self.failed(error))?;
        let there = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        session
            .request_port_forward(ForwardType::Local, here, there)
            .await
            .map_err(|error| self.failed(error))?;
        let open = Open {
            session,
            here,
            there,
        };
        Ok(Forward::new(here, open))
    }
}

/// An address of this machine that nobody has now.
fn free_port() -> std::io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

/// A forward of a session, which closes it when dropped.
struct Open {
    session: Arc<Session>,
    here: SocketAddr,
    there: SocketAddr,
}

impl Drop for Open {
    fn drop(&mut self) {
        let (session, here, there) = (self.session.clone(), self.here, self.there);
        // Without a runtime this process is on its way out, and its connections with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let closed = session
                    .close_port_forward(ForwardType::Local, here, there)
                    .await;
                if let Err(error) = closed {
                    tracing::debug!(%error, "a forward was gone before it was closed");
                }
            });
        }
    }
}

impl SshTransport {
    /// The whole script that is sent: it records its group, enters the folder, sets the variables.
    fn script(&self, command: &ShellCommand) -> String {
        let dir = quote(&self.dir);
        let mut script = format!(
            "cd ~ && cd {dir} 2>/dev/null || {{ echo 'the instance is gone' >&2; exit 1; }}\n\
             mkdir -p files groups\n\
             export UPDRAFT_GROUPS=\"$PWD/groups\"\n\
             for old in groups/[0-9]*; do kill -0 -- \"-${{old##*/}}\" 2>/dev/null || rm -f \"$old\"; done\n\
             read -r -a stat < /proc/$$/stat; group=${{stat[4]}}\n\
             read -r -a stat < /proc/$group/stat; printf %s \"${{stat[21]}}\" > groups/$group\n\
             cd files\n"
        );
        if let Some(workdir) = &command.workdir {
            script.push_str(&format!("cd {} || exit 1\n", quote(workdir)));
        }
        for (name, value) in &command.environment {
            script.push_str(&format!("export {name}={}\n", quote(value.expose())));
        }
        script.push_str("unset stat group old\n");
        script.push_str(&command.script);
        script.push('\n');
        script
    }
}

#[derive(Debug)]
struct SshProcess {
    transport: SshTransport,
    child: Option<Child<Arc<Session>>>,
    group: u32,
    status: Option<ExitStatus>,
}

#[async_trait]
impl ProcessControl for SshProcess {
    async fn end(&mut self, grace: Duration) -> Result<ExitStatus> {
        let (group, tenths) = (self.group, grace.as_millis().div_ceil(100));
        let script = format!(
            "kill -TERM -- -{group} 2>/dev/null; \
             for i in $(seq {tenths}); do kill -0 -- -{group} 2>/dev/null || exit 0; sleep 0.1; done; \
             kill -KILL -- -{group} 2>/dev/null; exit 0"
        );
        self.transport.ask(&script).await?;
        self.wait().await
    }

    async fn wait(&mut self) -> Result<ExitStatus> {
        if let Some(child) = self.child.take() {
            // A command that a signal ended has no code; ssh does not say which it was.
            self.status = Some(match child.wait().await {
                Ok(status) => status
                    .code()
                    .map_or(ExitStatus::Signal(0), ExitStatus::Code),
                Err(openssh::Error::RemoteProcessTerminated) => ExitStatus::Signal(0),
                Err(error) => return Err(self.transport.failed(error)),
            });
        }
        self.status
            .ok_or_else(|| self.transport.failed("the connection was lost"))
    }
}
