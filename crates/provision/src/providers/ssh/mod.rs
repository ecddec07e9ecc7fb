//! Machines one owns, as a provider: taking one is making a folder on it.

mod alias;
mod hosts;
mod transport;

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::boot;
use crate::capability::StopStart;
use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::{
    CreateRequest, Endpoint, Guards, Instance, InstanceId, InstanceState, Provider,
};
use crate::shell::quote;
pub use alias::{forget_alias, write_alias};
pub use hosts::{SshHost, read as read_hosts};
pub use transport::SshTransport;

/// The folder on a machine that says whose it is and holds what is theirs.
const DIR: &str = ".updraft-instance";

/// The port that ssh has where none is named.
const SSH_PORT: u16 = 22;

/// Ends every process group recorded in `groups/` whose leader is the process that was recorded, or
/// whose leader is gone while its number still names a group of ours.
const END_GROUPS: &str = r#"
end_groups() {
  for signal in TERM KILL; do
    left=
    for record in groups/[0-9]*; do
      [ -e "$record" ] || continue
      group=${record##*/}
      if read -r -a stat < "/proc/$group/stat" 2>/dev/null; then
        [ "${stat[21]}" = "$(cat "$record")" ] || continue
      fi
      kill -$signal -- "-$group" 2>/dev/null && left=1
    done
    [ -z "$left" ] && break
    for i in $(seq 50); do
      alive=
      for record in groups/[0-9]*; do
        [ -e "$record" ] || continue
        kill -0 -- "-${record##*/}" 2>/dev/null && alive=1
      done
      [ -z "$alive" ] && break
      sleep 0.1
    done
  done
  # What has left its group bears the instance's mark.
  for signal in TERM KILL; do
    for i in $(seq 50); do
      alive=
      for process in $(grep -lzxF "UPDRAFT_GROUPS=$PWD/groups" /proc/[0-9]*/environ 2>/dev/null); do
        process=${process#/proc/}
        case $i in 1) kill -$signal "${process%/environ}" 2>/dev/null ;; esac
        alive=1
      done
      [ -z "$alive" ] && return 0
      sleep 0.1
    done
  done
}
"#;

/// Machines one owns, reached over ssh. Each is given to one cluster at a time.
///
/// Which machine is whose is written on the machine, so that every client sees the same.
#[derive(Debug, Clone)]
pub struct SshProvider {
    machines: Vec<(SshHost, SshTransport)>,
}

/// What `instance.json` on a machine holds.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    token: String,
    cluster: String,
    /// Tags for people.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

impl SshProvider {
    /// Gives out these machines.
    pub fn new(hosts: Vec<SshHost>) -> Self {
        let way = |host: SshHost| {
            let transport = SshTransport::new(host.target.clone(), DIR);
            (host, transport)
        };
        Self {
            machines: hosts.into_iter().map(way).collect(),
        }
    }

    /// The machine an offer is.
    fn machine(&self, offer: &Offer) -> Option<&(SshHost, SshTransport)> {
        let mut machines = self.machines.iter();
        machines.find(|(host, _)| name_of(host) == offer.instance_type)
    }

    /// The machine an id names, if its instance is still there.
    async fn find(&self, id: &InstanceId) -> Result<Option<(&SshTransport, Instance)>> {
        for (host, transport) in &self.machines {
            if id.0.starts_with(&format!("{}/", name_of(host)))
                && let Some(instance) = read(host, transport, "describe").await?
                && instance.id == *id
            {
                return Ok(Some((transport, instance)));
            }
        }
        Ok(None)
    }

    async fn existing(&self, id: &InstanceId) -> Result<(&SshTransport, Instance)> {
        let found = self.find(id).await?;
        found.ok_or_else(|| Error::NoSuchInstance { id: id.to_string() })
    }
}

/// What a machine is called in the books: its address, with the port unless that is ssh's own.
fn name_of(host: &SshHost) -> String {
    match host.target.port {
        Some(port) if port != SSH_PORT => format!("{}:{port}", host.target.host),
        _ => host.target.host.clone(),
    }
}

fn id_of(host: &SshHost, token: &str) -> InstanceId {
    InstanceId(format!("{}/{token}", name_of(host)))
}

/// What is on a machine, if somebody has it.
async fn read(
    host: &SshHost,
    transport: &SshTransport,
    operation: &'static str,
) -> Result<Option<Instance>> {
    let script = format!(
        "cd {DIR} 2>/dev/null || exit 0; [ -e stopped ] && echo stopped || echo running; cat instance.json 2>/dev/null || true"
    );
    let said = transport
        .ask(&script)
        .await
        .map_err(unavailable(operation))?;
    let Some((state, json)) = said.split_once('\n') else {
        return Ok(None);
    };
    let Ok(record) = serde_json::from_str::<Record>(json) else {
        return Ok(None); // half taken, or half given back
    };
    Ok(Some(Instance {
        id: id_of(host, &record.token),
        token: record.token,
        cluster: record.cluster,
        labels: record.labels,
        state: match state {
            "stopped" => InstanceState::Stopped,
            _ => InstanceState::Running,
        },
        endpoint: Some(Endpoint::Ssh {
            target: host.target.clone(),
            dir: DIR.to_owned(),
        }),
        usd_per_hour: 0.0,
    }))
}

/// Whether somebody has a machine, and what it is, if it can be reached.
async fn offer(host: &SshHost, transport: &SshTransport) -> Option<(bool, Offer)> {
    let script = format!(
        "nproc; while read -r name kib unit; do [ $name = MemTotal: ] && echo $kib; done < /proc/meminfo; \
         df -Pk . | while read -r _ _ _ free _; do echo $free; done; \
         [ -e {DIR}/instance.json ] && echo taken; true"
    );
    let said = transport.ask(&script).await;
    let said = said
        .inspect_err(|error| warn_unreachable(host, error))
        .ok()?;
    let numbers: Vec<f64> = said
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .collect();
    let offer = Offer {
        provider: "ssh".to_owned(),
        instance_type: name_of(host),
        region: host.pool.clone(),
        zone: None,
        cpus: numbers.first().copied().unwrap_or(0.0),
        memory_gib: numbers.get(1).copied().unwrap_or(0.0) / (1024.0 * 1024.0),
        disk_gib: numbers.get(2).map(|kib| kib / (1024.0 * 1024.0)),
        accelerator: host.accelerator.clone(),
        spot: false,
        usd_per_hour: 0.0,
    };
    Some((said.ends_with("taken\n"), offer))
}

/// What machines that were asked at the same time have said, in their order.
async fn answers<T>(asked: Vec<JoinHandle<T>>) -> Vec<T> {
    let mut said = Vec::new();
    for answer in asked {
        said.extend(answer.await.ok()); // a task that was cancelled goes with its runtime
    }
    said
}

fn warn_unreachable(host: &SshHost, error: &Error) {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    tracing::warn!(host = name_of(host), %error, cause, "cannot be reached");
}

fn unavailable(operation: &'static str) -> impl FnOnce(Error) -> Error {
    move |error| Error::Unavailable {
        provider: "ssh",
        operation,
        source: error.into(),
    }
}

#[async_trait]
impl Provider for SshProvider {
    fn name(&self) -> &'static str {
        "ssh"
    }

    fn guards(&self) -> Guards {
        Guards {
            free: true,
            ..Guards::default()
        }
    }

    /// The machine is the truth. What arrives over a connection that has broken costs nothing, and is
    /// found by its owner.
    fn settles(&self) -> Duration {
        Duration::ZERO
    }

    /// Asks every machine; one that cannot be reached is left out with a warning, and those that
    /// somebody has come last.
    async fn offers(&self) -> Result<Vec<Offer>> {
        let mut asked = Vec::new();
        for (host, transport) in self.machines.clone() {
            asked.push(tokio::spawn(async move { offer(&host, &transport).await }));
        }
        let mut offers: Vec<_> = answers(asked).await.into_iter().flatten().collect();
        offers.sort_by_key(|(is_taken, _)| *is_taken);
        Ok(offers.into_iter().map(|(_, offer)| offer).collect())
    }

    async fn create(&self, request: &CreateRequest) -> Result<Instance> {
        let no_capacity = || Error::NoCapacity {
            instance_type: request.offer.instance_type.clone(),
            region: request.offer.region.clone(),
        };
        let (host, transport) = self.machine(&request.offer).ok_or_else(no_capacity)?;
        let record = Record {
            token: request.token.clone(),
            cluster: request.cluster.clone(),
            labels: request.labels.clone(),
        };
        let json = serde_json::to_string(&record).unwrap_or_default();
        // The link is the taking: it fails if somebody was first.
        let script = format!(
            "set -e; mkdir -p {DIR}/files {DIR}/groups; t={DIR}/taking.$$; printf %s {} > $t; \
             if ln $t {DIR}/instance.json 2>/dev/null; then echo taken; else echo busy; fi; rm -f $t",
            quote(&json)
        );
        let said = transport
            .ask(&script)
            .await
            .map_err(unavailable("create"))?;
        tracing::debug!(
            host = name_of(host),
            said = said.trim(),
            "asked for a machine"
        );
        // The same token is the same instance; any other is somebody else's.
        let there = read(host, transport, "create").await?;
        there
            .filter(|instance| instance.token == request.token)
            .ok_or_else(no_capacity)
    }

    async fn describe(&self, id: &InstanceId) -> Result<Instance> {
        self.existing(id).await.map(|(_, instance)| instance)
    }

    async fn list_owned(&self, near: Option<&Offer>) -> Result<Vec<Instance>> {
        if let Some(offer) = near {
            // A machine that is on no list any more cannot be asked, which is no proof of anything.
            let (host, transport) = self.machine(offer).ok_or_else(|| Error::Unavailable {
                provider: "ssh",
                operation: "list",
                source: format!("{} is not on the list of machines", offer.instance_type).into(),
            })?;
            return Ok(read(host, transport, "list").await?.into_iter().collect());
        }
        let mut asked = Vec::new();
        for (host, transport) in self.machines.clone() {
            asked.push(tokio::spawn(async move {
                let said = read(&host, &transport, "list").await;
                said.unwrap_or_else(|error| {
                    warn_unreachable(&host, &error);
                    None
                })
            }));
        }
        Ok(answers(asked).await.into_iter().flatten().collect())
    }

    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        let Some((transport, instance)) = self.find(id).await? else {
            return Ok(());
        };
        let record = quote(&format!("\"{}\"", instance.token));
        // The record goes last: an interrupted end still lists the instance. Whoever has taken the
        // machine since it was asked keeps it.
        let script = format!(
            "{END_GROUPS} cd ~; cd {DIR} || exit 0; grep -qF {record} instance.json || exit 0; end_groups; {}rm -rf files groups stopped; cd; rm -rf {DIR}",
            boot::remove()
        );
        transport
            .ask(&script)
            .await
            .map(drop)
            .map_err(unavailable("terminate"))
    }

    fn stop_start(&self) -> Option<&dyn StopStart> {
        Some(self)
    }
}

#[async_trait]
impl StopStart for SshProvider {
    async fn stop(&self, id: &InstanceId) -> Result<()> {
        let (transport, _) = self.existing(id).await?;
        let script = format!(
            "{END_GROUPS} cd ~; cd {DIR} || exit 1; touch stopped; end_groups; rm -f groups/*"
        );
        transport
            .ask(&script)
            .await
            .map(drop)
            .map_err(unavailable("stop"))
    }

    async fn start(&self, id: &InstanceId) -> Result<Instance> {
        let (transport, _) = self.existing(id).await?;
        let script = format!("rm -f {DIR}/stopped");
        transport.ask(&script).await.map_err(unavailable("start"))?;
        self.describe(id).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::SshTarget;

    #[test]
    fn naming_the_usual_port_does_not_rename_a_machine() {
        let host = |port: Option<u16>| SshHost {
            pool: "lab".into(),
            target: SshTarget {
                host: "h".into(),
                port,
                ..SshTarget::default()
            },
            accelerator: None,
        };
        let names = [None, Some(22), Some(2222)].map(|port| name_of(&host(port)));
        assert_eq!(names, ["h", "h", "h:2222"]);
    }
}
