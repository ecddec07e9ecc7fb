//! Ending instances: those of a cluster, and those that nobody remembers.

use std::time::SystemTime;

use super::{CONFIRM_PAUSE, CONFIRM_TRIES, Engine};
use crate::error::{Error, Result, unfinished};
use crate::provider::{Instance, InstanceState, Provider};
use crate::state::{ClusterStatus, NodeRow, NodeState};

impl Engine {
    /// Ends a cluster. Its row goes when the providers have confirmed that every instance is gone. Every
    /// instance is tried, whatever the others say.
    ///
    /// # Errors
    /// [`Error::NoSuchCluster`]; [`Error::NotYetTerminated`] if a provider has not confirmed, and
    /// [`Error::Unfinished`] or a provider's error if one did not do it: run it again.
    /// [`Error::Unconfirmed`] if a call to create was not answered and may still have made something:
    /// [`Engine::gc`] sees to it later.
    pub async fn down(&self, cluster: &str) -> Result<()> {
        let _lock = self.state.lock(cluster)?;
        self.row(cluster)?;
        for node in self.open(cluster)? {
            self.state.set_node(&node.token, NodeState::Ending)?;
        }
        for attempt in 1.. {
            let (mut left, mut failed) = (Vec::new(), Vec::new());
            for node in self.open(cluster)? {
                match self.end(&node, SystemTime::now()).await {
                    Ok(Ended::Gone) => {}
                    Ok(ended) => left.push((node, ended)),
                    Err(error) => failed.push((name_of(&node), error)),
                }
            }
            if left.is_empty() {
                unfinished("end", failed)?;
                return self.state.forget_cluster(cluster);
            }
            if attempt == CONFIRM_TRIES {
                unfinished("end", failed)?;
                return Err(self.left(cluster, &left));
            }
            tokio::time::sleep(CONFIRM_PAUSE).await;
        }
        Ok(())
    }

    /// The error of a `down` after which these may be there.
    fn left(&self, cluster: &str, left: &[(NodeRow, Ended)]) -> Error {
        let listed = left.iter().filter(|(_, ended)| *ended == Ended::Listed);
        let name = cluster.to_owned();
        match listed.count() {
            0 => Error::Unconfirmed {
                name,
                instances: left.len(),
                settles: left
                    .iter()
                    .filter_map(|(node, _)| Some(self.provider(&node.provider).ok()?.settles()))
                    .max()
                    .unwrap_or_default(),
            },
            instances => Error::NotYetTerminated { name, instances },
        }
    }

    /// Forgets a cluster without asking anybody: for machines that will never answer again. What is
    /// still there is nobody's.
    ///
    /// # Errors
    /// [`Error::NoSuchCluster`]; [`Error::State`].
    pub fn purge(&self, cluster: &str) -> Result<()> {
        let _lock = self.state.lock(cluster)?;
        self.row(cluster)?;
        for node in self.open(cluster)? {
            match node.created {
                Some(_) => self.state.ended(&node.token, SystemTime::now())?,
                None => self.state.never_was(&node.token)?,
            }
        }
        self.state.forget_cluster(cluster)
    }

    /// Asks for the end of everything that bears the node's token; says what has become of it.
    ///
    /// An empty list is the confirmation only for what was in a list before, or where the provider's
    /// lists have had their time: a cloud may show an instance long after the call that made it.
    async fn end(&self, node: &NodeRow, now: SystemTime) -> Result<Ended> {
        let provider = self.provider(&node.provider)?;
        let is_its = |instance: &Instance| {
            instance.token == node.token || node.instance.as_ref() == Some(&instance.id)
        };
        let near = Some(&node.offer);
        let mut was_seen = node.seen.is_some();
        for instance in provider
            .list_owned(near)
            .await?
            .iter()
            .filter(|i| is_its(i))
        {
            self.saw(node, instance, now)?;
            was_seen = true;
            provider.terminate(&instance.id).await?;
        }
        if let Some(id) = &node.instance {
            provider.terminate(id).await?;
        }
        if provider.list_owned(near).await?.iter().any(is_its) {
            return Ok(Ended::Listed);
        }
        if !was_seen && !has_settled(provider.as_ref(), node, now) {
            return Ok(Ended::Unconfirmed);
        }
        if let Some(id) = &node.instance {
            self.forget_way(id);
        }
        match node.created {
            Some(_) => self.state.ended(&node.token, now)?,
            None => self.state.never_was(&node.token)?,
        }
        Ok(Ended::Gone)
    }

    /// Writes down that a provider has reported a node, and whether it costs anything.
    fn saw(&self, node: &NodeRow, instance: &Instance, now: SystemTime) -> Result<()> {
        let is_stopped = instance.state == InstanceState::Stopped;
        self.state.seen(&node.token, is_stopped, now)
    }

