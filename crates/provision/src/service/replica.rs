//! One replica of a service: its machine, its commands, the way to it, its probe.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::controller::Told;
use super::ready::ask;
use super::{FleetEvent, ProbeOutcome, ProbeState, ProbeVerdict, ReadinessProbe};
use crate::agent::AgentBinary;
use crate::engine::{Engine, ExecOptions, LaunchRequest};
use crate::error::{Error, Result};
use crate::failover::FailoverPolicy;
use crate::provider::{Endpoint, Lease};
use crate::resources::WaitFor;
use crate::task::Task;
use crate::transport::{Forward, HostTransport};

/// The longest pause between probes of a replica that is not ready yet.
const STARTING: Duration = Duration::from_millis(500);

/// How often a replica's commands are asked after.
const LOOK: Duration = Duration::from_secs(1);

/// How long replicas outlive their controller, and how often it says that it is there.
const LEASE: Duration = Duration::from_secs(600);
const RENEW: Duration = Duration::from_secs(60);

pub(super) fn cluster(name: &str, id: u32) -> String {
    format!("{name}-replica-{id}")
}

/// The replicas of a service in the books: their numbers and clusters.
pub(super) fn replicas_of(engine: &Engine, name: &str) -> Result<Vec<(u32, String)>> {
    let clusters = engine.state().clusters()?.into_iter();
    Ok(clusters
        .filter_map(|row| {
            let number = row.name.strip_prefix(name)?.strip_prefix("-replica-")?;
            // Another service may be called `NAME-replica-…` itself.
            let id: u32 = number.parse().ok()?;
            (cluster(name, id) == row.name).then_some((id, row.name))
        })
        .collect())
}

pub(super) fn is_no_room(error: &Error) -> bool {
    match error {
        Error::Exhausted { .. } | Error::NoOffer { .. } => true,
        Error::LaunchedInPart { source, .. } => is_no_room(source),
        _ => false,
    }
}

/// Where a replica listens, and the way to its machine.
pub(super) struct Server {
    transport: Arc<dyn HostTransport>,
    port: u16,
}

/// Launches a replica and starts its commands; says where it will listen.
///
/// On this machine every replica gets a free port, in `PORT`; elsewhere each has its own machine and
/// the task's port.
pub(super) async fn bring_up(
    engine: &Engine,
    agent: &AgentBinary,
    options: &ExecOptions,
    cluster: &str,
    id: u32,
    mut task: Task,
) -> Result<Server> {
    let asked = task.service.as_ref().and_then(|service| service.port);
    let port = asked
        .or_else(|| task.resources.ports.first().copied())
        .unwrap_or(8080);
    let request = LaunchRequest {
        later: Vec::new(),
        cluster: cluster.to_owned(),
        // Its commands run for ever: what keeps it is the controller's word.
        lease: Some(Lease {
            idle: Some(LEASE),
            down: true,
            wait_for: WaitFor::None,
        }),
        policy: FailoverPolicy::default(),
    };
    engine.launch_guarded(&task, &request, agent).await?;
    let way = engine.connect(cluster).await?.into_iter().next();
    let (instance, transport) = way.ok_or_else(|| Error::NoSuchCluster {
        name: cluster.to_owned(),
    })?;
    let port = match instance.endpoint {
        Some(Endpoint::Local { .. }) => free_port()?,
        _ => port,
    };
    task.envs.insert("PORT".to_owned(), port.to_string());
    task.envs
        .insert("SKYPILOT_SERVE_REPLICA_ID".to_owned(), id.to_string());
    engine.exec(cluster, &task, agent, options).await?;
    Ok(Server { transport, port })
}

/// A port of this machine that nobody has now.
fn free_port() -> Result<u16> {
    let bound = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let address = bound.and_then(|listener| listener.local_addr());
    address
        .map(|address| address.port())
        .map_err(Error::io("a free port"))
}

