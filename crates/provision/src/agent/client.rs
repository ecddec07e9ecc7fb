//! A node's agent as its client sees it, over any transport.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use super::binary::AgentBinary;
use super::peers::{Head, Place};
use super::queue::{JobRow, JobSpec};
use crate::boot;
use crate::error::{Error, Result};
use crate::provider::{Endpoint, Lease};
use crate::secret::Secret;
use crate::shell::quote;
use crate::transport::{HostTransport, LogStream, Process, ShellCommand};

/// The agent's folder, under the node's home.
const DIR: &str = ".updraft";

/// What an agent is told about its node before it runs.
#[derive(Debug, Clone)]
pub struct NodeSetup {
    /// The accelerators of the node.
    pub gpus: u32,
    /// How many jobs may run at once; twice the CPUs when `None`.
    pub slots: Option<u32>,
    /// The command by which the node stops itself.
    pub stop: String,
    /// The command by which the node ends itself for good.
    pub down: String,
    /// Whether the agent is started again when the machine comes up.
    pub boot: bool,
}

impl NodeSetup {
    /// How an instance ends itself, without credentials.
    pub fn of(endpoint: Option<&Endpoint>, gpus: u32) -> Self {
        let (stop, down) = match endpoint {
            Some(Endpoint::Local { dir }) => {
                let dir = quote(&dir.to_string_lossy());
                // The record goes last, so that an interrupted end is still listed.
                let down = format!("cd {dir} && rm -rf files groups && rm -rf {dir}");
                (format!("touch {dir}/stopped"), down)
            }
            // A machine one owns is left running; it is only given back.
            Some(Endpoint::Ssh { dir, .. }) => {
                let dir = quote(dir);
                let down = format!(
                    "cd ~ && cd {dir} || exit 0; d=$PWD; {}rm -rf files groups && rm -rf \"$d\"",
                    boot::remove()
                );
                (format!("cd ~ && touch {dir}/stopped"), down)
            }
            None => ("true".to_owned(), "true".to_owned()),
        };
        Self {
            gpus,
            slots: None,
            stop,
            down,
            boot: matches!(endpoint, Some(Endpoint::Ssh { .. })),
        }
    }
}

/// Speaks to the agent of one node.
#[derive(Debug, Clone)]
pub struct AgentClient {
    transport: Arc<dyn HostTransport>,
    /// How the node calls the agent's binary.
    program: String,
}

impl AgentClient {
    /// `program` is the shell word by which the node calls the agent's binary and, if need be, the
    /// subcommand that leads to [`command`](super::command).
    pub fn new(transport: Arc<dyn HostTransport>, program: impl Into<String>) -> Self {
        Self {
            transport,
            program: program.into(),
        }
    }

    /// Copies the binary to the node, under the hash of its contents, unless it is there.
    ///
    /// # Errors
    /// [`Error::Transport`] or [`Error::Io`].
    pub async fn installed(
        transport: Arc<dyn HostTransport>,
        binary: &AgentBinary,
    ) -> Result<Self> {
        let name = format!("{DIR}/bin/{}", binary.name());
        let client = Self::new(
            transport.clone(),
            format!("./{name} {}", binary.subcommand()),
        );
        let there = client
            .ask(
                &format!("test -x {name} && echo there || echo absent"),
                None,
            )
            .await?;
        if there != ["there"] {
            transport.put(binary.path(), Path::new(&name)).await?;
            client.ask(&format!("chmod 700 {name}"), None).await?;
        }
        Ok(client)
    }

    /// Tells the agent about its node and starts it, unless one runs.
    ///
    /// # Errors
    /// [`Error::Transport`] if the node cannot be reached or the agent does not start.
    pub async fn start(&self, setup: &NodeSetup) -> Result<()> {
        let program = &self.program;
        let mut script = format!(
            "set -e; mkdir -p {DIR}; {program} set {DIR} gpus {}; {program} set {DIR} end_stop {}; {program} set {DIR} end_down {}; \
             if [ -n \"$UPDRAFT_GROUPS\" ]; then {program} set {DIR} groups \"$UPDRAFT_GROUPS\"; fi; ",
            setup.gpus,
            quote(&setup.stop),
            quote(&setup.down)
        );
        if let Some(slots) = setup.slots {
            script.push_str(&format!("{program} set {DIR} slots {slots}; "));
        }
        if setup.boot {
            script.push_str(&boot::install(&format!("{program} run {DIR}")));
        }
        script.push_str(&self.ensure());
        self.ask(&script, None).await.map(drop)
    }

    /// Starts an agent in the background; one that finds another leaves at once.
    fn ensure(&self) -> String {
        format!(
            "nohup {} run {DIR} </dev/null >>{DIR}/agent.log 2>&1 &",
            self.program
        )
    }

    /// Puts a job into the queue; returns its number.
    ///
    /// # Errors
    /// [`Error::Transport`].
    pub async fn submit(&self, spec: &JobSpec) -> Result<i64> {
        let text = serde_json::to_string(spec).unwrap_or_default();
        let script = format!("{} submit {DIR} && {{ {} }}", self.program, self.ensure());
        let lines = self.ask(&script, Some(("UPDRAFT_JOB", text))).await?;
        let id = lines.first().and_then(|line| line.parse().ok());
        id.ok_or_else(|| self.failed(&lines))
    }

