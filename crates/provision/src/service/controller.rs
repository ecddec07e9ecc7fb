//! Keeping a service up: replicas as clusters, probes, the gateway, updates.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::gateway::{Gateway, GatewayOptions, Withdrawn};
use super::ready::ask;
use super::{Fleet, FleetCommand, FleetEvent, ProbeState, ReadinessProbe, Replica, ReplicaPhase};
use crate::agent::AgentBinary;
use crate::engine::{Engine, ExecOptions, LaunchRequest};
use crate::error::{Error, Result};
use crate::failover::FailoverPolicy;
use crate::provider::{Endpoint, Lease};
use crate::task::Task;
use crate::transport::{Forward, HostTransport};

/// How often the fleet is looked at.
const STEP: Duration = Duration::from_millis(100);

/// The longest pause between probes of a replica that is not ready yet.
const STARTING: Duration = Duration::from_millis(500);

/// How often a replica's commands are asked after.
const LOOK: Duration = Duration::from_secs(1);

/// How long a launch that found no machine waits before it may be tried again.
const NO_ROOM: Duration = Duration::from_secs(1);

/// How long requests of a replica that is replaced may take to end.
const DRAIN: Duration = Duration::from_secs(600);

/// What a service shall be.
#[derive(Debug, Clone)]
pub struct ServiceOrder {
    /// The task of each replica; it has a service section.
    pub task: Task,
    /// A higher number replaces a lower one.
    pub version: u32,
}

/// What a service is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceReport {
    /// Its name.
    pub name: String,
    /// Its URL.
    pub url: String,
    /// The version asked for.
    pub version: u32,
    /// Its replicas.
    pub replicas: Vec<Replica>,
    /// Why no more replicas are launched, if too many have failed.
    pub failure: Option<String>,
}

/// Keeps one service up.
#[derive(Debug)]
pub struct Controller {
    name: String,
    engine: Engine,
    agent: AgentBinary,
    options: ExecOptions,
    gateway: Gateway,
    fleet: Fleet,
    orders: BTreeMap<u32, ServiceOrder>,
    version: u32,
    running: BTreeMap<u32, Running>,
    draining: BTreeMap<u32, (Option<Withdrawn>, Instant)>,
    ending: BTreeMap<u32, JoinHandle<()>>,
    events: (mpsc::UnboundedSender<Told>, mpsc::UnboundedReceiver<Told>),
}

/// A replica whose commands run.
#[derive(Debug)]
struct Running {
    way: Forward,
    probing: JoinHandle<()>,
}

/// What a task of the controller has to say.
#[derive(Debug)]
enum Told {
    /// Its commands run, and it is reached like this: at first, or after the connection was lost.
    Reached(u32, Forward),
    Event(FleetEvent),
}

impl Controller {
    /// Begins a service behind `address`.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] if the task is no service; [`Error::Transport`] if the address is taken.
    pub async fn new(
        name: impl Into<String>,
        engine: Engine,
        agent: AgentBinary,
        options: ExecOptions,
        address: SocketAddr,
        order: ServiceOrder,
    ) -> Result<Self> {
        let spec = spec_of(&order)?;
        let gateway = Gateway::bind(
            address,
            GatewayOptions {
                load_balancing: spec.load_balancing,
                first_byte: spec.stream_timeout,
            },
        )
        .await?;
        Ok(Self {
            name: name.into(),
            engine,
            agent,
            options,
            gateway,
            fleet: Fleet::new(spec.replicas, order.version),
            version: order.version,
            orders: [(order.version, order)].into(),
            running: BTreeMap::new(),
            draining: BTreeMap::new(),
            ending: BTreeMap::new(),
            events: mpsc::unbounded_channel(),
        })
    }

    /// The service's address.
    pub fn address(&self) -> SocketAddr {
        self.gateway.address()
    }

    /// Asks for another version; its replicas replace the others without an error.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] if the task is no service.
    pub fn update(&mut self, order: ServiceOrder) -> Result<()> {
        let replicas = spec_of(&order)?.replicas;
        self.version = order.version;
        self.fleet.update(replicas, order.version);
        self.orders.insert(order.version, order);
        Ok(())
    }

