//! The leak test: killed before and after every call, with a provider at its worst.

mod late;

use std::sync::Arc;

use super::*;
use crate::conformance::{Kill, Manner, Trap};
use crate::fake::Fake;
use crate::task::EnvOverrides;

fn task() -> Task {
    Task::from_yaml("num_nodes: 2\nrun: 'true'\n", &EnvOverrides::new()).expect("task")
}

fn request() -> LaunchRequest {
    LaunchRequest {
        later: Vec::new(),
        cluster: "c".into(),
        lease: None,
        policy: FailoverPolicy::default(),
    }
}

fn engine(dir: &tempfile::TempDir, provider: Arc<dyn Provider>) -> Engine {
    let state = Arc::new(State::open(dir.path()).expect("state"));
    Engine::new(state, vec![provider])
}

/// After a death: one `gc`, and everything that runs is in the books.
async fn nothing_runs_unknown(dir: &tempfile::TempDir, world: &Arc<Fake>, what: &str) {
    let engine = engine(dir, world.clone());
    engine.gc().await.expect("gc");
    let rows = engine.state().open_nodes().expect("rows");
    for instance in world.list_owned(None).await.expect("list") {
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
    assert_eq!(
        world.list_owned(None).await.expect("list").len(),
        2,
        "{what}"
    );
    engine.down("c").await.expect(what);
    engine.gc().await.expect(what);
    assert_eq!(world.list_owned(None).await.expect("list"), [], "{what}");
    assert_eq!(engine.state().open_nodes().expect("rows"), [], "{what}");
    assert_eq!(engine.state().clusters().expect("rows"), [], "{what}");
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_call_of_launch_nothing_leaks() {
    let mut deaths = 0;
    for manner in Manner::ALL {
        for number in 0.. {
            let mut died = false;
            for kill in [Kill::Before(number), Kill::After(number)] {
                let what = format!("launch, {manner:?}, {kill:?}");
                let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
                let trap = Trap::new(world.clone(), manner, kill);
                let first = engine(&dir, trap.clone());
                let (task, request) = (task(), request());
                let work = async { first.launch(&task, &request).await.map(drop) };
                died |= trap.until_death(work).await;
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
    for manner in Manner::ALL {
        for number in 0.. {
            let mut died = false;
            for kill in [Kill::Before(number), Kill::After(number)] {
                let what = format!("down, {manner:?}, {kill:?}");
                let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
                let calm = engine(&dir, Trap::new(world.clone(), manner, Kill::Never));
                let launched = calm.launch(&task(), &request()).await;
                drop(calm);
                let trap = Trap::new(world.clone(), manner, kill);
                let second = engine(&dir, trap.clone());
                died |= trap.until_death(second.down("c")).await;
                drop(second);
                nothing_runs_unknown(&dir, &world, &what).await;
                let again = engine(&dir, world.clone());
                match again.down("c").await {
                    Ok(()) | Err(Error::NoSuchCluster { .. }) => {}
                    Err(error) => panic!("{what}: {error}"),
                }
                again.gc().await.expect("gc");
                assert_eq!(
                    world.list_owned(None).await.expect("list"),
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

/// A lease that the provider itself can keep, so that the test sees it kept.
#[cfg(all(feature = "agent", feature = "local"))]
fn blind_lease() -> Lease {
    Lease {
        idle: Some(Duration::from_secs(600)),
        down: true,
        wait_for: crate::WaitFor::None,
    }
}

/// An agent that agrees to everything and writes down what it was told in `calls`: what nodes do is told
/// in the integration tests.
#[cfg(all(feature = "agent", feature = "local"))]
fn agreeable(dir: &tempfile::TempDir) -> crate::agent::AgentBinary {
    let (script, calls) = (dir.path().join("agent"), dir.path().join("calls"));
    let text = format!(
        "echo \"$@\" >> {}; echo '{{\"port\": 1, \"secret\": \"s\"}}'\n",
        calls.display()
    );
    std::fs::write(&script, text).expect("write");
    crate::agent::AgentBinary::new("/bin/sh", script.to_str().expect("utf-8")).expect("sh")
}

#[cfg(all(feature = "agent", feature = "local"))]
#[tokio::test]
async fn killed_at_any_call_of_autostop_nothing_leaks() {
    let mut deaths = 0;
    let over = SystemTime::now() + Duration::from_secs(3600);
    for manner in Manner::ALL {
        for number in 0.. {
            let mut died = false;
            for kill in [Kill::Before(number), Kill::After(number)] {
                let what = format!("autostop, {manner:?}, {kill:?}");
                let dir = tempfile::tempdir().expect("folder");
                let node = dir.path().join("node");
                std::fs::create_dir(&node).expect("folder");
                let world = Arc::new(Fake::new().with_dir(node));
                let calm = engine(&dir, world.clone());
                calm.launch(&task(), &request()).await.expect("launch");
                let trap = Trap::new(world.clone(), manner, kill);
                let second = engine(&dir, trap.clone());
                died |= trap
                    .until_death(second.autostop("c", &agreeable(&dir), blind_lease()))
                    .await;
                drop(second);
                // What was asked for is in the books before anybody is told.
                let row = calm.state().cluster("c").expect("row").expect("there");
                assert_eq!(row.lease, blind_lease(), "{what}");
                nothing_runs_unknown(&dir, &world, &what).await;
                // Run again, all of it ends by itself, and nothing is left to be done.
                let again = engine(&dir, Trap::new(world.clone(), manner, Kill::Never));
                again
                    .autostop("c", &agreeable(&dir), blind_lease())
                    .await
                    .expect(&what);
                world.pass(over);
                assert_eq!(world.list_owned(None).await.expect("list"), [], "{what}");
                engine(&dir, world.clone()).gc().await.expect("gc");
                assert_eq!(calm.state().open_nodes().expect("rows"), [], "{what}");
                assert_eq!(calm.state().clusters().expect("rows"), [], "{what}");
                deaths += u32::from(died);
            }
            if !died {
                break;
            }
        }
    }
    assert!(deaths > 30, "the trap closed only {deaths} times");
}

/// Nodes that end by themselves, one or all, at any call of their client: what runs is known, and
/// after down nothing is left.
#[cfg(all(feature = "agent", feature = "local"))]
#[tokio::test(start_paused = true)]
async fn ended_by_itself_at_any_call_nothing_leaks() {
    let mut ends = 0;
    for manner in Manner::ALL {
        for verb in ["launch", "status", "down"] {
            for number in 0.. {
                let what = format!("{verb}, {manner:?}, ended at call {number}");
                let dir = tempfile::tempdir().expect("folder");
                let world = Arc::new(Fake::new());
                let calm = engine(&dir, world.clone());
                let launched = calm.launch(&task(), &request()).await.expect("launch");
                let trap = Trap::new(world.clone(), manner, Kill::Before(number));
                let second = engine(&dir, trap.clone());
                let (task, request) = (task(), request());
                let work = async {
                    match verb {
                        "launch" => second.launch(&task, &request).await.map(drop),
                        "status" => second.status(true).await.map(drop),
                        _ => second.down("c").await,
                    }
                };
                // One node goes with the client, the other with the next.
                let died = trap.until_death(work).await;
                world.terminate(&launched[0].id).await.expect("ends");
                nothing_runs_unknown(&dir, &world, &what).await;
                world.terminate(&launched[1].id).await.expect("ends");
                nothing_runs_unknown(&dir, &world, &what).await;
                nothing_is_left_after_down(&dir, &world, &what).await;
                ends += u32::from(died);
                if !died {
                    break;
                }
            }
        }
    }
    assert!(ends > 30, "nodes ended only {ends} times");
}

#[tokio::test]
async fn a_machine_that_was_taken_back_is_told_from_one_that_ended() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(spot_world()));
    let engine = engine(&dir, world.clone());
    let spot = Task::from_yaml("resources: {use_spot: true}\n", &EnvOverrides::new());
    let spot = spot.expect("task");
    let first = engine.launch(&spot, &request()).await.expect("launch");
    world.terminate(&first[0].id).await.expect("ended");
    assert!(!engine.was_preempted("c").await.expect("asked"));
    let second = engine.launch(&spot, &request()).await.expect("launch");
    world.preempt(&second[0].id);
    assert!(engine.was_preempted("c").await.expect("asked"));
}

fn spot_world() -> Fake {
    Fake::with_offers(vec![Offer {
        provider: "fake".into(),
        instance_type: "s".into(),
        region: "fake-1".into(),
        zone: None,
        cpus: 4.0,
        memory_gib: 16.0,
        disk_gib: None,
        accelerator: None,
        spot: true,
        usd_per_hour: 0.1,
    }])
}

#[tokio::test]
async fn a_tasks_ports_are_opened_where_they_are_shut() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    let engine = engine(&dir, world.clone());
    let yaml = "resources: {ports: [8080, 9000-9001]}\n";
    let task = Task::from_yaml(yaml, &EnvOverrides::new()).expect("task");
    let launched = engine.launch(&task, &request()).await.expect("launch");
    assert_eq!(world.exposed(&launched[0].id), [8080, 9000, 9001]);
}

#[tokio::test(start_paused = true)]
async fn a_launch_goes_on_where_it_was_killed() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    // Calls: offers, create of node 0, offers, then create of node 1: killed after it.
    let trap = Trap::new(world.clone(), Manner::Well, Kill::After(3));
    let first = engine(&dir, trap.clone());
    let (task, request) = (task(), request());
    assert!(
        trap.until_death(async { first.launch(&task, &request).await.map(drop) })
            .await
    );
    drop(first);
    let before = world.list_owned(None).await.expect("list");
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
    assert_eq!(world.list_owned(None).await.expect("list").len(), 2);
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

fn lease(minutes: u64) -> Lease {
    Lease {
        idle: Some(Duration::from_secs(60 * minutes)),
        down: true,
        ..Lease::default()
    }
}

#[tokio::test]
async fn launching_again_leaves_autostop_as_it_is_unless_it_is_told() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    let engine = engine(&dir, world.clone());
    let kept = || {
        engine
            .state()
            .cluster("c")
            .expect("row")
            .expect("there")
            .lease
    };
    let with = |lease: Option<Lease>| LaunchRequest { lease, ..request() };
    for (told, after) in [
        (Some(lease(10)), lease(10)),
        (None, lease(10)),
        (Some(lease(20)), lease(20)),
        (None, lease(20)),
        (Some(Lease::default()), Lease::default()),
    ] {
        engine.launch(&task(), &with(told)).await.expect("launch");
        assert_eq!(kept(), after, "{told:?}");
    }
    // A cluster that has ended by itself is not the one that is launched in its name.
    engine
        .launch(&task(), &with(Some(lease(10))))
        .await
        .expect("launch");
    for instance in world.list_owned(None).await.expect("list") {
        world.terminate(&instance.id).await.expect("ended");
    }
    let three = Task::from_yaml("num_nodes: 3\n", &EnvOverrides::new()).expect("task");
    let launched = engine.launch(&three, &with(None)).await.expect("launch");
    assert_eq!((launched.len(), kept()), (3, Lease::default()));
}

#[cfg(all(feature = "agent", feature = "local"))]
#[tokio::test]
async fn nodes_of_a_launch_that_fails_are_guarded_and_named() {
    let dir = tempfile::tempdir().expect("folder");
    let node = dir.path().join("node");
    std::fs::create_dir(&node).expect("folder");
    let agent = agreeable(&dir);
    // Enough for one of two.
    let world = Arc::new(crate::Budget::new(Fake::new().with_dir(node), 0.15));
    let engine = engine(&dir, world.clone());
    let request = LaunchRequest {
        lease: Some(lease(10)),
        ..request()
    };
    let launched = engine.launch_guarded(&task(), &request, &agent).await;
    let error = launched.expect_err("too dear");
    let left = world.list_owned(None).await.expect("list");
    let [left] = left.as_slice() else {
        panic!("{left:?}");
    };
    let Error::LaunchedInPart {
        running, source, ..
    } = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!(*running, left.id.to_string());
    assert!(matches!(**source, Error::OverBudget { .. }), "{source:?}");
    let calls = std::fs::read_to_string(dir.path().join("calls")).expect("calls");
    let verbs: Vec<_> = calls
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    for verb in ["hold", "set", "lease"] {
        assert!(verbs.contains(&verb), "{calls}");
    }
    engine.down("c").await.expect("down");
}

#[tokio::test]
async fn a_node_that_does_not_hear_keeps_no_other_up() {
    let (dir, fake) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    let world = Arc::new(crate::conformance::Deaf::new(fake.clone()));
    let engine = engine(&dir, world.clone());
    let launched = engine.launch(&task(), &request()).await.expect("launch");
    world.shut_ears_to(&launched[0].id);
    let error = engine.stop("c").await.expect_err("one is not stopped");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    let state_of = |id: InstanceId| async move { fake.describe(&id).await.map(|one| one.state) };
    let second = state_of(launched[1].id.clone()).await.expect("there");
    assert_eq!(second, InstanceState::Stopped);
    let error = engine.down("c").await.expect_err("one is not ended");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    let left = world.list_owned(None).await.expect("list");
    assert_eq!(left.len(), 1, "{left:?}");
    // Given up, it is nobody's, and the name is free.
    engine.purge("c").expect("purge");
    assert_eq!(engine.state().open_nodes().expect("rows"), []);
    assert_eq!(engine.state().clusters().expect("rows"), []);
    assert!(matches!(
        engine.purge("c"),
        Err(Error::NoSuchCluster { .. })
    ));
}

#[tokio::test]
async fn a_provider_that_is_missing_hides_only_its_own_clusters() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    let first = engine(&dir, world.clone());
    first.launch(&task(), &request()).await.expect("launch");
    let without = Engine::new(first.state().clone(), Vec::new());
    assert_eq!(without.status(true).await.expect("status").len(), 1);
    assert_eq!(without.gc().await.expect("gc"), []);
    assert_eq!(first.state().open_nodes().expect("rows").len(), 2);
}

#[tokio::test]
async fn what_cannot_be_a_name_leads_nowhere() {
    let dir = tempfile::tempdir().expect("folder");
    let engine = engine(&dir, Arc::new(Fake::new()));
    for name in ["", ".", "..", "../state.db", "a/b"] {
        let error = engine.down(name).await.expect_err(name);
        assert!(
            matches!(error, Error::NoSuchCluster { .. }),
            "{name}: {error:?}"
        );
    }
    assert!(
        std::fs::metadata(dir.path().join("state.db"))
            .expect("there")
            .len()
            > 0
    );
}
