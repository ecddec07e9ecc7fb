use std::sync::Arc;

use super::*;
use crate::transport::{HostTransport, LogStream, ShellCommand};
use crate::{EnvOverrides, Job, JobStatus, LaunchOptions, Lease, Phase, Task, launch};

fn provider() -> (LocalProvider, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("temporary folder");
    (LocalProvider::new(dir.path()).expect("absolute"), dir)
}

mod as_provider {
    crate::provider_conformance_tests!(super::provider());
}

mod behind_retry {
    use crate::{Backoff, Retry};
    crate::provider_conformance_tests!({
        let (provider, guard) = super::provider();
        (Retry::new(provider, Backoff::default()), guard)
    });
}

mod as_transport {
    use crate::providers::local::LocalTransport;
    crate::transport_conformance_tests!({
        let dir = tempfile::tempdir().expect("temporary folder");
        (LocalTransport::new(dir.path()), dir)
    });
}

async fn exec(provider: &LocalProvider, yaml: &str) -> Job {
    let task = Task::from_yaml(yaml, &EnvOverrides::new()).expect("task");
    let options = LaunchOptions {
        cluster: "c".into(),
        lease: Lease::default(),
    };
    let cluster = launch(Arc::new(provider.clone()), &task, &options)
        .await
        .expect("launch");
    cluster.exec(&task).await.expect("exec")
}

async fn lines(job: &mut Job) -> Vec<String> {
    let mut lines = Vec::new();
    while let Some(line) = job.next_line().await.expect("line") {
        lines.push(line.text);
    }
    lines
}

#[tokio::test]
async fn setup_runs_before_run_with_the_tasks_environment() {
    let (provider, _guard) = provider();
    let yaml = "envs: {WHO: you}\nsetup: echo setup $WHO\nrun: |\n  echo run $WHO $SKYPILOT_NODE_RANK\n  echo bad >&2\n";
    let mut job = exec(&provider, yaml).await;
    let mut got = lines(&mut job).await;
    got[1..].sort(); // the two streams of one process have no order between them
    assert_eq!(got, ["setup you", "bad", "run you 0"]);
    assert_eq!(job.status(), Some(JobStatus::Succeeded));
}

#[tokio::test]
async fn a_failed_setup_never_runs_run() {
    let (provider, _guard) = provider();
    let mut job = exec(&provider, "setup: exit 3\nrun: echo never\n").await;
    assert_eq!(lines(&mut job).await, Vec::<String>::new());
    assert_eq!(
        job.status(),
        Some(JobStatus::Failed(Phase::Setup, crate::ExitStatus::Code(3)))
    );
}

#[tokio::test]
async fn a_cancelled_job_is_gone() {
    let (provider, _guard) = provider();
    let mut job = exec(&provider, "run: echo up; sleep 600\n").await;
    assert_eq!(job.next_line().await.expect("line").expect("up").text, "up");
    job.cancel(Duration::from_secs(5)).await.expect("cancel");
    assert_eq!(job.status(), Some(JobStatus::Cancelled));
}

#[tokio::test]
async fn another_client_finds_and_ends_what_was_started() {
    let (provider, guard) = provider();
    let mut job = exec(&provider, "run: echo up; sleep 600\n").await;
    assert_eq!(job.next_line().await.expect("line").expect("up").text, "up");
    // As after a crash: the first client's handles are unused, another reads the folder.
    let other = LocalProvider::new(guard.path()).expect("absolute");
    let owned = other.list_owned(None).await.expect("list");
    other.terminate(&owned[0].id).await.expect("terminate");
    assert!(matches!(
        job.wait().await.expect("ended"),
        JobStatus::Failed(Phase::Run, _)
    ));
    assert!(other.list_owned(None).await.expect("list").is_empty());
}

#[tokio::test]
async fn files_and_folders_of_others_are_no_instances() {
    let (provider, guard) = provider();
    std::fs::write(guard.path().join("a.lock"), "").expect("file");
    std::fs::create_dir(guard.path().join("folder")).expect("folder");
    assert!(provider.list_owned(None).await.expect("list").is_empty());
}

