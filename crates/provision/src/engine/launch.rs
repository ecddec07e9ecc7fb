//! Bringing a cluster up: intent first, then the provider, and failover between offers.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

#[cfg(not(all(feature = "agent", any(feature = "local", feature = "ssh"))))]
use self::unguarded::Guardian;
use super::{Engine, LaunchRequest, is_up, row_of};
#[cfg(all(feature = "agent", any(feature = "local", feature = "ssh")))]
use crate::agent::AgentBinary as Guardian;
use crate::error::{Error, Result};
use crate::failover::{Failover, Step};
use crate::launch::no_offer;
use crate::offer::Offer;
use crate::planner::{Plan, chosen};
use crate::provider::{CreateRequest, Instance, InstanceState, Lease, Provider};
use crate::state::{ClusterRow, ClusterStatus, NodeRow, NodeState};
use crate::task::{Task, is_task_name};

/// How often an instance that starts is looked at.
const STARTING: Duration = Duration::from_secs(1);

/// How long a node is held for the others and for its first job, by a client that may die.
const HELD: Duration = Duration::from_secs(60);

/// How long it may take to come up.
const STARTED: Duration = Duration::from_secs(1800);

impl Engine {
    /// Brings up the cluster, or what is missing of it, and waits until every node can be reached.
    ///
    /// A launch that was interrupted is completed by launching again; what it had created is found
    /// by its token.
    ///
    /// # Errors
    /// [`Error::NoOffer`], [`Error::Exhausted`], [`Error::Busy`], or the provider's;
    /// [`Error::LaunchedInPart`] where something runs. What was created before stays recorded, for
    /// another launch or for `down`.
    pub async fn launch(&self, task: &Task, request: &LaunchRequest) -> Result<Vec<Instance>> {
        self.bring_up(task, request, None).await
    }

    /// As [`Engine::launch`], and starts the agent on every node under the cluster's lease as soon as the
    /// node runs: whatever becomes of the rest of the launch and of this process, it ends by itself.
    ///
    /// # Errors
    /// As [`Engine::launch`] and [`Engine::guard`].
    #[cfg(all(feature = "agent", any(feature = "local", feature = "ssh")))]
    pub async fn launch_guarded(
        &self,
        task: &Task,
        request: &LaunchRequest,
        agent: &Guardian,
    ) -> Result<Vec<Instance>> {
        let instances = self.bring_up(task, request, Some(agent)).await?;
        self.link(&request.cluster, agent).await?;
        Ok(instances)
    }

    async fn bring_up(
        &self,
        task: &Task,
        request: &LaunchRequest,
        guardian: Option<&Guardian>,
    ) -> Result<Vec<Instance>> {
        let name = &request.cluster;
        check_name(name)?;
        let _lock = self.state.lock(name)?;
        if self.state.cluster(name)?.is_some() {
            self.reconcile(name).await?;
        }
        // What has ended by itself does not say how a new cluster of its name is.
        let is_there = !self.live(name)?.is_empty();
        let known = self.state.cluster(name)?.filter(|_| is_there);
        let asked = request.num_nodes(task);
        if let Some(row) = known.as_ref().filter(|row| asked > row.num_nodes) {
            return Err(Error::InvalidTask {
                what: format!(
                    "cluster `{name}` has {} nodes, the task asks for {asked}; take it down or launch another",
                    row.num_nodes
                ),
            });
        }
        let row = row_of(request, task, known.as_ref());
        self.state.put_cluster(&row)?;
        match self.make_whole(task, request, &row, guardian).await {
            Ok(instances) => {
                self.state.set_status(name, ClusterStatus::Up)?;
                Ok(instances)
            }
            Err(error) => Err(self.in_part(name, error)?),
        }
    }

