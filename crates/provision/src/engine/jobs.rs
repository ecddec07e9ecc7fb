//! Jobs on a cluster's nodes, through their agents.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use crate::agent::{AgentBinary, AgentClient, AgentLease, JobLogs, JobRow, JobSpec, NodeSetup};
use crate::error::{Error, Result};
use crate::provider::{Endpoint, Instance, Lease};
use crate::resources::WaitFor;
use crate::sync::{Syncer, WORKDIR, mount_files};
use crate::task::Task;
use crate::transport::HostTransport;

/// How a task becomes
/// How a task becomes a job.
#[derive(Debug, Clone)]
pub struct ExecOptions {
    /// Whether mounts are copied and `setup` runs: for `launch`, not for `exec`.
    pub setup: bool,
    /// The folder that relative paths of the task are under: where its client was called.
    pub base: PathBuf,
}

/// A job as the whole cluster sees it: the head node's, and how many nodes have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobId(pub i64);

impl Engine {
    /// Copies the task's files to every node of the cluster and queues it there.
    ///
    /// # Errors
    /// [`Error::NoSuchCluster`], [`Error::Transport`], [`Error::Io`].
    pub async fn exec(
        &self,
        cluster: &str,
        task: &Task,
        agent: &AgentBinary,
        options: &ExecOptions,
    ) -> Result<JobId> {
        let row = self.row(cluster)?;
        let ways = self.connect(cluster).await?;
        let wanted = task.num_nodes.max(1) as usize;
        if wanted > ways.len() {
            return Err(Error::InvalidTask {
                what: format!(
                    "the task asks for {wanted} nodes, cluster `{cluster}` has {}",
                    ways.len()
                ),
            });
        }
        let gpus = self.gpus(cluster)?;
        let addresses: Vec<_> = ways.iter().map(|(instance, _)| address(instance)).collect();
        let autostop = task.resources.autostop;
        let wait_for = autostop.map_or(WaitFor::default(), |autostop| autostop.wait_for);
        let mut head = None;
        for (rank, (instance, transport)) in ways.into_iter().enumerate().take(wanted) {
            let syncer = Syncer::new(instance.endpoint.clone(), transport.clone());
            if let Some(workdir) = &task.workdir {
                syncer
                    .folder(&folder(workdir, &options.base), WORKDIR)
                    .await?;
            }
            if options.setup {
                mount_files(&syncer, &options.base, &task.file_mounts).await?;
            }
            let client = client(&instance, transport, agent).await?;
            client
                .start(&NodeSetup::of(instance.endpoint.as_ref(), gpus))
                .await?;
            if options.setup {
                client
                    .set_lease(&AgentLease::new(row.lease, wait_for))
                    .await?;
            }
            let spec = spec(task, options.setup, &row.name, rank, &addresses, gpus);
            let id = client.submit(&spec).await?;
            head.get_or_insert(JobId(id));
        }
        head.ok_or_else(|| Error::NoSuchCluster {
            name: cluster.to_owned(),
        })
    }

    /// The head node's agent, which knows every job.
    async fn head(&self, cluster: &str, agent: &AgentBinary) -> Result<AgentClient> {
        let way = self.connect(cluster).await?.into_iter().next();
        let (instance, transport) = way.ok_or_else(|| Error::NoSuchCluster {
            name: cluster.to_owned(),
        })?;
        client(&instance, transport, agent).await
    }

    /// The jobs of a cluster, by number.
    ///
    /// # Errors
    /// As [`Engine::exec`].
    pub async fn queue(&self, cluster: &str, agent: &AgentBinary) -> Result<Vec<JobRow>> {
        self.head(cluster, agent).await?.queue().await
    }

    /// The log of a job, of the newest when `None`; with `follow` until it ends.
    ///
    /// # Errors
    /// As [`Engine::exec`].
    pub async fn logs(
        &self,
        cluster: &str,
        agent: &AgentBinary,
        job: Option<JobId>,
        follow: bool,
    ) -> Result<JobLogs> {
        let head = self.head(cluster, agent).await?;
        head.logs(job.map(|job| job.0), follow).await
    }

