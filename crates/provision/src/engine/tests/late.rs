//! Clouds whose lists are behind their calls, and what is billed meanwhile.

use super::*;
use crate::fake::Fault;

const HOUR: Duration = Duration::from_secs(3600);

/// A cloud with one machine, whose lists may be an hour behind.
fn slow_world() -> Arc<Fake> {
    let offers = spot_world().offers;
    let offers = offers.into_iter().map(|offer| Offer {
        spot: false,
        ..offer
    });
    Arc::new(Fake::with_offers(offers.collect()).with_settling(HOUR))
}

fn one() -> Task {
    Task::from_yaml("run: 'true'\n", &EnvOverrides::new()).expect("task")
}

/// A launch whose only create was not answered, and shows in no list.
async fn unanswered(engine: &Engine, world: &Fake) {
    world.fail_next(Fault::Hidden);
    let error = engine.launch(&one(), &request()).await.expect_err("lost");
    assert!(matches!(error, Error::Exhausted { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_unanswered_create_is_looked_for_until_lists_have_settled() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), slow_world());
    let engine = engine(&dir, world.clone());
    unanswered(&engine, &world).await;
    let error = engine.down("c").await.expect_err("nobody can know yet");
    assert!(matches!(error, Error::Unconfirmed { instances: 1, .. }));
    let now = SystemTime::now();
    engine.gc_at(now + HOUR / 2).await.expect("gc");
    assert_eq!(engine.state().open_nodes().expect("rows").len(), 1);
    // It was there all along: whoever looks when it shows ends it.
    world.reveal();
    let ended = engine.gc_at(now + HOUR / 2).await.expect("gc");
    assert_eq!(ended.len(), 1);
    assert_eq!(world.list_owned(None).await.expect("list"), []);
    engine.gc_at(now + HOUR / 2).await.expect("gc");
    assert_eq!(engine.state().clusters().expect("rows"), []);
}

#[tokio::test(start_paused = true)]
async fn an_unanswered_create_that_made_nothing_is_forgotten_in_the_end() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), slow_world());
    let engine = engine(&dir, world.clone());
    unanswered(&engine, &world).await;
    let now = SystemTime::now();
    engine.gc_at(now).await.expect("gc");
    assert_eq!(engine.state().open_nodes().expect("rows").len(), 1);
    engine.gc_at(now + 2 * HOUR).await.expect("gc");
    assert_eq!(engine.state().open_nodes().expect("rows"), []);
    assert_eq!(engine.state().clusters().expect("rows"), []);
}

#[tokio::test(start_paused = true)]
async fn what_shows_up_after_its_row_is_gone_is_known_by_its_owner() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), slow_world());
    let engine = engine(&dir, world.clone());
    unanswered(&engine, &world).await;
    engine
        .gc_at(SystemTime::now() + 2 * HOUR)
        .await
        .expect("gc");
    assert_eq!(engine.state().open_nodes().expect("rows"), []);
    world.reveal();
    assert_eq!(engine.gc().await.expect("gc").len(), 1);
    assert_eq!(world.list_owned(None).await.expect("list"), []);
}

#[tokio::test(start_paused = true)]
async fn a_young_instance_that_a_list_lacks_is_not_written_off() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), slow_world());
    let engine = engine(&dir, world.clone());
    let launched = engine.launch(&one(), &request()).await.expect("launch");
    world.hide(&launched[0].id);
    let status = engine.status(true).await.expect("status");
    assert_eq!(status.len(), 1, "its cluster is still in the books");
    let error = engine.down("c").await.expect_err("absent, and too young");
    assert!(matches!(error, Error::Unconfirmed { .. }), "{error}");
    world.reveal();
    engine.down("c").await.expect("now it was seen, and ended");
    assert_eq!(world.list_owned(None).await.expect("list"), []);
    assert_eq!(engine.state().open_nodes().expect("rows"), []);
}

#[tokio::test]
async fn what_was_seen_ends_at_once() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), slow_world());
    let engine = engine(&dir, world.clone());
    engine.launch(&one(), &request()).await.expect("launch");
    engine.down("c").await.expect("down");
    assert_eq!(engine.state().open_nodes().expect("rows"), []);
}

#[tokio::test]
async fn stopped_hours_are_not_billed() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    let engine = engine(&dir, world.clone());
    engine.launch(&one(), &request()).await.expect("launch");
    let later = |hours: u32| SystemTime::now() + hours * HOUR;
    let hours = |at: SystemTime| {
        let costs = engine.cost_report(at).expect("costs");
        assert_ne!(costs[0].running, costs[0].stopped);
        (costs[0].hours.round() as u32, costs[0].running)
    };
    assert_eq!(hours(later(3)), (3, true));
    engine.stop("c").await.expect("stop");
    assert_eq!(hours(later(3)), (0, false));
    engine.start("c").await.expect("start");
    assert_eq!(hours(later(3)), (3, true));
    // One that has stopped itself is found out by whoever asks.
    let rows = engine.state().open_nodes().expect("rows");
    let id = rows[0].instance.clone().expect("created");
    let power = world.stop_start().expect("it can");
    power.stop(&id).await.expect("stops itself");
    engine.status(true).await.expect("status");
    assert_eq!(hours(later(3)), (0, false));
}