    /// Every node of a cluster. Each is readied on its own as soon as it is taken, and held until all
    /// are: the next may be long in coming.
    async fn make_whole(
        &self,
        task: &Task,
        request: &LaunchRequest,
        row: &ClusterRow,
        guardian: Option<&Guardian>,
    ) -> Result<Vec<Instance>> {
        let (sender, mut readied) = mpsc::unbounded_channel();
        let mut holding = JoinSet::new();
        let mut acquired = Ok(());
        for node_rank in 0..row.num_nodes {
            let live = self.live(&row.name)?;
            let taken = match live.iter().find(|node| node.node_rank == node_rank) {
                Some(node) => self.revive(node).await,
                None => self.acquire(task, request, row.lease, node_rank).await,
            };
            let instance = match taken {
                Ok(instance) => instance,
                Err(error) => {
                    acquired = Err(error);
                    break;
                }
            };
            let (engine, ports, lease) = (self.clone(), request.ports(task), row.lease);
            let (guardian, sender) = (guardian.cloned(), sender.clone());
            holding.spawn(async move {
                let made = engine
                    .ready(instance, &ports, lease, guardian.as_ref())
                    .await;
                let held = made.as_ref().ok().cloned();
                let _ = sender.send((node_rank, made)); // nobody waits for it any more
                if let (Some(instance), Some(guardian)) = (held, guardian) {
                    engine.keep_node(&instance, &guardian).await;
                }
            });
        }
        let mut instances = Vec::new();
        for _ in 0..holding.len() {
            if let Some((node_rank, made)) = readied.recv().await {
                instances.push((node_rank, made));
            }
        }
        acquired?;
        instances.sort_by_key(|(node_rank, _)| *node_rank);
        instances.into_iter().map(|(_, made)| made).collect()
    }

    async fn ready(
        &self,
        mut instance: Instance,
        ports: &[u16],
        lease: Lease,
        guardian: Option<&Guardian>,
    ) -> Result<Instance> {
        self.wait_running(&mut instance).await?;
        if let Some(guardian) = guardian {
            self.guard_node(&instance, lease, guardian, HELD).await?;
        }
        self.expose(&instance, ports).await?;
        Ok(instance)
    }

    /// The error of a launch, with what runs although it has failed.
    fn in_part(&self, cluster: &str, error: Error) -> Result<Error> {
        let live = self.live(cluster)?;
        let running: Vec<_> = live
            .iter()
            .filter_map(|node| Some(node.instance.as_ref()?.to_string()))
            .collect();
        Ok(match running.is_empty() {
            true => error,
            false => Error::LaunchedInPart {
                cluster: cluster.to_owned(),
                running: running.join(", "),
                source: error.into(),
            },
        })
    }

    /// A node that is there already; a stopped one is started.
    async fn revive(&self, node: &NodeRow) -> Result<Instance> {
        let provider = self.provider(&node.provider)?;
        let id = node
            .instance
            .as_ref()
            .ok_or_else(|| Error::NoSuchInstance {
                id: node.token.clone(),
            })?;
        let instance = provider.describe(id).await?;
        match provider.stop_start().filter(|_| !is_up(&instance)) {
            Some(_) => self.start_node(node, id).await,
            None => Ok(instance),
        }
    }

    /// A new node, from the first candidate that can be had.
    async fn acquire(
        &self,
        task: &Task,
        request: &LaunchRequest,
        lease: Lease,
        node_rank: u32,
    ) -> Result<Instance> {
        let plan = Plan::for_tasks(task, &request.later, self.offers().await);
        if plan.candidates.is_empty() {
            return Err(no_offer(&plan));
        }
        let mut failover = Failover::new(plan, request.policy);
        loop {
            let offer = match failover.step() {
                Step::Try(offer) => offer,
                Step::Wait(pause) => {
                    tracing::info!(seconds = pause.as_secs(), "trying again after a pause");
                    tokio::time::sleep(pause).await;
                    continue;
                }
                Step::GiveUp => return Err(failover.exhausted()),
            };
            let provider = self.provider(&offer.provider)?;
            warn_unguarded(provider.as_ref());
            // Nothing is asked of a provider that is not written down first.
            let now = SystemTime::now();
            let token = self
                .state
                .intend(&request.cluster, node_rank, &offer, now)?;
            let wanted = chosen(&task.resources, &offer);
            let create = CreateRequest {
                token: token.clone(),
                cluster: request.cluster.clone(),
                offer: offer.clone(),
                lease,
                labels: wanted.labels.clone(),
                disk_size_gib: wanted.disk_size_gib,
            };
            match provider.create(&create).await {
                Ok(instance) => {
                    self.state
                        .created(&token, &instance.id, SystemTime::now())?;
                    tracing::info!(
                        node = node_rank,
                        instance = %instance.id,
                        "taken from {}",
                        offer.provider
                    );
                    return Ok(instance);
                }
                Err(error) if is_ambiguous(&error) => {
                    if let Some(instance) = self.adopt(provider, &offer, &token, &error).await? {
                        return Ok(instance);
                    }
                    // It may still appear: the row stays until `gc` has seen to it.
                    self.state.set_node(&token, NodeState::Abandoned)?;
                    failover.failed(&offer, error)?;
                }
                Err(error) => {
                    self.state.never_was(&token)?;
                    failover.failed(&offer, error)?;
                }
            }
        }
    }

