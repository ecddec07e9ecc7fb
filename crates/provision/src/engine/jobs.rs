//! Jobs on a cluster's nodes, through their agents.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::Engine;
use crate::agent::{AgentBinary, AgentClient, JobRow, JobSpec, NodeSetup, QueueStatus};
use crate::error::{Error, Result};
use crate::provider::{Endpoint, Instance, Lease};
use crate::resources::{Accelerator, Alternatives, Resources};
use crate::state::ClusterLock;
use crate::sync::{Syncer, WORKDIR, client_path, mount_files};
use crate::task::Task;
use crate::transport::HostTransport;

/// How long a node is kept from ending itself by a client that has died while bringing files.
pub(super) const HOLD: Duration = Duration::from_secs(60);

/// How long a cluster may be out of reach before nobody waits for its job any more.
const SILENCE: Duration = Duration::from_secs(600);

/// How often a client that waits for another's job to be queued looks.
const TURN: Duration = Duration::from_millis(50);

/// How a task becomes a job.
#[derive(Debug, Clone)]
pub struct ExecOptions {
    /// Whether mounts are copied and `setup` runs: for `launch`, not for `exec`.
    pub setup: bool,
    /// The folder that relative paths of the task are under: where its client was called.
    pub base: PathBuf,
}

/// A job as the whole cluster sees it: its number on the head node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobId(pub i64);

