//! When clusters end by themselves: in the books first, then at the provider and on the nodes.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, SystemTime};

use super::Engine;
use super::jobs::{HOLD, address, agent_of};
use crate::agent::{AgentBinary, NodeSetup, Place};
use crate::error::Result;
use crate::launch::deadline_of;
use crate::provider::{Endpoint, Instance, Lease};
use crate::state::{ClusterRow, ClusterStatus};

/// How long a node is held while it is told its lease.
const MOMENT: Duration = Duration::from_secs(5);

impl Engine {
    /// Changes when a cluster's nodes end by themselves. Interrupted, it is in the books, and the next
    /// call about the cluster's nodes brings them in line.
    ///
    /// # Errors
    /// As [`Engine::guard`].
    pub async fn autostop(&self, cluster: &str, agent: &AgentBinary, lease: Lease) -> Result<()> {
        let row = {
            let _lock = self.state.lock(cluster)?;
            let row = self.row(cluster)?;
            self.state.put_cluster(&ClusterRow {
                lease,
                ..row.clone()
            })?;
            row
        };
        match row.status {
            ClusterStatus::Stopped => Ok(()), // its agents learn of it when it is started
            _ => self.guard(cluster, agent).await,
        }
    }

    /// Starts the agent on every node of a running cluster, under the lease in the books; from here
    /// on its nodes end by themselves. Where the provider can end an instance at a time, and nothing
    /// is to be waited for, it is told that time.
    ///
    /// # Errors
    /// [`Error::NoSuchCluster`](crate::Error::NoSuchCluster);
    /// [`Error::InvalidTask`](crate::Error::InvalidTask) if it does not run; a transport's or a
    /// provider's.
    pub async fn guard(&self, cluster: &str, agent: &AgentBinary) -> Result<()> {
        let lease = self.row(cluster)?.lease;
        for (instance, _) in self.connect(cluster).await? {
            self.guard_node(&instance, lease, agent, MOMENT).await?;
        }
        self.link(cluster, agent).await
    }

    /// Starts the agent on one node, which is held for so long: it must not judge by what an earlier
    /// lease has left in its record, and its client may have more to do.
    pub(super) async fn guard_node(
        &self,
        instance: &Instance,
        lease: Lease,
        agent: &AgentBinary,
        held: Duration,
    ) -> Result<()> {
        let nodes = self.live(&instance.cluster)?;
        let node = nodes.iter().find(|node| node.token == instance.token);
        let deadline = match node {
            Some(node) => self.provider(&node.provider)?.deadline(),
            None => None,
        };
        if let Some(power) = deadline {
            let at = deadline_of(lease, SystemTime::now());
            power.set_deadline(&instance.id, at).await?;
        }
        let client = agent_of(instance, self.way(instance)?, agent).await?;
        client.hold(held.as_secs()).await?;
        let gpus = self.gpus(&instance.cluster)?;
        let setup = NodeSetup::of(instance.endpoint.as_ref(), gpus);
        client.start(&setup).await?;
        client.set_lease(&lease).await
    }

    /// Holds a node for as long as this is awaited; what cannot be said now is said again.
    pub(super) async fn keep_node(&self, instance: &Instance, agent: &AgentBinary) {
        loop {
            tokio::time::sleep(HOLD / 3).await;
            if let Err(error) = self.hold_node(instance, agent, HOLD).await {
                tracing::warn!(instance = %instance.id, %error, "could not be held");
            }
        }
    }

    async fn hold_node(
        &self,
        instance: &Instance,
        agent: &AgentBinary,
        long: Duration,
    ) -> Result<()> {
        let client = agent_of(instance, self.way(instance)?, agent).await?;
        client.hold(long.as_secs()).await
    }

    /// Keeps the nodes of a cluster from ending themselves for so long, whatever their lease; where the
    /// provider ends them at a time, that is put off as well.
    ///
    /// # Errors
    /// As [`Engine::guard`].
    pub async fn keep(&self, cluster: &str, agent: &AgentBinary, long: Duration) -> Result<()> {
        let lease = self.row(cluster)?.lease;
        for (instance, _) in self.connect(cluster).await? {
            let nodes = self.live(cluster)?;
            let node = nodes.iter().find(|node| node.token == instance.token);
            if let Some(node) = node
                && let Some(power) = self.provider(&node.provider)?.deadline()
            {
                let at = deadline_of(lease, SystemTime::now() + long);
                power.set_deadline(&instance.id, at).await?;
            }
            self.hold_node(&instance, agent, long).await?;
        }
        Ok(())
    }

    /// Tells the nodes of a cluster of each other, so that none ends while another works.
    pub(super) async fn link(&self, cluster: &str, agent: &AgentBinary) -> Result<()> {
        let ways = self.connect(cluster).await?;
        let [(first, way), others @ ..] = ways.as_slice() else {
            return Ok(());
        };
        if others.is_empty() {
            return Ok(());
        }
        let bind = match first.endpoint {
            Some(Endpoint::Local { .. }) => IpAddr::from(Ipv4Addr::LOCALHOST),
            _ => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        };
        let head = agent_of(first, way.clone(), agent)
            .await?
            .lead(bind)
            .await?;
        for (rank, (instance, way)) in (1..).zip(others) {
            let place = Place::Member {
                address: address(first),
                head: head.clone(),
                rank,
            };
            let client = agent_of(instance, way.clone(), agent).await?;
            client.follow(&place).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::WaitFor;

    #[test]
    fn only_a_lease_that_waits_for_nothing_has_a_deadline() {
        let now = SystemTime::UNIX_EPOCH;
        let lease = Lease {
            idle: Some(Duration::from_secs(60)),
            down: true,
            wait_for: WaitFor::None,
        };
        assert_eq!(deadline_of(lease, now), Some(now + Duration::from_secs(60)));
        for other in [
            Lease {
                wait_for: WaitFor::Jobs,
                ..lease
            },
            Lease {
                down: false,
                ..lease
            },
            Lease {
                idle: None,
                ..lease
            },
        ] {
            assert_eq!(deadline_of(other, now), None, "{other:?}");
        }
    }
}