    /// The jobs, by number.
    ///
    /// # Errors
    /// [`Error::Transport`].
    pub async fn queue(&self) -> Result<Vec<JobRow>> {
        // An agent that was killed is brought back: only it can say what became of its jobs.
        let script = format!("{{ {} }}; {} queue {DIR}", self.ensure(), self.program);
        let lines = self.ask(&script, None).await?;
        let rows = lines.iter().map(|line| serde_json::from_str(line));
        rows.collect::<Result<_, _>>()
            .map_err(|_| self.failed(&lines))
    }

    /// Cancels a job, or all of them; returns how many there were.
    ///
    /// # Errors
    /// [`Error::Transport`].
    pub async fn cancel(&self, id: Option<i64>) -> Result<u64> {
        let which = id.map_or("all".to_owned(), |id| id.to_string());
        let script = format!(
            "{} cancel {DIR} {which} && {{ {} }}",
            self.program,
            self.ensure()
        );
        let lines = self.ask(&script, None).await?;
        let count = lines.first().and_then(|line| line.parse().ok());
        count.ok_or_else(|| self.failed(&lines))
    }

    /// Changes when the node ends by itself.
    ///
    /// # Errors
    /// [`Error::Transport`].
    pub async fn set_lease(&self, lease: &Lease) -> Result<()> {
        let text = serde_json::to_string(lease).unwrap_or_default();
        let script = format!(
            "{} lease {DIR} {} && {{ {} }}",
            self.program,
            quote(&text),
            self.ensure()
        );
        self.ask(&script, None).await.map(drop)
    }

    /// Keeps the node from ending itself while files are brought to it, for `for_seconds` or until a
    /// job is submitted.
    ///
    /// # Errors
    /// [`Error::Transport`].
    pub async fn hold(&self, for_seconds: u64) -> Result<()> {
        let script = format!("{} hold {DIR} {for_seconds}", self.program);
        self.ask(&script, None).await.map(drop)
    }

    /// Makes the node the head of its cluster: its agent listens at `bind` to those of the others.
    ///
    /// # Errors
    /// [`Error::Transport`].
    pub async fn lead(&self, bind: IpAddr) -> Result<Head> {
        let lines = self
            .ask(&format!("{} lead {DIR} {bind}", self.program), None)
            .await?;
        let head = lines
            .first()
            .and_then(|line| serde_json::from_str(line).ok());
        head.ok_or_else(|| self.failed(&lines))
    }

    /// Makes the node follow the head of its cluster.
    ///
    /// # Errors
    /// [`Error::Transport`].
    pub async fn follow(&self, place: &Place) -> Result<()> {
        let text = serde_json::to_string(place).unwrap_or_default();
        let script = format!("{} follow {DIR}", self.program);
        self.ask(&script, Some(("UPDRAFT_PLACE", text)))
            .await
            .map(drop)
    }

    /// The lines of a job's log, of the newest job's when `None`; with `follow` until it ends.
    ///
    /// # Errors
    /// [`Error::Transport`].
    pub async fn logs(&self, id: Option<i64>, follow: bool) -> Result<JobLogs> {
        let which = id.map_or("last".to_owned(), |id| id.to_string());
        let follow = if follow { "follow" } else { "" };
        let command = ShellCommand {
            script: format!("exec {} logs {DIR} {which} {follow}", self.program),
            ..ShellCommand::default()
        };
        let process = self.transport.start(&command).await?;
        Ok(JobLogs {
            process,
            host: self.transport.host(),
            said: None,
            ended: None,
        })
    }

    /// Runs a script on the node and returns its lines; its error output becomes the error.
    async fn ask(&self, script: &str, told: Option<(&str, String)>) -> Result<Vec<String>> {
        let environment = told
            .map(|(name, text)| (name.to_owned(), Secret::new(text)))
            .into_iter()
            .collect::<BTreeMap<_, _>>();
        let command = ShellCommand {
            script: script.to_owned(),
            workdir: None,
            environment,
        };
        let mut process = self.transport.start(&command).await?;
        let (mut lines, mut errors) = (Vec::new(), Vec::new());
        while let Some(line) = process.lines.recv().await {
            match line.stream {
                LogStream::Stdout => lines.push(line.text),
                LogStream::Stderr => errors.push(line.text),
            }
        }
        match process.control.wait().await?.success() {
            true => Ok(lines),
            false => Err(self.failed(&errors)),
        }
    }

    fn failed(&self, said: &[String]) -> Error {
        let said = match said.is_empty() {
            true => "the agent said nothing".to_owned(),
            false => said.join("; "),
        };
        Error::Transport {
            host: self.transport.host(),
            source: said.into(),
        }
    }
}

/// A job's log as it comes.
#[derive(Debug)]
pub struct JobLogs {
    process: Process,
    host: String,
    said: Option<String>,
    ended: Option<JobRow>,
}

impl JobLogs {
    /// What has become of the job, once a log that was followed is at its end.
    pub fn ended(&self) -> Option<&JobRow> {
        self.ended.as_ref()
    }

    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Transport`] if there is no such job or the node was lost.
    pub async fn next_line(&mut self) -> Result<Option<String>> {
        while let Some(line) = self.process.lines.recv().await {
            match line.stream {
                LogStream::Stdout => return Ok(Some(line.text)),
                // The agent's, not the job's.
                LogStream::Stderr => match serde_json::from_str(&line.text) {
                    Ok(row) => self.ended = Some(row),
                    Err(_) => self.said = Some(line.text),
                },
            }
        }
        match self.process.control.wait().await?.success() {
            true => Ok(None),
            false => Err(Error::Transport {
                host: self.host.clone(),
                source: self
                    .said
                    .take()
                    .unwrap_or_else(|| "its log was cut off".to_owned())
                    .into(),
            }),
        }
    }
}