impl Engine {
    /// Copies the task's files to every node of the cluster and queues it there: behind the same jobs on
    /// every node, whoever else queues at this moment. Its commands begin on a node when every node is
    /// through with its setup.
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
        let mut ways = self.connect(cluster).await?;
        let wanted = task.num_nodes.max(1) as usize;
        if wanted > ways.len() {
            return Err(Error::InvalidTask {
                what: format!(
                    "the task asks for {wanted} nodes, cluster `{cluster}` has {}",
                    ways.len()
                ),
            });
        }
        ways.truncate(wanted);
        let gpus = self.gpus(cluster)?;
        let asked = self.gpus_of(cluster, task)?;
        let addresses: Vec<_> = ways.iter().map(|(instance, _)| address(instance)).collect();
        let mut preparing = JoinSet::new();
        for (rank, (instance, transport)) in ways.into_iter().enumerate() {
            let (task, agent, options) = (task.clone(), agent.clone(), options.clone());
            preparing.spawn(async move {
                let node = Node {
                    instance,
                    transport,
                    gpus,
                };
                let client = node.prepare(&task, &agent, &options, &row.lease).await?;
                Ok::<_, Error>((rank, client))
            });
        }
        let mut clients = Vec::new();
        while let Some(prepared) = preparing.join_next().await {
            let prepared = prepared.map_err(|error| Error::Transport {
                host: cluster.to_owned(),
                source: error.into(),
            })?;
            clients.push(prepared?);
        }
        clients.sort_by_key(|(rank, _)| *rank);
        if wanted > 1 {
            self.link(cluster, agent).await?; // they begin together
        }
        let _turn = self.turn(cluster).await?;
        let mut head = None;
        for (rank, (_, client)) in clients.iter().enumerate() {
            let spec = JobSpec {
                head,
                ..spec(task, options.setup, &row.name, rank, &addresses, asked)
            };
            match client.submit(&spec).await {
                Ok(id) => drop(head.get_or_insert(id)),
                Err(error) => {
                    withdraw(head, &clients[..rank]).await;
                    return Err(error);
                }
            }
        }
        head.map(JobId).ok_or_else(|| Error::NoSuchCluster {
            name: cluster.to_owned(),
        })
    }

    /// Waits until no other client queues a job on the cluster: on every node they wait in one order, or
    /// each of two jobs would hold what the other needs.
    async fn turn(&self, cluster: &str) -> Result<ClusterLock> {
        loop {
            // No cluster has a dot in its name.
            match self.state.lock(&format!("{cluster}.queue")) {
                Err(Error::Busy { .. }) => tokio::time::sleep(TURN).await,
                taken => return taken,
            }
        }
    }

    /// The jobs of a cluster, by number; one of several nodes is what it is on all of them.
    ///
    /// # Errors
    /// As [`Engine::exec`].
    pub async fn queue(&self, cluster: &str, agent: &AgentBinary) -> Result<Vec<JobRow>> {
        let mut jobs: Vec<JobRow> = Vec::new();
        for (rank, (instance, transport)) in self.connect(cluster).await?.into_iter().enumerate() {
            let rows = agent_of(&instance, transport, agent).await?.queue().await?;
            if rank == 0 {
                jobs = rows;
                continue;
            }
            for row in &rows {
                if let Some(job) = jobs.iter_mut().find(|job| job.id == row.head) {
                    job.join(row);
                }
            }
        }
        Ok(jobs)
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
            let client = agent_of(&instance, transport, agent).await?;
            let cancelled = client.cancel(job.map(|job| job.0)).await?;
            count.get_or_insert(cancelled);
        }
        Ok(count.unwrap_or_default())
    }

    /// Waits until a job has its final status. One that has failed on a node is cancelled on the
    /// others, which may wait for it.
    ///
    /// # Errors
    /// As [`Engine::exec`]; [`Error::InvalidTask`] if there is no such job.
    pub async fn wait(&self, cluster: &str, agent: &AgentBinary, job: JobId) -> Result<JobRow> {
        let mut heard = Instant::now();
        loop {
            let row = match self.queue(cluster, agent).await {
                Err(error) if is_passing(&error) && heard.elapsed() < SILENCE => {
                    tracing::warn!(cluster, %error, "not heard of; the job may go on");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
                answer => answer?,
            };
            heard = Instant::now();
            let row = row.into_iter().find(|row| row.id == job.0);
            let row = row.ok_or_else(|| Error::InvalidTask {
                what: format!("cluster `{cluster}` has no job {}", job.0),
            })?;
            if row.status.is_final() {
                if row.status != QueueStatus::Succeeded && self.row(cluster)?.num_nodes > 1 {
                    self.cancel(cluster, agent, Some(job)).await?;
                }
                return Ok(row);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The accelerators of a cluster's nodes.
    pub(super) fn gpus(&self, cluster: &str) -> Result<u32> {
        let live = self.live(cluster)?;
        let accelerator = live
            .first()
            .and_then(|node| node.offer.accelerator.as_ref());
        Ok(accelerator.map_or(0, |accelerator| accelerator.count))
    }

    /// How many of them a task takes on each node.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] if the nodes have none of its choices.
    fn gpus_of(&self, cluster: &str, task: &Task) -> Result<u32> {
        let live = self.live(cluster)?;
        let have = live
            .first()
            .and_then(|node| node.offer.accelerator.as_ref());
        let choices = choices(&task.resources);
        if choices.is_empty() {
            return Ok(0);
        }
        let fits = |choice: &&Accelerator| {
            have.is_some_and(|have| {
                have.name.eq_ignore_ascii_case(&choice.name) && have.count >= choice.count
            })
        };
        let chosen = choices
            .iter()
            .filter(fits)
            .max_by_key(|choice| choice.count);
        let chosen = chosen.map(|choice| choice.count);
        let or_none = does_without(&task.resources).then_some(0);
        chosen.or(or_none).ok_or_else(|| {
            let words: Vec<_> = choices.iter().map(ToString::to_string).collect();
            Error::InvalidTask {
                what: format!(
                    "the task asks for {}, nodes of cluster `{cluster}` have {}; ask for less or launch another",
                    words.join(" or "),
                    have.map_or("no accelerator".to_owned(), ToString::to_string),
                ),
            }
        })
    }
}

/// Every accelerator that would do, those of alternatives included.
fn choices(resources: &Resources) -> Vec<Accelerator> {
    match &resources.alternatives {
        Alternatives::None => resources.accelerators.choices().to_vec(),
        Alternatives::AnyOf(all) | Alternatives::Ordered(all) => {
            all.iter().flat_map(choices).collect()
        }
    }
}

/// Whether one of the alternatives needs no accelerator.
fn does_without(resources: &Resources) -> bool {
    match &resources.alternatives {
        Alternatives::None => resources.accelerators.choices().is_empty(),
        Alternatives::AnyOf(all) | Alternatives::Ordered(all) => all.iter().any(does_without),
    }
}

/// Takes a job back from the nodes that have it, when another could not be given it.
async fn withdraw(head: Option<i64>, clients: &[(usize, AgentClient)]) {
    for (_, client) in clients {
        if let Err(error) = client.cancel(head).await {
            tracing::warn!(%error, "a part of the job was not cancelled; cancel it by its number");
        }
    }
}

/// Whether a node may answer again: its connection was lost, or it is starting anew.
fn is_passing(error: &Error) -> bool {
    matches!(error, Error::Unavailable { .. } | Error::Transport { .. })
}

/// A node that is to run a job.
struct Node {
    instance: Instance,
    transport: Arc<dyn HostTransport>,
    gpus: u32,
}

impl Node {
    /// Starts the agent under the cluster's lease, then brings the task's files.
    async fn prepare(
        &self,
        task: &Task,
        agent: &AgentBinary,
        options: &ExecOptions,
        lease: &Lease,
    ) -> Result<AgentClient> {
        let client = agent_of(&self.instance, self.transport.clone(), agent).await?;
        client.hold(HOLD.as_secs()).await?;
        let setup = NodeSetup::of(self.instance.endpoint.as_ref(), self.gpus);
        client.start(&setup).await?;
        client.set_lease(lease).await?;
        let bringing = self.bring(task, options);
        tokio::pin!(bringing);
        loop {
            tokio::select! {
                brought = &mut bringing => return brought.map(|()| client),
                () = tokio::time::sleep(HOLD / 3) => client.hold(HOLD.as_secs()).await?,
            }
        }
    }

    async fn bring(&self, task: &Task, options: &ExecOptions) -> Result<()> {
        let syncer = Syncer::new(self.instance.endpoint.clone(), self.transport.clone());
        if let Some(workdir) = &task.workdir {
            let from = client_path(workdir, &options.base);
            tracing::info!(host = self.transport.host(), "copying {}", from.display());
            syncer.folder(&from, WORKDIR).await?;
        }
        if options.setup && !task.file_mounts.is_empty() {
            tracing::info!(host = self.transport.host(), "copying file mounts");
            mount_files(&syncer, &options.base, &task.file_mounts).await?;
        }
        Ok(())
    }
}

/// The agent of a node: in place on this machine, copied to any other.
pub(super) async fn agent_of(
    instance: &Instance,
    transport: Arc<dyn HostTransport>,
    agent: &AgentBinary,
) -> Result<AgentClient> {
    match &instance.endpoint {
        Some(Endpoint::Local { .. }) => Ok(AgentClient::new(transport, agent.here())),
        _ => AgentClient::installed(transport, agent).await,
    }
}

/// Where the other nodes of its cluster find an instance.
pub(super) fn address(instance: &Instance) -> String {
    match &instance.endpoint {
        Some(Endpoint::Ssh { target, .. }) => target.host.clone(),
        _ => "127.0.0.1".to_owned(),
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
    JobSpec {
        name: task.name.clone(),
        setup: task.setup.clone().filter(|_| setup),
        run: task.run.clone(),
        environment,
        workdir: Some(WORKDIR.to_owned()), // with or without files of the task in it
        gpus,
        head: None,
        nodes: task.num_nodes.max(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::EnvOverrides;
    use crate::{FailoverPolicy, Fake, LaunchRequest, Offer, State};

    #[tokio::test]
    async fn a_task_takes_the_choice_that_the_node_has() {
        let dir = tempfile::tempdir().expect("folder");
        let state = Arc::new(State::open(dir.path()).expect("state"));
        let offer = Offer {
            provider: "fake".into(),
            instance_type: "g".into(),
            region: "r".into(),
            zone: None,
            cpus: 8.0,
            memory_gib: 32.0,
            disk_gib: None,
            accelerator: Some(Accelerator::new("L4", 4)),
            spot: false,
            usd_per_hour: 1.0,
        };
        let engine = Engine::new(state, vec![Arc::new(Fake::with_offers(vec![offer]))]);
        let parse = |yaml: &str| Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml);
        let request = LaunchRequest {
            later: Vec::new(),
            cluster: "c".into(),
            lease: None,
            policy: FailoverPolicy::default(),
        };
        engine.launch(&parse("{}"), &request).await.expect("launch");
        for (resources, taken) in [
            ("{}", Some(0)),
            ("{accelerators: l4:2}", Some(2)),
            ("{accelerators: [A100:8, L4:1]}", Some(1)),
            ("{accelerators: {A100: 8, L4: 4}}", Some(4)),
            (
                "{any_of: [{accelerators: A100:8}, {accelerators: L4:2}]}",
                Some(2),
            ),
            ("{ordered: [{accelerators: A100:8}, {cpus: 2+}]}", Some(0)),
            ("{accelerators: L4:8}", None),
            ("{accelerators: A100:1}", None),
        ] {
            let task = parse(&format!("resources: {resources}\n"));
            let got = engine.gpus_of("c", &task);
            assert_eq!(got.as_ref().ok(), taken.as_ref(), "{resources}: {got:?}");
        }
        let spec = spec(&parse("run: x\n"), false, "c", 0, &["h".to_owned()], 2);
        assert_eq!(spec.environment["SKYPILOT_NUM_GPUS_PER_NODE"], "2");
    }
}