#[tokio::test]
async fn a_reused_pid_is_not_ended() {
    let (_provider, guard) = provider();
    std::fs::create_dir(guard.path().join("other")).expect("folder");
    let transport = LocalTransport::new(guard.path().join("other"));
    let command = ShellCommand {
        script: "echo up; read".into(),
        ..ShellCommand::default()
    };
    let command = ShellCommand {
        script: format!("{}; sleep 600", command.script),
        ..command
    };
    let mut process = transport.start(&command).await.expect("start");
    let up = process.lines.recv().await.expect("up");
    assert_eq!((up.stream, up.text.as_str()), (LogStream::Stdout, "up"));
    // A record of ours with this pid, and a start time that is not this process's.
    let entry = std::fs::read_dir(guard.path().join("other/groups"))
        .expect("groups")
        .next();
    let name = entry.expect("one group").expect("entry").file_name();
    let mine = guard.path().join("mine");
    std::fs::create_dir_all(mine.join("groups")).expect("folder");
    std::fs::write(mine.join("groups").join(name), "1").expect("record");
    groups::end_all(&mine, Duration::ZERO).await.expect("end");
    process.lines.close();
    let ended = tokio::time::timeout(Duration::from_millis(200), process.control.wait()).await;
    assert!(ended.is_err(), "the process of somebody else was ended");
    process.control.end(Duration::ZERO).await.expect("clean up");
}

#[tokio::test]
async fn a_command_for_an_instance_that_is_gone_leaves_nothing() {
    let guard = tempfile::tempdir().expect("folder");
    let dir = guard.path().join("gone");
    let transport = LocalTransport::new(&dir);
    assert!(transport.start(&ShellCommand::default()).await.is_err());
    let put = transport.put(std::path::Path::new("/proc/version"), "x".as_ref());
    assert!(put.await.is_err());
    assert!(!dir.exists());
}

#[tokio::test]
async fn a_tasks_files_are_there_before_its_setup() {
    let (provider, guard) = provider();
    let work = guard.path().join("work");
    std::fs::create_dir(&work).expect("folder");
    std::fs::write(work.join("words"), "of the workdir\n").expect("file");
    let yaml = format!(
        "workdir: {work}\nfile_mounts: {{~/in/words: {work}/words}}\nsetup: cat words\nrun: cat ../in/words\n",
        work = work.display()
    );
    let mut job = exec(&provider, &yaml).await;
    let got = lines(&mut job).await;
    assert_eq!(got, ["of the workdir", "of the workdir"]);
    assert_eq!(job.status(), Some(JobStatus::Succeeded));
}

#[tokio::test]
async fn a_lease_that_nobody_would_keep_is_refused() {
    let (provider, _guard) = provider();
    let options = LaunchOptions {
        cluster: "c".into(),
        lease: Lease {
            idle: Some(Duration::from_secs(60)),
            down: true,
            wait_for: crate::WaitFor::None,
        },
    };
    let task = Task::from_yaml("{}", &EnvOverrides::new()).expect("task");
    let launched = launch(Arc::new(provider.clone()), &task, &options).await;
    let error = launched.expect_err("this machine ends nothing by itself");
    assert!(matches!(error, crate::Error::InvalidTask { .. }), "{error}");
    assert_eq!(provider.list_owned(None).await.expect("list"), []);
    // A provider that can is told.
    let folder = tempfile::tempdir().expect("folder");
    let world = Arc::new(crate::Fake::new().with_dir(folder.path()));
    launch(world.clone(), &task, &options)
        .await
        .expect("launch");
    assert_eq!(world.list_owned(None).await.expect("list").len(), 1);
    world.pass(std::time::SystemTime::now() + Duration::from_secs(3600));
    assert_eq!(world.list_owned(None).await.expect("list"), []);
}