    /// Cancels a job, or all of them, on every node; returns how many there were on the head.
    ///
    /// # Errors
    /// As [`Engine::exec`].
    pub async fn cancel(
        &self,
        cluster: &str,
        agent: &AgentBinary,
        job: Option<JobId>,
    ) -> Result<u64> {
        let mut count = None;
        for (instance, transport) in self.connect(cluster).await? {
            let client = client(&instance, transport, agent).await?;
            let cancelled = client.cancel(job.map(|job| job.0)).await?;
            count.get_or_insert(cancelled);
        }
        Ok(count.unwrap_or_default())
    }

    /// Waits until a job has its final status.
    ///
    /// # Errors
    /// As [`Engine::exec`]; [`Error::InvalidTask`] if there is no such job.
    pub async fn wait(&self, cluster: &str, agent: &AgentBinary, job: JobId) -> Result<JobRow> {
        let head = self.head(cluster, agent).await?;
        loop {
            let row = head.queue().await?.into_iter().find(|row| row.id == job.0);
            let row = row.ok_or_else(|| Error::InvalidTask {
                what: format!("cluster `{cluster}` has no job {}", job.0),
            })?;
            if row.status.is_final() {
                return Ok(row);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Changes when a cluster's nodes end by themselves, in the books and on the nodes.
    ///
    /// # Errors
    /// As [`Engine::exec`].
    pub async fn autostop(
        &self,
        cluster: &str,
        agent: &AgentBinary,
        lease: Lease,
        wait_for: WaitFor,
    ) -> Result<()> {
        for (instance, transport) in self.connect(cluster).await? {
            let client = client(&instance, transport, agent).await?;
            client.set_lease(&AgentLease::new(lease, wait_for)).await?;
        }
        self.set_lease(cluster, lease)
    }

    /// The accelerators of a cluster's nodes.
    fn gpus(&self, cluster: &str) -> Result<u32> {
        let live = self.live(cluster)?;
        let accelerator = live
            .first()
            .and_then(|node| node.offer.accelerator.as_ref());
        Ok(accelerator.map_or(0, |accelerator| accelerator.count))
    }
}

/// The agent of a node: in place on this machine, copied to any other.
async fn client(
    instance: &Instance,
    transport: Arc<dyn HostTransport>,
    agent: &AgentBinary,
) -> Result<AgentClient> {
    match &instance.endpoint {
        Some(Endpoint::Local { .. }) => Ok(AgentClient::new(transport, agent.here())),
        _ => AgentClient::installed(transport, agent).await,
    }
}

fn address(instance: &Instance) -> String {
    match &instance.endpoint {
        Some(Endpoint::Ssh { target, .. }) => target.host.clone(),
        _ => "127.0.0.1".to_owned(),
    }
}

fn folder(workdir: &str, base: &Path) -> PathBuf {
    match (workdir.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => base.join(workdir),
    }
}

fn spec(
    task: &Task,
    setup: bool,
    cluster: &str,
    rank: usize,
    addresses: &[String],
    gpus: u32,
) -> JobSpec {
    let mut environment = std::collections::BTreeMap::from([
        ("SKYPILOT_NUM_NODES", task.num_nodes.max(1).to_string()),
        ("SKYPILOT_NODE_RANK", rank.to_string()),
        (
            "SKYPILOT_NODE_IPS",
            addresses[..task.num_nodes.max(1) as usize].join("\n"),
        ),
        ("SKYPILOT_NUM_GPUS_PER_NODE", gpus.to_string()),
        (
            "SKYPILOT_CLUSTER_INFO",
            format!("{{\"cluster_name\": \"{cluster}\"}}"),
        ),
        ("UPDRAFT_CLUSTER", cluster.to_owned()),
    ])
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect::<std::collections::BTreeMap<_, _>>();
    let given = task.environment();
    environment.extend(
        given
            .into_iter()
            .map(|(name, value)| (name, value.expose().clone())),
    );
    // A task takes what it asks for of the node's accelerators: the choice that the node is.
    let asked = task
        .resources
        .accelerators
        .choices()
        .iter()
        .map(|choice| choice.count);
    JobSpec {
        name: task.name.clone(),
        setup: task.setup.clone().filter(|_| setup),
        run: task.run.clone(),
        environment,
        workdir: task.workdir.is_some().then(|| WORKDIR.to_owned()),
        gpus: asked.max().unwrap_or(0).min(gpus),
    }
}