/// Keeps the way to a replica open until its newest job has ended; says how. `None` when nobody wants
/// to know any more.
pub(super) async fn until_ended(
    engine: &Engine,
    agent: &AgentBinary,
    cluster: &str,
    server: &Server,
    tell: impl Fn(Forward) -> bool,
) -> Option<String> {
    let mut reached: Option<SocketAddr> = None;
    let mut kept: Option<Instant> = None;
    loop {
        if kept.is_none_or(|kept| kept.elapsed() >= RENEW) {
            match engine.keep(cluster, agent, LEASE).await {
                Ok(()) => kept = Some(Instant::now()),
                Err(error) => tracing::warn!(cluster, %error, "its lease is not renewed"),
            }
        }
        let is_open = match reached {
            // Ours accepts as long as the connection to the machine stands.
            Some(address) => TcpStream::connect(address).await.is_ok(),
            None => false,
        };
        if !is_open {
            match server.transport.forward(server.port).await {
                Ok(way) if reached == Some(way.address()) => {} // the replica's own port
                Ok(way) => {
                    reached = Some(way.address());
                    if !tell(way) {
                        return None;
                    }
                }
                Err(error) => tracing::warn!(cluster, %error, "no way to the replica"),
            }
        }
        let queue = engine.queue(cluster, agent).await;
        match queue.as_ref().map(|jobs| jobs.last()) {
            Ok(Some(job)) if job.status.is_final() => {
                return Some(format!("its commands ended: {}", job.status.word()));
            }
            Err(Error::NoSuchCluster { .. } | Error::NoSuchInstance { .. }) => {
                return Some("its machine is gone".to_owned());
            }
            _ => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What the probes of one replica have seen since its commands were started. It outlives the connection
/// to the replica's machine: one that is reached again is no younger for that.
#[derive(Debug, Clone)]
pub(super) struct Probes(Arc<Mutex<(Instant, ProbeState)>>);

impl Probes {
    /// Of a replica whose commands were started now.
    pub(super) fn begun() -> Self {
        Self(Arc::new(Mutex::new((
            Instant::now(),
            ProbeState::default(),
        ))))
    }

    /// What the replica is after this probe, and whether it was ever ready.
    fn observe(&self, probe: &ReadinessProbe, outcome: ProbeOutcome) -> (ProbeVerdict, bool) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (started, state) = &mut *seen;
        let verdict = state.observe(probe, started.elapsed(), outcome);
        (verdict, state.was_ready())
    }
}

/// Probes a replica for ever and tells what each probe means.
pub(super) async fn watch(
    id: u32,
    address: SocketAddr,
    probe: ReadinessProbe,
    probes: Probes,
    sender: mpsc::UnboundedSender<Told>,
) {
    loop {
        let outcome = ask(address, &probe).await;
        let (verdict, was_ready) = probes.observe(&probe, outcome);
        if sender
            .send(Told::Event(FleetEvent::Probed(id, verdict)))
            .is_err()
        {
            return;
        }
        let pause = if was_ready {
            probe.interval
        } else {
            probe.interval.min(STARTING)
        };
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::task::EnvOverrides;
    use crate::{Fake, Provider, State};

    /// Whatever becomes of its controller, a replica ends ten minutes after it was last heard of.
    #[tokio::test]
    async fn a_replica_outlives_its_controller_by_its_lease() {
        let dir = tempfile::tempdir().expect("folder");
        let (node, script) = (dir.path().join("node"), dir.path().join("agent"));
        std::fs::create_dir(&node).expect("folder");
        std::fs::write(&script, "case $1 in submit) echo 1 ;; esac\n").expect("write");
        let agent = AgentBinary::new("/bin/sh", script.to_str().expect("utf-8")).expect("sh");
        let world = Arc::new(Fake::new().with_dir(node));
        let state = Arc::new(State::open(dir.path()).expect("state"));
        let engine = Engine::new(state, vec![world.clone()]);
        let options = ExecOptions {
            setup: true,
            base: dir.path().to_owned(),
        };
        let yaml = "service: {readiness_probe: /}\nrun: sleep 600\n";
        let task = Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml);
        let begun = SystemTime::now();
        let up = bring_up(&engine, &agent, &options, "s-replica-1", 1, task).await;
        up.expect("up");
        let running = || async { world.list_owned(None).await.expect("list").len() };
        world.pass(begun + LEASE - RENEW);
        assert_eq!(running().await, 1, "a controller that is late by a minute");
        engine
            .keep("s-replica-1", &agent, LEASE)
            .await
            .expect("kept");
        world.pass(begun + LEASE + RENEW);
        assert_eq!(running().await, 1, "it has said that it is there");
        world.pass(SystemTime::now() + 3 * LEASE);
        assert_eq!(running().await, 0, "nobody has");
    }
}
