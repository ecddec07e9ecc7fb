//! Clusters over any providers, none of whose instances is ever forgotten.

mod collect;
#[cfg(all(feature = "agent", any(feature = "local", feature = "ssh")))]
mod jobs;
mod launch;
#[cfg(all(feature = "agent", any(feature = "local", feature = "ssh")))]
mod lease;
#[cfg(all(feature = "agent", any(feature = "local", feature = "ssh")))]
mod logs;
#[cfg(test)]
mod tests;

#[cfg(all(feature = "agent", any(feature = "local", feature = "ssh")))]
pub use jobs::{ExecOptions, JobId};
#[cfg(all(feature = "agent", any(feature = "local", feature = "ssh")))]
pub use logs::ClusterLogs;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::capability::StopStart;
use crate::error::{Error, Result, unfinished};
use crate::failover::FailoverPolicy;
use crate::launch::connect;
use crate::offer::Offer;
use crate::provider::{Instance, InstanceId, InstanceState, Lease, Provider};
use crate::state::{ClusterRow, ClusterStatus, NodeRow, NodeState, State};
use crate::task::Task;
use crate::transport::HostTransport;

/// How long `down` waits for providers to confirm, and how often it asks.
const CONFIRM_TRIES: u32 = 60;
const CONFIRM_PAUSE: Duration = Duration::from_secs(1);

/// Launches, finds and ends clusters, and keeps the books.
#[derive(Debug, Clone)]
pub struct Engine {
    state: Arc<State>,
    providers: Vec<Arc<dyn Provider>>,
    ways: Ways,
}

/// The ways to nodes that are open, so that none is opened twice.
type Ways = Arc<Mutex<BTreeMap<InstanceId, Arc<dyn HostTransport>>>>;

/// What to launch.
#[derive(Debug, Clone)]
pub struct LaunchRequest {
    /// The cluster's name.
    pub cluster: String,
    /// When its instances end by themselves; `None` leaves a cluster that is there as it is.
    pub lease: Option<Lease>,
    /// How long to try.
    pub policy: FailoverPolicy,
    /// The tasks that will run on it after the one it is launched for: its nodes fit them too.
    pub later: Vec<Task>,
}

impl LaunchRequest {
    /// How many nodes the largest of the tasks needs.
    fn num_nodes(&self, first: &Task) -> u32 {
        let tasks = self.later.iter().chain([first]);
        tasks.map(|task| task.num_nodes).max().unwrap_or(1).max(1)
    }

    /// Every port that one of the tasks listens on.
    fn ports(&self, first: &Task) -> Vec<u16> {
        let tasks = std::iter::once(first).chain(&self.later);
        let mut ports: Vec<u16> = tasks
            .flat_map(|task| task.resources.ports.iter().copied())
            .collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }
}

/// A cluster with its instances as their providers describe them.
#[derive(Debug, Clone)]
pub struct ClusterReport {
    /// As recorded.
    pub row: ClusterRow,
    /// Its instances by rank; `None` where the provider was not asked.
    pub nodes: Vec<(NodeRow, Option<Instance>)>,
}

/// What one cluster has cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CostLine {
    /// The cluster.
    pub cluster: String,
    /// The machine types it ran on.
    pub instance_type: String,
    /// The instances it had, those that are gone included.
    pub instances: u32,
    /// Whether one still runs.
    pub running: bool,
    /// Whether one is stopped.
    pub stopped: bool,
    /// The sum of the hours they ran; stopped ones do not.
    pub hours: f64,
    /// Hours times list price.
    pub usd: f64,
}

impl Engine {
    /// Keeps books in `state` about instances of `providers`.
    pub fn new(state: Arc<State>, providers: Vec<Arc<dyn Provider>>) -> Self {
        Self {
            state,
            providers,
            ways: Ways::default(),
        }
    }

    /// The books.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// The provider of that name.
    ///
    /// # Errors
    /// [`Error::NoSuchProvider`].
    pub fn provider(&self, name: &str) -> Result<&Arc<dyn Provider>> {
        let found = self
            .providers
            .iter()
            .find(|provider| provider.name() == name);
        found.ok_or_else(|| Error::NoSuchProvider {
            name: name.to_owned(),
            known: self.provider_names().join(", "),
        })
    }

