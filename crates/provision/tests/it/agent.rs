//! The agent as its own process, killed and restarted under its jobs.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use updraft_provision::agent::{
    AgentBinary, AgentClient, AgentLease, JobSpec, NodeSetup, Queue, QueueStatus,
};
use updraft_provision::providers::local::LocalTransport;
use updraft_provision::{Lease, WaitFor};

const AGENT: &str = env!("CARGO_BIN_EXE_updraft-agent");

fn start(dir: &Path) -> Child {
    let mut command = Command::new(AGENT);
    command.arg("run").arg(dir).stdin(Stdio::null());
    command.spawn().expect("the agent starts")
}

fn agent(words: &[&str]) {
    assert!(
        Command::new(AGENT)
            .args(words)
            .status()
            .expect("agent")
            .success()
    );
}

fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970");
    i64::try_from(since.as_secs()).expect("in range")
}

fn job(run: &str) -> JobSpec {
    JobSpec {
        run: Some(run.to_owned()),
        ..JobSpec::default()
    }
}

/// A thousand jobs, one after the other, while the agent is killed again and again: each runs once,
/// in order, to its end, with its whole log.
#[test]
fn a_thousand_jobs_survive_kill_nine_of_the_agent() {
    const JOBS: i64 = 1000;
    let home = tempfile::tempdir().expect("folder");
    let dir = home.path().join("agent");
    let queue = Queue::open(&dir).expect("queue");
    agent(&["set", dir.to_str().expect("utf-8"), "slots", "1"]);
    for _ in 0..JOBS {
        let run = "echo $UPDRAFT_JOB_ID >> order; echo first; echo last";
        queue.submit(&job(run), now()).expect("submit");
    }
    let mut child = start(&dir);
    let mut killed_at = 0;
    let deadline = Instant::now() + Duration::from_secs(300);
    loop {
        let jobs = queue.jobs().expect("jobs");
        let done = jobs.iter().filter(|job| job.status.is_final()).count();
        if done == jobs.len() {
            break;
        }
        assert!(Instant::now() < deadline, "{done} of {JOBS} jobs are done");
        if done >= killed_at + 150 {
            child.kill().expect("kill -9");
            child.wait().expect("reaped");
            killed_at = done;
            child = start(&dir);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().expect("kill");
    child.wait().expect("reaped");
    assert!(
        killed_at >= 600,
        "the agent was killed until job {killed_at}"
    );
    let order = std::fs::read_to_string(home.path().join("order")).expect("order");
    let order: Vec<i64> = order
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    assert_eq!(order, (1..=JOBS).collect::<Vec<_>>());
    for row in queue.jobs().expect("jobs") {
        assert_eq!(row.status, QueueStatus::Succeeded, "{row:?}");
        let log = std::fs::read_to_string(queue.log(row.id)).expect("log");
        assert_eq!(log, "first\nlast\n", "job {}", row.id);
    }
}

/// A job runs on while no agent does, and its end is found by the next one.
#[test]
fn a_job_outlives_its_agent() {
    let home = tempfile::tempdir().expect("folder");
    let dir = home.path().join("agent");
    let queue = Queue::open(&dir).expect("queue");
    let run = "echo up; until [ -e go ]; do read -t 0.05 <> <(:); done; echo done";
    queue.submit(&job(run), now()).expect("submit");
    let mut child = start(&dir);
    until(|| std::fs::read_to_string(queue.log(1)).is_ok_and(|log| log == "up\n"));
    child.kill().expect("kill -9");
    child.wait().expect("reaped");
    std::fs::write(home.path().join("go"), "").expect("go");
    until(|| std::fs::read_to_string(queue.log(1)).is_ok_and(|log| log == "up\ndone\n"));
    let mut child = start(&dir);
    until(|| queue.job(1).expect("job").expect("there").status == QueueStatus::Succeeded);
    child.kill().expect("kill");
    child.wait().expect("reaped");
}

/// Every process of a job is killed from outside: the job says so, and the next one runs.
#[test]
fn a_job_killed_from_outside_is_told_apart_from_one_that_failed() {
    let home = tempfile::tempdir().expect("folder");
    let dir = home.path().join("agent");
    let queue = Queue::open(&dir).expect("queue");
    agent(&["set", dir.to_str().expect("utf-8"), "slots", "1"]);
    queue
        .submit(&job("echo $$; sleep 600"), now())
        .expect("submit");
    queue.submit(&job("true"), now()).expect("submit");
    let mut child = start(&dir);
    until(|| std::fs::read_to_string(queue.log(1)).is_ok_and(|log| log.ends_with('\n')));
    let group = std::fs::read_to_string(queue.log(1)).expect("log");
    let kill = Command::new("bash")
        .args(["-c", &format!("kill -9 -{}", group.trim())])
        .status();
    assert!(kill.expect("kill").success());
    until(|| queue.job(2).expect("job").expect("there").status.is_final());
    let statuses: Vec<_> = queue
        .jobs()
        .expect("jobs")
        .iter()
        .map(|job| job.status)
        .collect();
    assert_eq!(
        statuses,
        [QueueStatus::FailedDriver, QueueStatus::Succeeded]
    );
    child.kill().expect("kill");
    child.wait().expect("reaped");
}

/// Idle for as long as it may be, the node runs its own end, and the agent with it.
#[test]
fn an_idle_node_ends_itself() {
    let home = tempfile::tempdir().expect("folder");
    let dir = home.path().join("agent");
    let queue = Queue::open(&dir).expect("queue");
    let ended = home.path().join("ended");
    let script = format!("echo over > {}", ended.display());
    agent(&["set", dir.to_str().expect("utf-8"), "end_down", &script]);
    let lease = Lease {
        idle: Some(Duration::from_secs(1)),
        down: true,
    };
    queue.submit(&job("true"), now()).expect("submit");
    queue
        .set_lease(&AgentLease::new(lease, WaitFor::Jobs), now())
        .expect("lease");
    let mut child = start(&dir);
    assert!(child.wait().expect("ends").success());
    assert_eq!(std::fs::read_to_string(ended).expect("ended"), "over\n");
    assert_eq!(
        queue.job(1).expect("job").expect("there").status,
        QueueStatus::Succeeded
    );
}

/// The client's verbs over a transport: submit, follow, queue, cancel.
#[tokio::test]
async fn the_client_speaks_to_the_agent_over_a_transport() {
    let home = tempfile::tempdir().expect("folder");
    let transport = Arc::new(LocalTransport::new(home.path()));
    let binary = AgentBinary::new(AGENT, "").expect("binary");
    let client = AgentClient::installed(transport, &binary)
        .await
        .expect("installed");
    let setup = NodeSetup {
        slots: Some(1),
        ..NodeSetup::of(None, 0)
    };
    client.start(&setup).await.expect("start");
    let mut spec = job("for i in 1 2 3; do echo $WORD $i; done");
    spec.environment.insert("WORD".into(), "it's".into());
    let first = client.submit(&spec).await.expect("submit");
    let second = client.submit(&job("sleep 600")).await.expect("submit");
    let mut logs = client.logs(Some(first), true).await.expect("logs");
    let mut lines = Vec::new();
    while let Some(line) = logs.next_line().await.expect("line") {
        lines.push(line);
    }
    assert_eq!(lines, ["it's 1", "it's 2", "it's 3"]);
    client.cancel(Some(second)).await.expect("cancel");
    let deadline = Instant::now() + Duration::from_secs(30);
    let jobs = loop {
        let jobs = client.queue().await.expect("queue");
        if jobs.iter().all(|job| job.status.is_final()) || Instant::now() > deadline {
            break jobs;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let statuses: Vec<_> = jobs.iter().map(|job| job.status).collect();
    assert_eq!(statuses, [QueueStatus::Succeeded, QueueStatus::Cancelled]);
    assert!(
        client
            .logs(Some(99), false)
            .await
            .expect("starts")
            .next_line()
            .await
            .is_err()
    );
    let ends = AgentLease {
        idle_seconds: Some(0),
        down: false,
        wait_for: WaitFor::None,
    };
    client.set_lease(&ends).await.expect("the agent goes");
}

/// Waits for something another process does.
fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "it did not happen in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}
