//! The articles' story, whole, on this machine and on machines over ssh: launch, exec, queue, logs,
//! autostop, down.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use updraft_provision::agent::{AgentBinary, QueueStatus};
use updraft_provision::providers::local::LocalProvider;
use updraft_provision::{
    Engine, EnvOverrides, ExecOptions, FailoverPolicy, LaunchRequest, Lease, Provider, State, Task,
    WaitFor,
};

struct Story {
    engine: Engine,
    agent: AgentBinary,
    options: ExecOptions,
    dir: tempfile::TempDir,
}

impl Story {
    fn new(provider: impl FnOnce(&Path) -> Arc<dyn Provider>) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let state = Arc::new(State::open(dir.path().join("state")).expect("state"));
        let project = dir.path().join("project");
        std::fs::create_dir_all(project.join("cache")).expect("project");
        for (name, text) in [
            ("train.sh", "echo trained $1"),
            (".gitignore", "cache/\n*.log\n"),
            ("cache/large", "x"),
            ("old.log", "x"),
        ] {
            std::fs::write(project.join(name), text).expect("write");
        }
        Self {
            engine: Engine::new(state, vec![provider(dir.path())]),
            agent: AgentBinary::new(env!("CARGO_BIN_EXE_updraft-agent"), "").expect("agent"),
            options: ExecOptions {
                setup: true,
                base: project,
            },
            dir,
        }
    }

    fn request(&self) -> LaunchRequest {
        LaunchRequest {
            cluster: "mycluster".into(),
            lease: Lease::default(),
            policy: FailoverPolicy::default(),
        }
    }

    async fn log(&self, job: updraft_provision::JobId) -> Vec<String> {
        let logs = self
            .engine
            .logs("mycluster", &self.agent, Some(job), true)
            .await;
        let mut logs = logs.expect("logs");
        let mut lines = Vec::new();
        while let Some(line) = logs.next_line().await.expect("line") {
            lines.push(line);
        }
        lines
    }
}

fn task(yaml: &str) -> Task {
    Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml)
}