    /// What the service is now.
    pub fn report(&self) -> ServiceReport {
        ServiceReport {
            name: self.name.clone(),
            url: format!("http://{}", self.address()),
            version: self.version,
            replicas: self.fleet.replicas().to_vec(),
            failure: self.fleet.failure().map(str::to_owned),
        }
    }

    /// Works for a moment: takes in what happened, then does what is due. To be called for ever.
    pub async fn step(&mut self) {
        if let Ok(Some(told)) = tokio::time::timeout(STEP, self.events.1.recv()).await {
            self.take_in(told);
        }
        while let Ok(told) = self.events.1.try_recv() {
            self.take_in(told);
        }
        self.look_at_drains();
        for command in self.fleet.step() {
            match command {
                FleetCommand::Launch(id, version) => self.launch(id, version),
                FleetCommand::Drain(id) => {
                    let withdrawn = self.gateway.withdraw(id);
                    self.draining.insert(id, (withdrawn, Instant::now()));
                }
                FleetCommand::End(id) => self.end(id),
            }
        }
        let is_ready = |replica: &&Replica| replica.phase == ReplicaPhase::Ready;
        let routes: Vec<_> = self
            .fleet
            .replicas()
            .iter()
            .filter(is_ready)
            .filter_map(|replica| Some((replica.id, self.running.get(&replica.id)?.way.address())))
            .collect();
        self.gateway.route(&routes);
    }

    /// Ends every replica.
    ///
    /// # Errors
    /// A provider's; what is left is in the books under the service's name.
    pub async fn down(mut self) -> Result<()> {
        for (_, running) in std::mem::take(&mut self.running) {
            running.probing.abort();
        }
        for (_, ending) in std::mem::take(&mut self.ending) {
            let _ = ending.await; // what it did not manage is done below
        }
        down_replicas(&self.engine, &self.name).await
    }

    fn take_in(&mut self, told: Told) {
        match told {
            Told::Reached(id, way) => {
                let version = self
                    .fleet
                    .replicas()
                    .iter()
                    .find(|replica| replica.id == id);
                let order = version.and_then(|replica| self.orders.get(&replica.version));
                let Some(spec) = order.and_then(|order| order.task.service.as_ref()) else {
                    return;
                };
                if let Some(before) = self.running.remove(&id) {
                    before.probing.abort();
                }
                let probing = tokio::spawn(watch(
                    id,
                    way.address(),
                    spec.readiness_probe.clone(),
                    self.events.0.clone(),
                ));
                self.running.insert(id, Running { way, probing });
                self.fleet.apply(FleetEvent::Started(id));
            }
            Told::Event(event) => {
                if let FleetEvent::Lost(id, reason) = &event {
                    tracing::warn!(
                        service = self.name,
                        replica = id,
                        reason,
                        "a replica is lost"
                    );
                }
                if let FleetEvent::Ended(id) = &event {
                    self.ending.remove(id);
                }
                self.fleet.apply(event);
            }
        }
    }

    fn look_at_drains(&mut self) {
        let is_done = |withdrawn: &Option<Withdrawn>, since: &Instant| {
            let empty = withdrawn
                .as_ref()
                .is_none_or(|withdrawn| withdrawn.in_flight() == 0);
            empty || since.elapsed() > DRAIN
        };
        let done = self
            .draining
            .iter()
            .filter(|(_, (withdrawn, since))| is_done(withdrawn, since));
        let done: Vec<u32> = done.map(|(id, _)| *id).collect();
        for id in done {
            self.draining.remove(&id);
            self.fleet.apply(FleetEvent::Drained(id));
        }
    }