    /// The names of the providers at hand.
    pub fn provider_names(&self) -> Vec<&'static str> {
        self.providers
            .iter()
            .map(|provider| provider.name())
            .collect()
    }

    /// What every provider offers now; one that does not answer is left out with a warning.
    pub async fn offers(&self) -> Vec<Offer> {
        let mut offers = Vec::new();
        for provider in &self.providers {
            match provider.offers().await {
                Ok(more) => offers.extend(more),
                Err(error) => {
                    tracing::warn!(provider = provider.name(), %error, "no offers");
                }
            }
        }
        offers
    }

    /// Asks every provider whether it can be used: its name, and what it said.
    pub async fn check(&self) -> Vec<(&'static str, Result<usize>)> {
        let mut answers = Vec::new();
        for provider in &self.providers {
            let offers = provider.offers().await;
            answers.push((provider.name(), offers.map(|offers| offers.len())));
        }
        answers
    }

    /// The clusters as recorded, and with `refresh` as their providers say; what is gone is recorded.
    ///
    /// # Errors
    /// [`Error::State`], or a provider's.
    pub async fn status(&self, refresh: bool) -> Result<Vec<ClusterReport>> {
        if refresh {
            for cluster in self.state.clusters()? {
                // One that another process works on is left to it.
                if let Ok(_lock) = self.state.lock(&cluster.name) {
                    collect::reached(&cluster.name, self.reconcile(&cluster.name).await)?;
                }
            }
        }
        let nodes = self.state.open_nodes()?;
        let mut reports = Vec::new();
        for row in self.state.clusters()? {
            let mut own = Vec::new();
            for node in nodes.iter().filter(|node| node.cluster == row.name) {
                own.push((node.clone(), self.describe(node).await));
            }
            reports.push(ClusterReport { row, nodes: own });
        }
        Ok(reports)
    }

    async fn describe(&self, node: &NodeRow) -> Option<Instance> {
        let provider = self.provider(&node.provider).ok()?;
        provider.describe(node.instance.as_ref()?).await.ok()
    }

    /// The ways to a running cluster's nodes, by rank.
    ///
    /// # Errors
    /// [`Error::NoSuchCluster`]; [`Error::InvalidTask`] if it does not run.
    pub async fn connect(&self, cluster: &str) -> Result<Vec<(Instance, Arc<dyn HostTransport>)>> {
        let row = self.row(cluster)?;
        if row.status != ClusterStatus::Up {
            return Err(Error::InvalidTask {
                what: format!("cluster `{cluster}` is not up; start or launch it"),
            });
        }
        let mut ways = Vec::new();
        for node in self.live(cluster)? {
            let provider = self.provider(&node.provider)?;
            if let Some(id) = &node.instance {
                let instance = provider.describe(id).await?;
                if instance.state == InstanceState::Stopped {
                    return Err(Error::InvalidTask {
                        what: format!("cluster `{cluster}` has stopped itself; start it"),
                    });
                }
                let transport = self.way(&instance)?;
                ways.push((instance, transport));
            }
        }
        Ok(ways)
    }

    /// The way to an instance: the one that is open, or a new one.
    fn way(&self, instance: &Instance) -> Result<Arc<dyn HostTransport>> {
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(way) = ways.get(&instance.id) {
            return Ok(way.clone());
        }
        let way = connect(instance)?;
        ways.insert(instance.id.clone(), way.clone());
        Ok(way)
    }

    fn forget_way(&self, id: &InstanceId) {
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        ways.remove(id);
    }

    /// Stops a cluster's instances; their files stay. Every one is tried, whatever the others say.
    ///
    /// # Errors
    /// [`Error::NoSuchCluster`]; [`Error::NotCapable`] if a provider cannot; [`Error::Unfinished`].
    pub async fn stop(&self, cluster: &str) -> Result<()> {
        let _lock = self.state.lock(cluster)?;
        self.row(cluster)?;
        let mut failed = Vec::new();
        for node in self.live(cluster)? {
            if let Some(id) = &node.instance
                && let Err(error) = self.stop_node(&node, id).await
            {
                failed.push((id.to_string(), error));
            }
        }
        unfinished("stop", failed)?;
        self.state.set_status(cluster, ClusterStatus::Stopped)
    }

    /// Starts a stopped cluster's instances again.
    ///
    /// # Errors
    /// As [`Engine::stop`].
    pub async fn start(&self, cluster: &str) -> Result<()> {
        let _lock = self.state.lock(cluster)?;
        self.row(cluster)?;
        for node in self.live(cluster)? {
            if let Some(id) = &node.instance {
                self.start_node(&node, id).await?;
            }
        }
        self.state.set_status(cluster, ClusterStatus::Up)
    }

    async fn stop_node(&self, node: &NodeRow, id: &InstanceId) -> Result<()> {
        self.power(node, "stop")?.stop(id).await?;
        self.state.seen(&node.token, true, SystemTime::now())
    }

    async fn start_node(&self, node: &NodeRow, id: &InstanceId) -> Result<Instance> {
        let instance = self.power(node, "start")?.start(id).await?;
        self.state.seen(&node.token, false, SystemTime::now())?;
        Ok(instance)
    }

    fn power(&self, node: &NodeRow, verb: &'static str) -> Result<&dyn StopStart> {
        let power = self.provider(&node.provider)?.stop_start();
        power.ok_or_else(|| Error::NotCapable {
            provider: node.provider.clone(),
            verb,
        })
    }

    /// Whether a provider has taken an instance of the cluster back, now or before.
    ///
    /// # Errors
    /// [`Error::State`], or a provider's.
    pub async fn was_preempted(&self, cluster: &str) -> Result<bool> {
        for node in self.state.all_nodes()? {
            let is_spot = node.cluster == cluster && node.offer.spot;
            if let (true, Some(id)) = (is_spot, &node.instance)
                && let Some(market) = self.provider(&node.provider)?.spot_market()
                && market.was_preempted(id).await?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What every cluster has cost until `now`, by name: the time that its instances ran, as far as
    /// these books have seen it. One that has stopped itself counts until somebody looks.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn cost_report(&self, now: SystemTime) -> Result<Vec<CostLine>> {
        let mut lines: Vec<CostLine> = Vec::new();
        for node in self.state.all_nodes()? {
            let hours = node.ran(now).as_secs_f64() / 3600.0;
            let running = node.ended.is_none() && node.stopped.is_none();
            let stopped = node.ended.is_none() && node.stopped.is_some();
            let usd = hours * node.offer.usd_per_hour;
            let same = |line: &&mut CostLine| {
                line.cluster == node.cluster && line.instance_type == node.offer.instance_type
            };
            match lines.iter_mut().find(same) {
                Some(line) => {
                    line.instances += 1;
                    line.running |= running;
                    line.stopped |= stopped;
                    line.hours += hours;
                    line.usd += usd;
                }
                None => lines.push(CostLine {
                    cluster: node.cluster,
                    instance_type: node.offer.instance_type,
                    instances: 1,
                    running,
                    stopped,
                    hours,
                    usd,
                }),
            }
        }
        Ok(lines)
    }

    fn row(&self, cluster: &str) -> Result<ClusterRow> {
        let row = self.state.cluster(cluster)?;
        row.ok_or_else(|| Error::NoSuchCluster {
            name: cluster.to_owned(),
        })
    }

    fn open(&self, cluster: &str) -> Result<Vec<NodeRow>> {
        let nodes = self.state.open_nodes()?;
        Ok(nodes
            .into_iter()
            .filter(|node| node.cluster == cluster)
            .collect())
    }

    fn live(&self, cluster: &str) -> Result<Vec<NodeRow>> {
        let nodes = self.open(cluster)?;
        Ok(nodes
            .into_iter()
            .filter(|node| node.state == NodeState::Live)
            .collect())
    }
}

/// What a cluster is recorded as when it is launched, or launched again.
fn row_of(request: &LaunchRequest, task: &Task, known: Option<&ClusterRow>) -> ClusterRow {
    ClusterRow {
        name: request.cluster.clone(),
        status: ClusterStatus::Init,
        task: task.name.clone(),
        num_nodes: known.map_or(request.num_nodes(task), |row| row.num_nodes),
        lease: request
            .lease
            .or(known.map(|row| row.lease))
            .unwrap_or_default(),
        created: known.map_or_else(SystemTime::now, |row| row.created),
    }
}

/// Whether a running or starting instance, not one that is stopped or going.
fn is_up(instance: &Instance) -> bool {
    matches!(
        instance.state,
        InstanceState::Running | InstanceState::Starting
    )
}