async fn tell(story: Story) {
    let (engine, agent) = (&story.engine, &story.agent);
    std::fs::write(story.dir.path().join("project/words"), "hello").expect("write");
    let first = task(
        "workdir: .\nfile_mounts: {~/in/words: ./words}\nenvs: {WORD: \"it's\"}\n\
         setup: echo prepared > ready\n\
         run: |\n  cat ready; ls; bash train.sh \"$WORD\"; cat ../in/words\n",
    );
    engine
        .launch(&first, &story.request())
        .await
        .expect("launch");
    let job = engine
        .exec("mycluster", &first, agent, &story.options)
        .await
        .expect("exec");
    assert_eq!(
        story.log(job).await,
        [
            "prepared",
            "ready",
            "train.sh",
            "words",
            "trained it's",
            "hello"
        ]
    );

    // Detached jobs wait in the queue; only `run` is run.
    let options = ExecOptions {
        setup: false,
        ..story.options.clone()
    };
    let mut jobs = Vec::new();
    for number in 0..3 {
        let yaml = format!("setup: exit 1\nrun: echo job {number} $SKYPILOT_NODE_RANK\n");
        jobs.push(
            engine
                .exec("mycluster", &task(&yaml), agent, &options)
                .await
                .expect("exec"),
        );
    }
    for (number, job) in jobs.iter().enumerate() {
        assert_eq!(story.log(*job).await, [format!("job {number} 0")]);
    }
    let queue = engine.queue("mycluster", agent).await.expect("queue");
    assert_eq!(queue.len(), 4);
    assert!(
        queue.iter().all(|job| job.status == QueueStatus::Succeeded),
        "{queue:?}"
    );

    // A job that would run for ever, cancelled.
    let forever = engine
        .exec("mycluster", &task("run: sleep 600\n"), agent, &options)
        .await;
    let forever = forever.expect("exec");
    assert_eq!(
        engine
            .cancel("mycluster", agent, Some(forever))
            .await
            .expect("cancel"),
        1
    );
    let row = engine
        .wait("mycluster", agent, forever)
        .await
        .expect("ends");
    assert_eq!(row.status, QueueStatus::Cancelled);

    // Stopped, nothing runs and the files stay; started, they are there.
    engine.stop("mycluster").await.expect("stop");
    engine.start("mycluster").await.expect("start");
    let there = engine
        .exec(
            "mycluster",
            &task("run: cat sky_workdir/ready\n"),
            agent,
            &options,
        )
        .await;
    assert_eq!(story.log(there.expect("exec")).await, ["prepared"]);

    // Idle, the cluster ends itself; the client finds it gone.
    let lease = Lease {
        idle: Some(Duration::from_secs(1)),
        down: true,
        wait_for: WaitFor::Jobs,
    };
    engine
        .autostop("mycluster", agent, lease)
        .await
        .expect("autostop");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !engine.status(true).await.expect("status").is_empty() {
        assert!(Instant::now() < deadline, "the idle cluster is still there");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(engine.gc().await.expect("gc"), []);
}

#[tokio::test]
async fn the_story_on_this_machine() {
    tell(Story::new(|dir| {
        Arc::new(LocalProvider::new(dir.join("instances")).expect("absolute"))
    }))
    .await;
}

#[tokio::test]
async fn the_story_over_ssh() {
    use updraft_provision::providers::ssh::SshProvider;
    let Some(machines) = crate::sshd::machines(1) else {
        return;
    };
    tell(Story::new(|_| {
        Arc::new(SshProvider::new(machines.hosts.clone()))
    }))
    .await;
}

/// Two nodes see each other's place, and down ends what runs on both.
#[tokio::test]
async fn a_task_of_two_nodes_has_two_ranks() {
    let story =
        Story::new(|dir| Arc::new(LocalProvider::new(dir.join("instances")).expect("absolute")));
    let two = task(
        "num_nodes: 2\nrun: |\n  echo $SKYPILOT_NODE_RANK of $SKYPILOT_NUM_NODES; sleep 600\n",
    );
    let instances = story
        .engine
        .launch(&two, &story.request())
        .await
        .expect("launch");
    assert_eq!(instances.len(), 2);
    story
        .engine
        .exec("mycluster", &two, &story.agent, &story.options)
        .await
        .expect("exec");
    for (rank, instance) in instances.iter().enumerate() {
        let log = story
            .dir
            .path()
            .join("instances")
            .join(&instance.id.0)
            .join("files/.updraft/jobs/1/run.log");
        let deadline = Instant::now() + Duration::from_secs(60);
        while std::fs::read_to_string(&log).unwrap_or_default() != format!("{rank} of 2\n") {
            assert!(Instant::now() < deadline, "node {rank} says nothing");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    story.engine.down("mycluster").await.expect("down");
    assert_eq!(
        std::fs::read_dir(story.dir.path().join("instances"))
            .expect("root")
            .count(),
        0
    );
}

/// Without rsync the same files arrive, by tar.
#[tokio::test]
async fn tar_copies_what_rsync_copies() {
    use updraft_provision::Syncer;
    use updraft_provision::providers::local::LocalTransport;
    let story =
        Story::new(|dir| Arc::new(LocalProvider::new(dir.join("instances")).expect("absolute")));
    let home = story.dir.path().join("node");
    std::fs::create_dir(&home).expect("folder");
    let transport = Arc::new(LocalTransport::new(&home));
    let syncer = Syncer::new(None, transport).without_rsync();
    syncer
        .folder(&story.dir.path().join("project"), "copy")
        .await
        .expect("copied");
    let mut names: Vec<_> = std::fs::read_dir(home.join("files/copy"))
        .expect("copy")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, [".gitignore", "train.sh"]);
}

/// Killed at any of its provider calls, then run again: the nodes end themselves with everything that
/// runs on them, and the books are empty.
#[tokio::test]
async fn killed_at_any_call_of_autostop_the_nodes_still_end() {
    use updraft_provision::conformance::{Kill, Manner, Trap};
    let lease = Lease {
        idle: Some(Duration::ZERO),
        down: true,
        wait_for: WaitFor::None, // the job that runs does not count
    };
    for kill in [Kill::Before(0), Kill::After(0), Kill::After(1)] {
        let mut root = None;
        let story = Story::new(|dir| {
            let instances = dir.join("instances");
            root = Some(instances.clone());
            Arc::new(LocalProvider::new(instances).expect("absolute"))
        });
        let (root, engine) = (root.expect("made"), &story.engine);
        let two = task("num_nodes: 2\nrun: 'echo $$; exec sleep 600'\n");
        engine.launch(&two, &story.request()).await.expect("launch");
        let job = engine
            .exec("mycluster", &two, &story.agent, &story.options)
            .await
            .expect("exec");
        let mut logs = engine
            .logs("mycluster", &story.agent, Some(job), true)
            .await
            .expect("logs");
        let mut pids = Vec::new();
        while pids.len() < 2 {
            let line = logs.next_line().await.expect("line").expect("runs");
            pids.push(line.rsplit(' ').next().expect("a pid").to_owned());
        }
        let world = Arc::new(LocalProvider::new(&root).expect("absolute"));
        let trap = Trap::new(world, Manner::Well, kill);
        let second = Engine::new(engine.state().clone(), vec![trap.clone()]);
        let work = second.autostop("mycluster", &story.agent, lease);
        assert!(trap.until_death(work).await, "{kill:?}");
        drop(second);
        // What the first call had reached may have ended; the rest is known, and ends when run again.
        assert_eq!(engine.gc().await.expect("gc"), [], "{kill:?}");
        match engine.autostop("mycluster", &story.agent, lease).await {
            Ok(()) => {}
            Err(_) if std::fs::read_dir(&root).expect("root").count() < 2 => {}
            Err(error) => panic!("{kill:?}: {error}"),
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while std::fs::read_dir(&root).expect("root").count() > 0 {
            assert!(Instant::now() < deadline, "{kill:?}: a node did not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for pid in pids {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let is_gone = state.is_empty() || state.contains(") Z ");
            assert!(is_gone, "{kill:?}: a job outlives its node: {state}");
        }
        engine.gc().await.expect("gc");
        assert_eq!(engine.state().open_nodes().expect("rows"), [], "{kill:?}");
        assert_eq!(engine.state().clusters().expect("rows"), [], "{kill:?}");
    }
}