    fn launch(&self, id: u32, version: u32) {
        let Some(order) = self.orders.get(&version).cloned() else {
            return;
        };
        let (engine, agent, options) = (
            self.engine.clone(),
            self.agent.clone(),
            self.options.clone(),
        );
        let (cluster, sender) = (cluster(&self.name, id), self.events.0.clone());
        tokio::spawn(async move {
            let up = bring_up(&engine, &agent, &options, &cluster, id, order.task).await;
            let lost = match up {
                Ok(server) => {
                    let tell = |way| sender.send(Told::Reached(id, way)).is_ok();
                    until_ended(&engine, &agent, &cluster, &server, tell).await
                }
                Err(error @ (Error::Exhausted { .. } | Error::NoOffer { .. })) => {
                    tokio::time::sleep(NO_ROOM).await; // a machine may be given back by then
                    let event = FleetEvent::NoRoom(id, error.to_string());
                    let _ = sender.send(Told::Event(event)); // as below
                    return;
                }
                Err(error) => Some(error.to_string()),
            };
            let event = match lost {
                _ if engine.was_preempted(&cluster).await.unwrap_or(false) => {
                    FleetEvent::Preempted(id)
                }
                Some(reason) => FleetEvent::Lost(id, reason),
                None => return,
            };
            let _ = sender.send(Told::Event(event)); // the controller may be on its way out
        });
    }

    fn end(&mut self, id: u32) {
        if self.ending.contains_key(&id) {
            return;
        }
        if let Some(running) = self.running.remove(&id) {
            running.probing.abort();
        }
        let (engine, cluster, sender) = (
            self.engine.clone(),
            cluster(&self.name, id),
            self.events.0.clone(),
        );
        self.ending.insert(
            id,
            tokio::spawn(async move {
                loop {
                    match engine.down(&cluster).await {
                        Ok(()) | Err(Error::NoSuchCluster { .. }) => break,
                        Err(error) => tracing::warn!(cluster, %error, "not ended yet"),
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                let _ = sender.send(Told::Event(FleetEvent::Ended(id)));
            }),
        );
    }
}

/// Ends every replica of a service that has no controller any more.
///
/// # Errors
/// A provider's; what is left is in the books under the service's name.
pub(super) async fn down_replicas(engine: &Engine, name: &str) -> Result<()> {
    let prefix = format!("{name}-replica-");
    for row in engine.state().clusters()? {
        if row.name.starts_with(&prefix) {
            engine.down(&row.name).await?;
        }
    }
    Ok(())
}

impl Engine {
    /// Ends every replica of a service that has no controller any more.
    ///
    /// # Errors
    /// A provider's; what is left is in the books under the service's name.
    pub async fn down_service(&self, name: &str) -> Result<()> {
        down_replicas(self, name).await
    }
}

fn cluster(name: &str, id: u32) -> String {
    format!("{name}-replica-{id}")
}

fn spec_of(order: &ServiceOrder) -> Result<&super::ServiceSpec> {
    order
        .task
        .service
        .as_ref()
        .ok_or_else(|| Error::InvalidTask {
            what: "the task has no service section; add one with a readiness_probe".to_owned(),
        })
}

/// Where a replica listens, and the way to its machine.
struct Server {
    transport: Arc<dyn HostTransport>,
    port: u16,
}

/// Launches a replica and starts its commands; says where it will listen.
///
/// On this machine every replica gets a free port, in `PORT`; elsewhere each has its own machine and
/// the task's port.
async fn bring_up(
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
        cluster: cluster.to_owned(),
        lease: Lease::default(),
        policy: FailoverPolicy::default(),
    };
    engine.launch(&task, &request).await?;
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
async fn until_ended(
    engine: &Engine,
    agent: &AgentBinary,
    cluster: &str,
    server: &Server,
    tell: impl Fn(Forward) -> bool,
) -> Option<String> {
    let mut reached: Option<SocketAddr> = None;
    loop {
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

/// Probes a replica for ever and tells what each probe means.
async fn watch(
    id: u32,
    address: SocketAddr,
    probe: ReadinessProbe,
    sender: mpsc::UnboundedSender<Told>,
) {
    let started = Instant::now();
    let mut state = ProbeState::default();
    let mut was_ready = false;
    loop {
        let outcome = ask(address, &probe).await;
        let verdict = state.observe(&probe, started.elapsed(), outcome);
        was_ready |= verdict == super::ProbeVerdict::Ready;
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