    /// A live node that is in no list: what it does, or `None` if it is gone.
    async fn missing(
        &self,
        provider: &dyn Provider,
        node: &NodeRow,
        now: SystemTime,
    ) -> Result<Option<InstanceState>> {
        if let Some(id) = &node.instance {
            match provider.describe(id).await {
                Ok(instance) => return Ok(Some(instance.state)),
                Err(Error::NoSuchInstance { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if !has_settled(provider, node, now) {
            return Ok(Some(InstanceState::Starting));
        }
        self.state.ended(&node.token, now)?;
        Ok(None)
    }

    /// Brings the books of one cluster in line with what the providers say. The caller has its lock.
    pub(super) async fn reconcile(&self, cluster: &str) -> Result<()> {
        self.reconcile_at(cluster, SystemTime::now()).await
    }

    async fn reconcile_at(&self, cluster: &str, now: SystemTime) -> Result<()> {
        let mut states = Vec::new();
        for node in self.open(cluster)? {
            let provider = self.provider(&node.provider)?;
            let owned = provider.list_owned(Some(&node.offer)).await?;
            let mut own = owned
                .into_iter()
                .filter(|instance| instance.token == node.token);
            match (node.state, own.next()) {
                (NodeState::Intended, Some(instance)) => {
                    self.state.created(&node.token, &instance.id, now)?;
                    self.saw(&node, &instance, now)?;
                    states.push(instance.state);
                }
                (NodeState::Live, Some(instance)) => {
                    self.saw(&node, &instance, now)?;
                    states.push(instance.state);
                }
                (NodeState::Live, None) => {
                    states.extend(self.missing(provider.as_ref(), &node, now).await?);
                }
                // It may be late: what nobody adopts now must not be adopted later by another rank.
                (NodeState::Intended, None) => {
                    self.state.set_node(&node.token, NodeState::Abandoned)?;
                }
                (NodeState::Abandoned | NodeState::Ending, _) => {}
            }
        }
        let Some(row) = self.state.cluster(cluster)? else {
            return Ok(());
        };
        let complete = states.len() == row.num_nodes as usize;
        let all = |wanted: fn(&InstanceState) -> bool| complete && states.iter().all(wanted);
        if row.status == ClusterStatus::Init && !states.is_empty() {
            return Ok(()); // only a launch makes a cluster whole
        }
        if states.is_empty() {
            return self.state.forget_cluster(cluster);
        }
        let status = if all(|state| *state == InstanceState::Running) {
            ClusterStatus::Up
        } else if all(|state| *state == InstanceState::Stopped) {
            ClusterStatus::Stopped
        } else {
            ClusterStatus::Init
        };
        self.state.set_status(cluster, status)
    }

    /// Ends every instance of this owner that the books do not hold for live, and closes rows whose
    /// instance is gone; returns what was ended.
    ///
    /// Clusters that another process works on are left to it. A row whose call to create was never
    /// answered is closed when the provider's lists have had their time and still lack it; what shows
    /// up even later is known by its owner.
    ///
    /// # Errors
    /// [`Error::State`], or a provider's; what was ended until then stays ended.
    pub async fn gc(&self) -> Result<Vec<Instance>> {
        self.gc_at(SystemTime::now()).await
    }

    pub(super) async fn gc_at(&self, now: SystemTime) -> Result<Vec<Instance>> {
        let mut ended = Vec::new();
        for provider in &self.providers {
            let ours = format!("{}-", self.state.owner());
            let owned = provider.list_owned(None).await?;
            for instance in owned
                .into_iter()
                .filter(|instance| instance.token.starts_with(&ours))
            {
                let Ok(_lock) = self.state.lock(&instance.cluster) else {
                    continue;
                };
                // Read under the lock: a launch may have finished since the provider answered.
                let rows = self.state.open_nodes()?;
                let is_live = rows.iter().any(|row| {
                    row.state == NodeState::Live && row.instance.as_ref() == Some(&instance.id)
                });
                if !is_live {
                    if let Some(row) = rows.iter().find(|row| row.token == instance.token) {
                        self.saw(row, &instance, now)?;
                    }
                    provider.terminate(&instance.id).await?;
                    ended.push(instance);
                }
            }
        }
        for node in self.state.open_nodes()? {
            let Ok(_lock) = self.state.lock(&node.cluster) else {
                continue;
            };
            match node.state {
                NodeState::Live => {}
                NodeState::Intended => self.state.set_node(&node.token, NodeState::Abandoned)?,
                NodeState::Abandoned | NodeState::Ending => {
                    reached(&node.cluster, self.end(&node, now).await)?;
                }
            }
        }
        for cluster in self.state.clusters()? {
            if let Ok(_lock) = self.state.lock(&cluster.name) {
                reached(&cluster.name, self.reconcile_at(&cluster.name, now).await)?;
                let open = self.open(&cluster.name)?;
                if open.iter().all(|node| node.state != NodeState::Live) {
                    self.state.forget_cluster(&cluster.name)?;
                }
            }
        }
        Ok(ended)
    }
}

fn name_of(node: &NodeRow) -> String {
    match &node.instance {
        Some(id) => id.to_string(),
        None => node.token.clone(),
    }
}

/// `None`, with a warning, for what cannot be asked now: it stays in the books for the next time.
pub(super) fn reached<T>(cluster: &str, result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(error @ (Error::Unavailable { .. } | Error::NoSuchProvider { .. })) => {
            tracing::warn!(cluster, %error, "left as it was");
            Ok(None)
        }
        result => result.map(Some),
    }
}

/// What has become of a node that was to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// Its provider has confirmed it.
    Gone,
    /// It is still in a list.
    Listed,
    /// It is in no list and never was, and it is too early to believe that.
    Unconfirmed,
}

/// Whether its provider's lists have had the time to show a node.
fn has_settled(provider: &dyn Provider, node: &NodeRow, now: SystemTime) -> bool {
    let settles = provider.settles();
    settles.is_zero()
        || now
            .duration_since(node.intended)
            .is_ok_and(|age| age > settles)
}
