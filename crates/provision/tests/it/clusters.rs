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

pub(crate) struct Story {
    pub(crate) engine: Engine,
    pub(crate) agent: AgentBinary,
    pub(crate) options: ExecOptions,
    pub(crate) dir: tempfile::TempDir,
}

impl Story {
    pub(crate) fn new(provider: impl FnOnce(&Path) -> Arc<dyn Provider>) -> Self {
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

    pub(crate) fn request(&self) -> LaunchRequest {
        LaunchRequest {
            later: Vec::new(),
            cluster: "mycluster".into(),
            lease: None,
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

pub(crate) fn task(yaml: &str) -> Task {
    Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml)
}

async fn tell(story: Story) {
    let (engine, agent) = (&story.engine, &story.agent);
    std::fs::write(story.dir.path().join("project/words"), "hello").expect("write");
    let first = task(
        "workdir: .\nfile_mounts: {~/in/words: ./words}\nenvs: {WORD: \"it's\"}\n\
         setup: echo prepared > ready\n\
         run: |\n  cat ready; ls; bash train.sh \"$WORD\"; cat ~/in/words\n",
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
        .exec("mycluster", &task("run: cat ready; pwd\n"), agent, &options)
        .await;
    let said = story.log(there.expect("exec")).await;
    assert_eq!(said[0], "prepared");
    assert!(said[1].ends_with("/files/sky_workdir"), "{said:?}");

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

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not in a minute");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

/// What a job has left running, in its group or out of it, ends with its cluster: by down, by stop and by
/// autostop.
async fn what_a_job_leaves_ends(provider: impl Fn(&Path) -> Arc<dyn Provider>) {
    for verb in ["down", "stop", "autostop"] {
        let story = Story::new(&provider);
        let leaves = task(
            "run: |\n  sleep 600 & echo $!\n  setsid bash -c 'echo $$; exec sleep 600' & sleep 0.2\n  true\n",
        );
        let (engine, agent) = (&story.engine, &story.agent);
        engine
            .launch_guarded(&leaves, &story.request(), agent)
            .await
            .expect("launch");
        let exec = engine.exec("mycluster", &leaves, agent, &story.options);
        let job = exec.await.expect("exec");
        let row = engine.wait("mycluster", agent, job).await.expect("wait");
        assert_eq!(row.status, QueueStatus::Succeeded);
        let pids = story.log(job).await;
        assert!(
            pids.len() == 2 && pids.iter().all(|pid| runs(pid)),
            "{pids:?}"
        );
        match verb {
            "down" => engine.down("mycluster").await.expect("down"),
            "stop" => engine.stop("mycluster").await.expect("stop"),
            _ => {
                let lease = Lease {
                    idle: Some(Duration::ZERO),
                    down: true,
                    wait_for: WaitFor::None,
                };
                engine
                    .autostop("mycluster", agent, lease)
                    .await
                    .expect("autostop");
            }
        }
        until(verb, || !pids.iter().any(|pid| runs(pid))).await;
        if verb == "stop" {
            engine.down("mycluster").await.expect("down");
        }
    }
}

#[tokio::test]
async fn what_a_job_leaves_ends_on_this_machine() {
    what_a_job_leaves_ends(|dir| {
        Arc::new(LocalProvider::new(dir.join("instances")).expect("absolute"))
    })
    .await;
}

#[tokio::test]
async fn what_a_job_leaves_ends_over_ssh() {
    use updraft_provision::providers::ssh::SshProvider;
    let Some(machines) = crate::sshd::machines(1) else {
        return;
    };
    what_a_job_leaves_ends(|_| Arc::new(SshProvider::new(machines.hosts.clone()))).await;
}

/// A machine that comes up starts its agent by itself, which then ends the node; and nothing of that is
/// left on it.
#[tokio::test]
async fn a_machine_that_comes_up_starts_its_agent() {
    use std::os::unix::fs::PermissionsExt;
    use updraft_provision::agent::Queue;
    use updraft_provision::providers::ssh::SshProvider;
    let Some(machines) = crate::sshd::machines(1) else {
        return;
    };
    // Cron, as far as an agent sees it: a file, which starts out with a line of the user's.
    let (home, bin) = (machines.home(0), machines.home(0).join("bin"));
    let table = home.join("table");
    std::fs::create_dir(&bin).expect("folder");
    let stand_in = bin.join("crontab");
    let script =
        "#!/bin/sh\ncase $1 in -l) cat ~/table ;; -) cat > ~/new; mv ~/new ~/table ;; esac\n";
    std::fs::write(&stand_in, script).expect("write");
    std::fs::set_permissions(&stand_in, PermissionsExt::from_mode(0o755)).expect("mode");
    std::fs::write(&table, "0 0 * * * mine\n").expect("write");
    let story = Story::new(|_| Arc::new(SshProvider::new(machines.hosts.clone())));
    for _ in 0..2 {
        story
            .engine
            .launch_guarded(&task("{}"), &story.request(), &story.agent)
            .await
            .expect("launch");
    }
    let text = std::fs::read_to_string(&table).expect("table");
    let [mine, ours] = text.lines().collect::<Vec<_>>()[..] else {
        panic!("{text}");
    };
    assert_eq!(mine, "0 0 * * * mine");
    let command = ours.strip_prefix("@reboot ").expect(ours).to_owned();
    // Everything ends, as in a reboot; the time that the node may be idle passes meanwhile.
    story.engine.stop("mycluster").await.expect("stop");
    let instance = home.join(".updraft-instance");
    let queue = Queue::open(instance.join("files/.updraft")).expect("queue");
    let over = Lease {
        idle: Some(Duration::ZERO),
        down: true,
        wait_for: WaitFor::None,
    };
    queue.set_lease(&over, 0).expect("lease");
    queue.release().expect("release");
    let mut cron = std::process::Command::new("sh")
        .args(["-c", &command])
        .env("HOME", &home)
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
        .spawn()
        .expect("sh");
    assert!(cron.wait().expect("ends").success());
    assert!(!instance.exists());
    assert_eq!(
        std::fs::read_to_string(&table).expect("table"),
        "0 0 * * * mine\n"
    );
}
