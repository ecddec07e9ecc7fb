//! A job's output from all its nodes, as it comes.

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::jobs::agent_of;
use super::{Engine, JobId};
use crate::agent::{AgentBinary, JobLogs};
use crate::error::{Error, Result};

/// Lines that may wait for a slow reader.
const BUFFERED_LINES: usize = 256;

/// A job's log as it comes; where it runs on several nodes, each line says which it is from.
#[derive(Debug)]
pub struct ClusterLogs {
    lines: mpsc::Receiver<Result<String>>,
    _reading: JoinSet<()>,
}

impl ClusterLogs {
    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Transport`] if there is no such job or a node was lost.
    pub async fn next_line(&mut self) -> Result<Option<String>> {
        self.lines.recv().await.transpose()
    }
}

impl Engine {
    /// The log of a job, of the newest when `None`; with `follow` until it ends.
    ///
    /// # Errors
    /// As [`Engine::exec`]; [`Error::InvalidTask`] if there is no such job.
    pub async fn logs(
        &self,
        cluster: &str,
        agent: &AgentBinary,
        job: Option<JobId>,
        follow: bool,
    ) -> Result<ClusterLogs> {
        let mut nodes = Vec::new();
        for (instance, transport) in self.connect(cluster).await? {
            nodes.push((
                transport.host(),
                agent_of(&instance, transport, agent).await?,
            ));
        }
        let Some((_, head)) = nodes.first() else {
            return Err(Error::NoSuchCluster {
                name: cluster.to_owned(),
            });
        };
        let jobs = head.queue().await?;
        let wanted = match job {
            None => jobs.last(),
            Some(JobId(id)) => jobs.iter().find(|row| row.id == id),
        };
        let id = wanted.map(|row| row.id).ok_or_else(|| Error::InvalidTask {
            what: match job {
                None => format!("cluster `{cluster}` has no job yet"),
                Some(JobId(id)) => format!("cluster `{cluster}` has no job {id}"),
            },
        })?;
        let mut with_it = Vec::new();
        for (rank, (host, client)) in nodes.into_iter().enumerate() {
            // A task may run on fewer nodes than the cluster has.
            if rank == 0 || client.queue().await?.iter().any(|row| row.head == id) {
                with_it.push((rank, host, client));
            }
        }
        let several = with_it.len() > 1;
        let (sender, lines) = mpsc::channel(BUFFERED_LINES);
        let mut reading = JoinSet::new();
        for (rank, host, client) in with_it {
            let prefix = match several {
                true => format!("(rank {rank}, {host}) "),
                false => String::new(),
            };
            let logs = client.logs(Some(id), follow).await?;
            reading.spawn(pass_on(logs, prefix, sender.clone()));
        }
        Ok(ClusterLogs {
            lines,
            _reading: reading,
        })
    }
}

/// Sends every line of one node until it ends or nobody listens.
async fn pass_on(mut logs: JobLogs, prefix: String, sender: mpsc::Sender<Result<String>>) {
    while let Some(line) = logs.next_line().await.transpose() {
        let is_error = line.is_err();
        let line = line.map(|line| format!("{prefix}{line}"));
        if sender.send(line).await.is_err() || is_error {
            return;
        }
    }
}
