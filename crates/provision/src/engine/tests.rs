//! The leak test: killed before and after every call, with a provider at its worst.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio::sync::Notify;

use super::*;
use crate::fake::{Fake, Fault};
use crate::provider::{CreateRequest, Guards, InstanceId, StopStart};
use crate::task::EnvOverrides;

/// When the client dies.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kill {
    Before(u32),
    After(u32),
    Never,
}

/// How the provider misbehaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    Well,
    /// The first create succeeds and its answer is lost.
    AnswerLost,
    /// What a create made shows in lists only after two of them.
    Late,
    /// Every create makes a second instance that nobody asked for, as where tokens mean nothing.
    Twice,
    /// An instance is still listed once after its end.
    Lingers,
}

/// A provider with scripted manners, whose client dies at one of its calls.
#[derive(Debug)]
struct Trap {
    world: Arc<Fake>,
    manner: Manner,
    kill: Kill,
    calls: AtomicU32,
    dead: Notify,
    hidden: Mutex<BTreeMap<InstanceId, u32>>,
    lingering: Mutex<Vec<Instance>>,
}

impl Trap {
    fn new(world: &Arc<Fake>, manner: Manner, kill: Kill) -> Arc<Self> {
        if manner == Manner::AnswerLost {
            world.fail_next(Fault::AnswerLost);
        }
        Arc::new(Self {
            world: world.clone(),
            manner,
            kill,
            calls: AtomicU32::new(0),
            dead: Notify::new(),
            hidden: Mutex::default(),
            lingering: Mutex::default(),
        })
    }

    async fn call<T>(&self, call: impl Future<Output = T>) -> T {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.kill == Kill::Before(number) {
            self.dead.notify_one();
            return pending().await;
        }
        let value = call.await;
        if self.kill == Kill::After(number) {
            self.dead.notify_one();
            return pending().await;
        }
        value
    }
}

#[async_trait]
impl Provider for Trap {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn guards(&self) -> Guards {
        self.world.guards()
    }

    async fn offers(&self) -> Result<Vec<Offer>> {
        self.call(self.world.offers()).await
    }

    async fn create(&self, request: &CreateRequest) -> Result<Instance> {
        self.call(async {
            let made = self.world.create(request).await;
            if self.manner == Manner::Twice {
                let again = CreateRequest {
                    token: format!("{}-again", request.token),
                    ..request.clone()
                };
                self.world.create(&again).await?;
            }
            if self.manner == Manner::Late {
                let id = made?.id;
                self.hidden.lock().expect("hidden").insert(id, 2);
                return Err(Error::Unavailable {
                    provider: "fake",
                    operation: "create",
                    source: "timed out".into(),
                });
            }
            made
        })
        .await
    }

    async fn describe(&self, id: &InstanceId) -> Result<Instance> {
        self.call(self.world.describe(id)).await
    }

    async fn list_owned(&self) -> Result<Vec<Instance>> {
        self.call(async {
            let mut listed = self.world.list_owned().await?;
            let mut hidden = self.hidden.lock().expect("hidden");
            listed.retain(|instance| !hidden.contains_key(&instance.id));
            hidden.retain(|_, lists| {
                *lists -= 1;
                *lists > 0
            });
            listed.append(&mut self.lingering.lock().expect("lingering"));
            Ok(listed)
        })
        .await
    }

    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        self.call(async {
            if let (Manner::Lingers, Ok(instance)) = (self.manner, self.world.describe(id).await) {
                self.lingering.lock().expect("lingering").push(instance);
            }
            self.world.terminate(id).await
        })
        .await
    }

    fn stop_start(&self) -> Option<&dyn StopStart> {
        self.world.stop_start()
    }
}

fn task() -> Task {
    Task::from_yaml("num_nodes: 2\nrun: 'true'\n", &EnvOverrides::new()).expect("task")
}

fn request() -> LaunchRequest {
    LaunchRequest {
        cluster: "c".into(),
        lease: Lease::default(),
        policy: FailoverPolicy::default(),
    }
}

fn engine(dir: &tempfile::TempDir, provider: Arc<dyn Provider>) -> Engine {
    let state = Arc::new(State::open(dir.path()).expect("state"));
    Engine::new(state, vec![provider])
}

/// Runs `work` until it ends or its client dies; the future is dropped there, as by `kill -9`.
async fn until_death(trap: &Trap, work: impl Future<Output = Result<()>>) -> bool {
    tokio::select! {
        biased;
        () = trap.dead.notified() => true,
        _ = work => false,
    }
}

/// After a death: one `gc`, and everything that runs is in the books.
async fn nothing_runs_unknown(dir: &tempfile::TempDir, world: &Arc<Fake>, what: &str) {
    let engine = engine(dir, world.clone());
    engine.gc().await.expect("gc");
    let rows = engine.state().open_nodes().expect("rows");
    for instance in world.list_owned().await.expect("list") {
        let known = rows
            .iter()
            .any(|row| row.state == NodeState::Live && row.instance.as_ref() == Some(&instance.id));
        assert!(known, "{what}: {} runs and nobody knows it", instance.id);
    }
}

/// Launches again and takes down: nothing of ours is left, neither instances nor rows.
async fn nothing_is_left_after_down(dir: &tempfile::TempDir, world: &Arc<Fake>, what: &str) {
    let engine = engine(dir, world.clone());
    engine.launch(&task(), &request()).await.expect(what);
    assert_eq!(world.list_owned().await.expect("list").len(), 2, "{what}");
    engine.down("c").await.expect(what);
    engine.gc().await.expect(what);
    assert_eq!(world.list_owned().await.expect("list"), [], "{what}");
    assert_eq!(engine.state().open_nodes().expect("rows"), [], "{what}");
    assert_eq!(engine.state().clusters().expect("rows"), [], "{what}");
}

