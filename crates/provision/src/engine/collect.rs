//! Ending instances: those of a cluster, and those that nobody remembers.

use std::time::{Duration, SystemTime};

use super::{CONFIRM_PAUSE, CONFIRM_TRIES, Engine};
use crate::error::{Error, Result, unfinished};
use crate::provider::{Instance, InstanceState};
use crate::state::{ClusterStatus, NodeRow, NodeState};

impl Engine {
    /// Ends a cluster. Its row goes when the providers have confirmed that every instance is gone. Every
    /// instance is tried, whatever the others say.
    ///
    /// # Errors
    /// [`Error::NoSuchCluster`]; [`Error::NotYetTerminated`] if a provider has not confirmed, and
    /// [`Error::Unfinished`] or a provider's error if one did not do it: run it again.
    pub async fn down(&self, cluster: &str) -> Result<()> {
        let _lock = self.state.lock(cluster)?;
        self.row(cluster)?;
        for node in self.open(cluster)? {
            self.state.set_node(&node.token, NodeState::Ending)?;
        }
        for attempt in 0..CONFIRM_TRIES {
            let (mut left, mut failed) = (0, Vec::new());
            for node in self.open(cluster)? {
                match self.end(&node).await {
                    Ok(gone) => left += usize::from(!gone),
                    Err(error) => failed.push((name_of(&node), error)),
                }
            }
            if left == 0 {
                unfinished("end", failed)?;
                return self.state.forget_cluster(cluster);
            }
            if attempt + 1 == CONFIRM_TRIES {
                unfinished("end", failed)?;
                return Err(Error::NotYetTerminated {
                    name: cluster.to_owned(),
                    instances: left,
                });
            }
            tokio::time::sleep(CONFIRM_PAUSE).await;
        }
        Ok(())
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

    /// Asks for the end of everything that bears the node's token; says whether all of it is gone.
    async fn end(&self, node: &NodeRow) -> Result<bool> {
        let provider = self.provider(&node.provider)?;
        let is_its = |instance: &Instance| {
            instance.token == node.token || node.instance.as_ref() == Some(&instance.id)
        };
        let near = Some(&node.offer);
        for instance in provider
            .list_owned(near)
            .await?
            .iter()
            .filter(|i| is_its(i))
        {
            provider.terminate(&instance.id).await?;
        }
        if let Some(id) = &node.instance {
            provider.terminate(id).await?;
        }
        let gone = !provider.list_owned(near).await?.iter().any(is_its);
        if gone {
            if let Some(id) = &node.instance {
                self.forget_way(id);
            }
            match node.created {
                Some(_) => self.state.ended(&node.token, SystemTime::now())?,
                None => self.state.never_was(&node.token)?,
            }
        }
        Ok(gone)
    }

    /// Brings the books of one cluster in line with what the providers say. The caller has its lock.
    pub(super) async fn reconcile(&self, cluster: &str) -> Result<()> {
        let mut states = Vec::new();
        for node in self.open(cluster)? {
            let provider = self.provider(&node.provider)?;
            let owned = provider.list_owned(Some(&node.offer)).await?;
            let mut own = owned
                .into_iter()
                .filter(|instance| instance.token == node.token);
            match (node.state, own.next()) {
                (NodeState::Intended, Some(instance)) => {
                    self.state
                        .created(&node.token, &instance.id, SystemTime::now())?;
                    states.push(instance.state);
                }
                (NodeState::Live, Some(instance)) => states.push(instance.state),
                (NodeState::Live, None) => self.state.ended(&node.token, SystemTime::now())?,
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
    /// Clusters that another process works on are left to it.
    ///
    /// # Errors
    /// [`Error::State`], or a provider's; what was ended until then stays ended.
    pub async fn gc(&self) -> Result<Vec<Instance>> {
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
                // The provider may show an instance long after the call; the row says whose it is.
                NodeState::Abandoned | NodeState::Ending if !is_stale(&node) => {}
                NodeState::Abandoned | NodeState::Ending => {
                    reached(&node.cluster, self.end(&node).await)?;
                }
            }
        }
        for cluster in self.state.clusters()? {
            if let Ok(_lock) = self.state.lock(&cluster.name) {
                reached(&cluster.name, self.reconcile(&cluster.name).await)?;
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

/// How long a provider may take to show what a lost call created.
const LATE: Duration = Duration::from_secs(3600);

fn is_stale(node: &NodeRow) -> bool {
    node.state == NodeState::Ending
        || SystemTime::now()
            .duration_since(node.intended)
            .is_ok_and(|age| age > LATE)
}
