//! When clusters end by themselves: in the books first, then at the provider and on the nodes.

use std::time::SystemTime;

use super::Engine;
use super::jobs::agent_of;
use crate::agent::{AgentBinary, NodeSetup};
use crate::error::Result;
use crate::provider::Lease;
use crate::resources::WaitFor;
use crate::state::{ClusterRow, ClusterStatus};

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
        let gpus = self.gpus(cluster)?;
        for (instance, transport) in self.connect(cluster).await? {
            let nodes = self.live(cluster)?;
            let node = nodes.iter().find(|node| node.token == instance.token);
            let deadline = match node {
                Some(node) => self.provider(&node.provider)?.deadline(),
                None => None,
            };
            if let Some(power) = deadline {
                let at = deadline_of(lease, SystemTime::now());
                power.set_deadline(&instance.id, at).await?;
            }
            let client = agent_of(&instance, transport, agent).await?;
            let setup = NodeSetup::of(instance.endpoint.as_ref(), gpus);
            client.start(&setup).await?;
            client.set_lease(&lease).await?;
        }
        Ok(())
    }
}

/// When a provider may end an instance without asking its agent.
fn deadline_of(lease: Lease, now: SystemTime) -> Option<SystemTime> {
    let is_blind = lease.down && lease.wait_for == WaitFor::None;
    lease
        .idle
        .filter(|_| is_blind)
        .and_then(|idle| now.checked_add(idle))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

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