#[tokio::test]
async fn hours_before_and_after_a_stop_add_up() {
    let dir = tempfile::tempdir().expect("folder");
    let state = State::open(dir.path()).expect("state");
    let (offer, begun) = (slow_world().offers[0].clone(), SystemTime::now());
    let token = state.intend("c", 0, &offer, begun).expect("intend");
    let id = InstanceId("i".into());
    state.created(&token, &id, begun).expect("created");
    let at = |hours: u32| begun + hours * HOUR;
    for (hour, is_stopped) in [(1, true), (2, true), (5, false), (6, true), (6, true)] {
        state.seen(&token, is_stopped, at(hour)).expect("seen");
    }
    let ran = || state.all_nodes().expect("rows")[0].ran(at(10));
    assert_eq!(ran(), 2 * HOUR, "the first hour and the sixth");
    state.ended(&token, at(9)).expect("ended");
    assert_eq!(ran(), 2 * HOUR);
}

#[tokio::test]
async fn a_state_file_of_before_is_read() {
    let dir = tempfile::tempdir().expect("folder");
    let file = dir.path().join("state.db");
    let old = "CREATE TABLE nodes (id INTEGER PRIMARY KEY AUTOINCREMENT, cluster TEXT NOT NULL,
        node_rank INTEGER NOT NULL, provider TEXT NOT NULL, instance TEXT, state TEXT NOT NULL,
        offer TEXT NOT NULL, intended INTEGER NOT NULL, created INTEGER, ended INTEGER)";
    let db = rusqlite::Connection::open(&file).expect("db");
    db.execute(old, []).expect("old schema");
    drop(db);
    for _ in 0..2 {
        let state = State::open(dir.path()).expect("opens");
        assert_eq!(state.open_nodes().expect("rows"), []);
    }
}

#[tokio::test]
async fn labels_and_disk_are_asked_for() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    let engine = engine(&dir, world.clone());
    let yaml =
        "resources: {labels: {team: a}, any_of: [{cpus: 2, labels: {who: b}, disk_size: 80}]}\n";
    let task = Task::from_yaml(yaml, &EnvOverrides::new()).expect("task");
    let launched = engine.launch(&task, &request()).await.expect("launch");
    let labels = |pairs: &[(&str, &str)]| -> std::collections::BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    };
    assert_eq!(launched[0].labels, labels(&[("team", "a"), ("who", "b")]));
    assert_eq!(world.asked_disks(), [Some(80)]);
}

#[tokio::test]
async fn a_cluster_does_for_every_task_of_a_pipeline() {
    let (dir, world) = (tempfile::tempdir().expect("folder"), Arc::new(Fake::new()));
    let engine = engine(&dir, world.clone());
    let parse = |yaml: &str| Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml);
    let later = parse("name: second\nnum_nodes: 2\nresources: {cpus: 8+, ports: 9000}\n");
    let request = LaunchRequest {
        later: vec![later],
        ..request()
    };
    let launched = engine.launch(&one(), &request).await.expect("launch");
    assert_eq!(launched.len(), 2, "as many as the larger needs");
    let rows = engine.state().open_nodes().expect("rows");
    assert_eq!(rows[0].offer.instance_type, "large", "small is too small");
    assert_eq!(world.exposed(&launched[0].id), [9000]);
    let never = LaunchRequest {
        cluster: "d".into(),
        later: vec![parse("name: huge\nresources: {cpus: 64}\n")],
        ..request
    };
    let error = engine.launch(&one(), &never).await.expect_err("too large");
    let text = error.to_string();
    assert!(
        text.contains("does not do for `huge`: has 16 cpus"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_launch_waits_for_what_starts_and_not_for_ever() {
    let dir = tempfile::tempdir().expect("folder");
    let world = Arc::new(Fake::new().with_boots(90));
    let begun = tokio::time::Instant::now();
    let slow = engine(&dir, world.clone());
    let launched = slow.launch(&one(), &request()).await.expect("launch");
    assert_eq!(launched[0].state, InstanceState::Running);
    assert_eq!(begun.elapsed().as_secs(), 90, "a look each second");
    slow.down("c").await.expect("down");

    let world = Arc::new(Fake::new().with_boots(u32::MAX));
    let never = engine(&dir, world.clone());
    let begun = tokio::time::Instant::now();
    let error = never.launch(&one(), &request()).await.expect_err("never");
    assert_eq!(begun.elapsed().as_secs(), 1800);
    let Error::LaunchedInPart { source, .. } = &error else {
        panic!("{error:?}");
    };
    assert!(matches!(**source, Error::Unavailable { .. }), "{source}");
    assert!(source.to_string().contains("start an instance"), "{source}");
    // It may come up yet, and is still in the books.
    assert_eq!(never.state().open_nodes().expect("rows").len(), 1);
    never.down("c").await.expect("down");
    assert_eq!(world.list_owned(None).await.expect("list"), []);
}