    /// Looks for what a create made whose answer was lost.
    ///
    /// If the provider cannot say, trying another would risk two machines: `error` is returned and
    /// the intent stays.
    async fn adopt(
        &self,
        provider: &Arc<dyn Provider>,
        offer: &Offer,
        token: &str,
        error: &Error,
    ) -> Result<Option<Instance>> {
        let owned = provider.list_owned(Some(offer)).await.inspect_err(|_| {
            tracing::warn!(%error, token, "unknown whether an instance was created; gc will tell");
        })?;
        let Some(instance) = owned.into_iter().find(|instance| instance.token == token) else {
            return Ok(None);
        };
        self.state.created(token, &instance.id, SystemTime::now())?;
        Ok(Some(instance))
    }

    /// Opens the tasks' ports, where the provider keeps them shut.
    async fn expose(&self, instance: &Instance, ports: &[u16]) -> Result<()> {
        let nodes = self.state.open_nodes()?;
        let Some(node) = nodes.iter().find(|node| node.token == instance.token) else {
            return Ok(());
        };
        if let Some(power) = self.provider(&node.provider)?.ports() {
            for port in ports {
                let address = power.expose(&instance.id, *port).await?;
                tracing::info!(port, address, "open to the net");
            }
        }
        Ok(())
    }

    async fn wait_running(&self, instance: &mut Instance) -> Result<()> {
        let nodes = self.state.open_nodes()?;
        let node = nodes.iter().find(|node| node.token == instance.token);
        let begun = tokio::time::Instant::now();
        while let (Some(node), InstanceState::Starting) = (node, instance.state) {
            let provider = self.provider(&node.provider)?;
            if begun.elapsed() >= STARTED {
                return Err(Error::Unavailable {
                    provider: provider.name(),
                    operation: "start an instance",
                    source: format!("{} has not come up in half an hour", instance.id).into(),
                });
            }
            tokio::time::sleep(STARTING).await;
            *instance = provider.describe(&instance.id).await?;
        }
        Ok(())
    }
}

/// A cluster's name is part of names of instances, files and hosts.
fn check_name(cluster: &str) -> Result<()> {
    if is_task_name(cluster) && !cluster.contains('.') {
        return Ok(());
    }
    Err(Error::InvalidTask {
        what: format!(
            "cluster name `{cluster}` must be letters and digits, with single or double - or _ between them"
        ),
    })
}

/// Builds without the agent launch and guard nothing.
#[cfg(not(all(feature = "agent", any(feature = "local", feature = "ssh"))))]
mod unguarded {
    use super::{Duration, Engine, Instance, Lease, Result};

    #[derive(Debug, Clone)]
    pub(super) enum Guardian {}

    impl Engine {
        pub(super) async fn guard_node(
            &self,
            _instance: &Instance,
            _lease: Lease,
            nobody: &Guardian,
            _held: Duration,
        ) -> Result<()> {
            match *nobody {}
        }

        pub(super) async fn keep_node(&self, _instance: &Instance, nobody: &Guardian) {
            match *nobody {}
        }
    }
}

/// Whether a failed create may have created something.
fn is_ambiguous(error: &Error) -> bool {
    matches!(
        error,
        Error::Unavailable { .. } | Error::Transport { .. } | Error::Io { .. }
    )
}

fn warn_unguarded(provider: &dyn Provider) {
    if provider.guards().only_reaper() {
        tracing::warn!(
            provider = provider.name(),
            "nothing but this client ends a forgotten instance of this provider"
        );
    }
}
