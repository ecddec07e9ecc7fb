//! Keeping a service up: replicas as clusters, probes, the gateway, updates.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::gateway::{Gateway, GatewayOptions, Withdrawn};
use super::replica::{Probes, bring_up, cluster, is_no_room, replicas_of, until_ended, watch};
use super::{Fleet, FleetCommand, FleetEvent, Replica, ReplicaPhase};
use crate::agent::AgentBinary;
use crate::engine::{Engine, ExecOptions};
use crate::error::{Error, Result, unfinished};
use crate::task::Task;
use crate::transport::Forward;

/// How often the fleet is looked at.
const STEP: Duration = Duration::from_millis(100);

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
    launching: BTreeMap<u32, JoinHandle<()>>,
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
    probes: Probes,
}

/// What a task of the controller has to say.
#[derive(Debug)]
pub(super) enum Told {
    /// Its commands run, and it is reached like this: at first, or after the connection was lost.
    Reached(u32, Forward),
    Event(FleetEvent),
}

impl Controller {
    /// Begins a service behind `address`. Replicas that an earlier controller of its name has left
    /// behind are ended: nobody leads to them.
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
        let name = name.into();
        let mut fleet = Fleet::new(spec.replicas, order.version);
        fleet.inherit(replicas_of(&engine, &name)?.into_iter().map(|(id, _)| id));
        Ok(Self {
            name,
            engine,
            agent,
            options,
            gateway,
            fleet,
            version: order.version,
            orders: [(order.version, order)].into(),
            launching: BTreeMap::new(),
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

    /// Ends every replica; each is tried, whatever the others say.
    ///
    /// # Errors
    /// A provider's, or [`Error::Unfinished`]; what is left is in the books under the service's name.
    pub async fn down(mut self) -> Result<()> {
        for (_, running) in std::mem::take(&mut self.running) {
            running.probing.abort();
        }
        // Whatever these would do is in the way of the end, which is all that is wanted now.
        let mut tasks = std::mem::take(&mut self.launching);
        tasks.append(&mut self.ending);
        for (_, task) in tasks {
            task.abort();
            let _ = task.await; // it was told to stop
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
                let before = self.running.remove(&id);
                let probes = before.map_or_else(Probes::begun, |before| {
                    before.probing.abort();
                    before.probes
                });
                let probing = tokio::spawn(watch(
                    id,
                    way.address(),
                    spec.readiness_probe.clone(),
                    probes.clone(),
                    self.events.0.clone(),
                ));
                let running = Running {
                    way,
                    probing,
                    probes,
                };
                self.running.insert(id, running);
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
                    self.launching.remove(id);
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

    fn launch(&mut self, id: u32, version: u32) {
        let Some(order) = self.orders.get(&version).cloned() else {
            return;
        };
        let (engine, agent, options) = (
            self.engine.clone(),
            self.agent.clone(),
            self.options.clone(),
        );
        let (cluster, sender) = (cluster(&self.name, id), self.events.0.clone());
        let launching = tokio::spawn(async move {
            let up = bring_up(&engine, &agent, &options, &cluster, id, order.task).await;
            let lost = match up {
                Ok(server) => {
                    let tell = |way| sender.send(Told::Reached(id, way)).is_ok();
                    until_ended(&engine, &agent, &cluster, &server, tell).await
                }
                Err(error) if is_no_room(&error) => {
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
        self.launching.insert(id, launching);
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

/// Ends every replica of a service; each is tried, whatever the others say.
async fn down_replicas(engine: &Engine, name: &str) -> Result<()> {
    let mut failed = Vec::new();
    for (_, cluster) in replicas_of(engine, name)? {
        match engine.down(&cluster).await {
            Ok(()) | Err(Error::NoSuchCluster { .. }) => {}
            Err(error) => failed.push((cluster, error)),
        }
    }
    unfinished("end", failed)
}

impl Engine {
    /// Ends every replica of a service that has no controller any more; each is tried, whatever the others
    /// say.
    ///
    /// # Errors
    /// A provider's, or [`Error::Unfinished`]; what is left is in the books under the service's name.
    pub async fn down_service(&self, name: &str) -> Result<()> {
        down_replicas(self, name).await
    }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::conformance::Deaf;
    use crate::task::EnvOverrides;
    use crate::{Fake, LaunchRequest, Provider, State};

    /// What an earlier controller has left behind is ended by the next; one that cannot be ended does not
    /// stand in the way of those that can.
    #[tokio::test]
    async fn replicas_without_a_controller_are_ended() {
        let dir = tempfile::tempdir().expect("folder");
        let state = Arc::new(State::open(dir.path()).expect("state"));
        let world = Arc::new(Deaf::new(Arc::new(Fake::new())));
        let engine = Engine::new(state, vec![world.clone()]);
        let parse = |yaml: &str| Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml);
        for name in ["svc-replica-1", "svc-replica-7", "svc-replica-db"] {
            let request = LaunchRequest {
                later: Vec::new(),
                cluster: name.into(),
                lease: None,
                policy: crate::FailoverPolicy::default(),
            };
            engine.launch(&parse("{}"), &request).await.expect("launch");
        }
        let owned = world.list_owned(None).await.expect("list");
        let first = owned.iter().find(|one| one.cluster == "svc-replica-1");
        world.shut_ears_to(&first.expect("launched").id);
        let order = ServiceOrder {
            task: parse("service: {readiness_probe: /, replicas: 0}\nrun: sleep 1\n"),
            version: 2,
        };
        let options = ExecOptions {
            setup: true,
            base: dir.path().to_owned(),
        };
        let agent = AgentBinary::new("/bin/true", "").expect("/bin/true");
        let address = ([127, 0, 0, 1], 0).into();
        let controller = Controller::new("svc", engine.clone(), agent, options, address, order);
        let mut controller = controller.await.expect("controller");
        let left = || -> Vec<String> {
            let rows = engine.state().clusters().expect("rows").into_iter();
            rows.map(|row| row.name).collect()
        };
        while left().len() > 2 {
            controller.step().await;
        }
        assert_eq!(left(), ["svc-replica-1", "svc-replica-db"]);
        // Taken down, it does not wait for ever for the one that does not hear.
        let down = tokio::time::timeout(Duration::from_secs(60), controller.down()).await;
        let error = down.expect("an end").expect_err("one is left");
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        world.open_ears();
        engine.down_service("svc").await.expect("down");
        assert_eq!(left(), ["svc-replica-db"], "another's");
    }

    /// A replica that was ready and is reached again, but does not answer, gets no more requests, and has
    /// no second time to start in.
    #[tokio::test]
    async fn a_replica_that_is_reached_again_is_no_younger() {
        let dir = tempfile::tempdir().expect("folder");
        let state = Arc::new(State::open(dir.path()).expect("state"));
        let engine = Engine::new(state, vec![Arc::new(Fake::with_offers(Vec::new()))]);
        let yaml = "service: {readiness_probe: /, replicas: 1}\nrun: sleep 1\n";
        let order = ServiceOrder {
            task: Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml),
            version: 1,
        };
        let options = ExecOptions {
            setup: true,
            base: dir.path().to_owned(),
        };
        let agent = AgentBinary::new("/bin/true", "").expect("/bin/true");
        let address = ([127, 0, 0, 1], 0).into();
        let controller = Controller::new("svc", engine, agent, options, address, order);
        let mut controller = controller.await.expect("controller");
        controller.fleet.step(); // asks for replica 1, which this test is
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("port");
        let here = listener.local_addr().expect("bound");
        let serving = tokio::spawn(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 1024]).await; // a probe
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                let _ = stream.write_all(answer).await; // the prober may have gone
            }
        });
        let phase = |controller: &Controller| controller.fleet.replicas()[0].phase.clone();
        controller.take_in(Told::Reached(1, Forward::new(here, ())));
        while phase(&controller) != ReplicaPhase::Ready {
            let told = controller.events.1.recv().await.expect("a probe");
            controller.take_in(told);
        }
        serving.abort();
        let _ = serving.await; // and with it the listener
        controller.take_in(Told::Reached(1, Forward::new(here, ())));
        // What the probe before had to say may be on its way.
        for _ in 0..10 {
            if phase(&controller) == ReplicaPhase::NotReady {
                return;
            }
            let told = controller.events.1.recv().await.expect("a probe");
            controller.take_in(told);
        }
        panic!("{:?}", phase(&controller));
    }
}
