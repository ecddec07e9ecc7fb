//! A job's output from all its nodes, as it comes.

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::jobs::agent_of;
use super::{Engine, JobId};
use crate::agent::{AgentBinary, JobLogs, JobRow, QueueStatus};
use crate::error::{Error, Result};

/// Lines that may wait for a slow reader.
const BUFFERED_LINES: usize = 256;

/// A job's log as it comes; where it runs on several nodes, each line says which it is from.
#[derive(Debug)]
pub struct ClusterLogs {
    said: mpsc::Receiver<Said>,
    ended: Option<JobRow>,
    /// How many nodes have not said what has become of the job.
    open: usize,
    _reading: JoinSet<()>,
}

/// What a node says.
#[derive(Debug)]
enum Said {
    Line(Result<String>),
    Ended(JobRow),
}

impl ClusterLogs {
    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Transport`] if there is no such job or a node was lost.
    pub async fn next_line(&mut self) -> Result<Option<String>> {
        loop {
            match self.said.recv().await {
                Some(Said::Line(line)) => return line.map(Some),
                Some(Said::Ended(row)) => {
                    self.open -= 1;
                    match &mut self.ended {
                        Some(ended) => ended.join(&row),
                        None => self.ended = Some(row),
                    }
                }
                None => return Ok(None),
            }
        }
    }

    /// What has become of the job on all its nodes, once a log that was followed is at its end. Its
    /// nodes may be gone by then.
    pub fn ended(&self) -> Option<&JobRow> {
        self.ended.as_ref().filter(|_| self.open == 0)
    }
}

impl Engine {
    /// The log of a job, of the newest when `None`; with `follow` until it ends. A job that is followed
    /// and fails on one of its nodes is cancelled on the others, which may wait for it.
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
        let open = with_it.len();
        let (sender, said) = mpsc::channel(BUFFERED_LINES);
        let mut reading = JoinSet::new();
        for (rank, host, client) in with_it {
            let prefix = match several {
                true => format!("(rank {rank}, {host}) "),
                false => String::new(),
            };
            let logs = client.logs(Some(id), follow).await?;
            let (engine, agent, sender) = (self.clone(), agent.clone(), sender.clone());
            let cluster = cluster.to_owned();
            reading.spawn(async move {
                let ended = pass_on(logs, prefix, &sender).await;
                let has_failed = ended.is_some_and(|status| status != QueueStatus::Succeeded);
                if several && has_failed {
                    let cancelled = engine.cancel(&cluster, &agent, Some(JobId(id))).await;
                    if let Err(error) = cancelled {
                        tracing::warn!(cluster, %error, "not cancelled on the other nodes");
                    }
                }
            });
        }
        Ok(ClusterLogs {
            said,
            ended: None,
            open,
            _reading: reading,
        })
    }
}

/// Sends everything that one node says until it ends or nobody listens; returns what has become of
/// the job.
async fn pass_on(
    mut logs: JobLogs,
    prefix: String,
    sender: &mpsc::Sender<Said>,
) -> Option<QueueStatus> {
    while let Some(line) = logs.next_line().await.transpose() {
        let is_error = line.is_err();
        let line = line.map(|line| format!("{prefix}{line}"));
        if sender.send(Said::Line(line)).await.is_err() || is_error {
            return None;
        }
    }
    let row = logs.ended()?.clone();
    let status = row.status;
    sender.send(Said::Ended(row)).await.ok()?;
    Some(status)
}