const MANNERS: [Manner; 5] = [
    Manner::Well,
    Manner::AnswerLost,
    Manner::Late,
    Manner::Twice,
    Manner::Lingers,
];

#[tokio::test(start_paused = true)]
async fn killed_at_any_call_of_launch_nothing_leaks() {
    let mut deaths = 0;
    for manner in MANNERS {
        for number in 0.. {
            let mut died = false;
            for kill in [Kill::Before(number), Kill::After(number)] {
                let what = format!("launch, {manner:?}, {kill:?}");
                let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
                let trap = Trap::new(&world, manner, kill);
                let first = engine(&dir, trap.clone());
                let (task, request) = (task(), request());
                let work = async { first.launch(&task, &request).await.map(drop) };
                died |= until_death(&trap, work).await;
                drop(first);
                nothing_runs_unknown(&dir, &world, &what).await;
                nothing_is_left_after_down(&dir, &world, &what).await;
                deaths += u32::from(died);
            }
            if !died {
                break;
            }
        }
    }
    assert!(deaths > 30, "the trap closed only {deaths} times");
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_call_of_down_nothing_leaks() {
    let mut deaths = 0;
    for manner in MANNERS {
        for number in 0.. {
            let mut died = false;
            for kill in [Kill::Before(number), Kill::After(number)] {
                let what = format!("down, {manner:?}, {kill:?}");
                let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
                let calm = engine(&dir, Trap::new(&world, manner, Kill::Never));
                let launched = calm.launch(&task(), &request()).await;
                drop(calm);
                let trap = Trap::new(&world, manner, kill);
                let second = engine(&dir, trap.clone());
                died |= until_death(&trap, second.down("c")).await;
                drop(second);
                nothing_runs_unknown(&dir, &world, &what).await;
                let again = engine(&dir, world.clone());
                match again.down("c").await {
                    Ok(()) | Err(Error::NoSuchCluster { .. }) => {}
                    Err(error) => panic!("{what}: {error}"),
                }
                again.gc().await.expect("gc");
                assert_eq!(
                    world.list_owned().await.expect("list"),
                    [],
                    "{what}: {launched:?}"
                );
                assert_eq!(again.state().open_nodes().expect("rows"), [], "{what}");
                deaths += u32::from(died);
            }
            if !died {
                break;
            }
        }
    }
    assert!(deaths > 30, "the trap closed only {deaths} times");
}

#[tokio::test(start_paused = true)]
async fn a_launch_goes_on_where_it_was_killed() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    // Calls: offers, create of node 0, offers, then create of node 1: killed after it.
    let trap = Trap::new(&world, Manner::Well, Kill::After(3));
    let first = engine(&dir, trap.clone());
    let (task, request) = (task(), request());
    assert!(
        until_death(&trap, async {
            first.launch(&task, &request).await.map(drop)
        })
        .await
    );
    drop(first);
    let before = world.list_owned().await.expect("list");
    let second = engine(&dir, world.clone());
    let launched = second.launch(&task, &request).await.expect("goes on");
    assert_eq!(launched, before);
    let status = second.status(true).await.expect("status");
    assert_eq!(status[0].row.status, ClusterStatus::Up);
}

#[tokio::test]
async fn what_is_gone_elsewhere_is_recorded_on_refresh() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    let engine = engine(&dir, world.clone());
    let launched = engine.launch(&task(), &request()).await.expect("launch");
    engine.stop("c").await.expect("stop");
    assert_eq!(
        engine.status(true).await.expect("status")[0].row.status,
        ClusterStatus::Stopped
    );
    engine.start("c").await.expect("start");
    world.terminate(&launched[0].id).await.expect("preempted");
    assert_eq!(
        engine.status(true).await.expect("status")[0].row.status,
        ClusterStatus::Init
    );
    world.terminate(&launched[1].id).await.expect("preempted");
    assert!(engine.status(true).await.expect("status").is_empty());
    let costs = engine
        .cost_report(SystemTime::now() + Duration::from_secs(3600))
        .expect("costs");
    assert_eq!((costs[0].instances, costs[0].running), (2, false));
}

#[tokio::test]
async fn another_owners_instances_are_left_alone() {
    let (mine, theirs) = (
        tempfile::tempdir().expect("a"),
        tempfile::tempdir().expect("b"),
    );
    let world = Arc::new(Fake::new());
    engine(&theirs, world.clone())
        .launch(&task(), &request())
        .await
        .expect("theirs");
    assert_eq!(engine(&mine, world.clone()).gc().await.expect("gc"), []);
    assert_eq!(world.list_owned().await.expect("list").len(), 2);
}

#[tokio::test]
async fn a_cluster_is_worked_on_by_one() {
    let dir = tempfile::tempdir().expect("folder");
    let engine = engine(&dir, Arc::new(Fake::new()));
    let _lock = engine.state().lock("c").expect("free");
    let error = engine.launch(&task(), &request()).await.expect_err("busy");
    assert!(matches!(error, Error::Busy { .. }), "{error}");
}

#[tokio::test]
async fn a_secret_is_not_in_the_state_file() {
    let dir = tempfile::tempdir().expect("folder");
    let engine = engine(&dir, Arc::new(Fake::new()));
    let task = Task::builder()
        .with_secret("TOKEN", crate::Secret::new("hunter2".into()))
        .build()
        .expect("task");
    engine.launch(&task, &request()).await.expect("launch");
    for entry in std::fs::read_dir(dir.path()).expect("folder").flatten() {
        let bytes = std::fs::read(entry.path()).unwrap_or_default();
        assert!(
            !bytes.windows(7).any(|seven| seven == b"hunter2"),
            "{entry:?}"
        );
    }
}
