//! Bringing a cluster up: intent first, then the provider, and failover between offers.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{Engine, LaunchRequest, fresh_row, is_up};
use crate::error::{Error, Result};
use crate::failover::{Failover, Step};
use crate::launch::no_offer;
use crate::offer::Offer;
use crate::planner::Plan;
use crate::provider::{CreateRequest, Instance, InstanceState, Provider};
use crate::state::{ClusterStatus, NodeRow, NodeState};
use crate::task::{Task, is_task_name};

/// How often an instance that starts is looked at.
const STARTING: Duration = Duration::from_secs(1);

impl Engine {
    /// Brings up the cluster, or what is missing of it, and waits until every node can be reached.
    ///
    /// A launch that was interrupted is completed by launching again; what it had created is found
    /// by its token.
    ///
    /// # Errors
    /// [`Error::NoOffer`], [`Error::Exhausted`], [`Error::Busy`], or the provider's. What was
    /// created before stays recorded, for another launch or for `down`.
    pub async fn launch(&self, task: &Task, request: &LaunchRequest) -> Result<Vec<Instance>> {
        if !is_task_name(&request.cluster) || request.cluster.contains('.') {
            return Err(Error::InvalidTask {
                what: format!(
                    "cluster name `{}` must be letters and digits, with single or double - or _ between them",
                    request.cluster
                ),
            });
        }
        let _lock = self.state.lock(&request.cluster)?;
        let known = self.state.cluster(&request.cluster)?;
        if let Some(row) = &known {
            let asked = task.num_nodes.max(1);
            if asked > row.num_nodes {
                return Err(Error::InvalidTask {
                    what: format!(
                        "cluster `{}` has {} nodes, the task asks for {asked}; take it down or launch another",
                        row.name, row.num_nodes
                    ),
                });
            }
            self.reconcile(&request.cluster).await?;
        }
        let created = known
            .as_ref()
            .map_or_else(SystemTime::now, |row| row.created);
        let mut row = fresh_row(request, task, created);
        row.num_nodes = known.map_or(row.num_nodes, |known| known.num_nodes);
        self.state.put_cluster(&row)?;
        let mut instances = Vec::new();
        for node_rank in 0..row.num_nodes {
            let live = self.live(&request.cluster)?;
            let instance = match live.iter().find(|node| node.node_rank == node_rank) {
                Some(node) => self.revive(node).await?,
                None => self.acquire(task, request, node_rank).await?,
            };
            instances.push(instance);
        }
        for instance in &mut instances {
            self.wait_running(instance).await?;
            self.expose(instance, task).await?;
        }
        self.state.set_status(&request.cluster, ClusterStatus::Up)?;
        Ok(instances)
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
            Some(power) => power.start(id).await,
            None => Ok(instance),
        }
    }

    /// A new node, from the first candidate that can be had.
    async fn acquire(
        &self,
        task: &Task,
        request: &LaunchRequest,
        node_rank: u32,
    ) -> Result<Instance> {
        let plan = Plan::for_task(task, self.offers().await);
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
            let create = CreateRequest {
                token: token.clone(),
                cluster: request.cluster.clone(),
                offer: offer.clone(),
                lease: request.lease,
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

    /// Opens the task's ports, where the provider keeps them shut.
    async fn expose(&self, instance: &Instance, task: &Task) -> Result<()> {
        let nodes = self.state.open_nodes()?;
        let Some(node) = nodes.iter().find(|node| node.token == instance.token) else {
            return Ok(());
        };
        if let Some(power) = self.provider(&node.provider)?.ports() {
            for port in &task.resources.ports {
                let address = power.expose(&instance.id, *port).await?;
                tracing::info!(port, address, "open to the net");
            }
        }
        Ok(())
    }

    async fn wait_running(&self, instance: &mut Instance) -> Result<()> {
        let nodes = self.state.open_nodes()?;
        let node = nodes.iter().find(|node| node.token == instance.token);
        while instance.state == InstanceState::Starting {
            tokio::time::sleep(STARTING).await;
            if let Some(node) = node {
                *instance = self
                    .provider(&node.provider)?
                    .describe(&instance.id)
                    .await?;
            }
        }
        Ok(())
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
