//! The agent as its own process, killed and restarted under its jobs.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use updraft_provision::agent::{AgentBinary, AgentClient, JobSpec, NodeSetup, Queue, QueueStatus};
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

/// What strikes a node.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// The agent alone is killed.
    Agent,
    /// The agent and every process of the node are.
    Processes,
    /// So are they, and the machine comes up with another boot id.
    Reboot,
}

/// A node that is struck, by a random number of its own.
struct Struck {
    home: tempfile::TempDir,
    agent: Child,
    boots: u32,
    random: u64,
}

impl Struck {
    fn new(home: tempfile::TempDir) -> Self {
        Self {
            agent: Self::spawn(home.path(), 0),
            home,
            boots: 0,
            random: 0x2545_f491_4f6c_dd1d,
        }
    }

    fn spawn(home: &Path, boots: u32) -> Child {
        let mut command = Command::new(AGENT);
        command.arg("run").arg(home.join("agent"));
        command.env("UPDRAFT_BOOT_ID", format!("boot-{boots}"));
        command.env("HOME", home); // each job sets up its user's shell, whatever that costs
        command.env("UPDRAFT_TEST_NODE", home); // what its processes are found by
        command
            .stdin(Stdio::null())
            .spawn()
            .expect("the agent starts")
    }

    fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn strike(&mut self) -> Blow {
        let blow = [Blow::Agent, Blow::Processes, Blow::Reboot][self.next(3) as usize];
        self.agent.kill().expect("kill -9");
        self.agent.wait().expect("reaped");
        if !matches!(blow, Blow::Agent) {
            while self.kill_all() > 0 {}
        }
        self.boots += u32::from(matches!(blow, Blow::Reboot));
        self.agent = Self::spawn(self.home.path(), self.boots);
        blow
    }

    /// Kills what carries the node's mark; says how much of it there was.
    fn kill_all(&self) -> usize {
        let mark = format!("UPDRAFT_TEST_NODE={}", self.home.path().display());
        let mut killed = 0;
        for process in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let environment = std::fs::read(process.path().join("environ")).unwrap_or_default();
            if environment
                .split(|byte| *byte == 0)
                .any(|word| word == mark.as_bytes())
            {
                let pid = process.file_name().to_string_lossy().into_owned();
                let kill = Command::new("kill")
                    .args(["-9", &pid])
                    .stderr(Stdio::null())
                    .status();
                let _ = kill.expect("kill"); // it may have ended by itself
                killed += 1;
            }
        }
        killed
    }
}

impl Drop for Struck {
    fn drop(&mut self) {
        let _ = self.agent.kill(); // it may have ended
        let _ = self.agent.wait();
    }
}

/// A thousand jobs, one after the other, while the agent is killed, every process is, and the machine
/// comes up anew, at random: each job ends in one final status; what succeeded has run once, in order,
/// with its whole log; and no blow costs more than the job that ran.
#[test]
fn a_thousand_jobs_survive_kills_and_reboots() {
    const JOBS: i64 = 1000;
    let home = tempfile::tempdir().expect("folder");
    let dir = home.path().join("agent");
    let queue = Queue::open(&dir).expect("queue");
    agent(&["set", dir.to_str().expect("utf-8"), "slots", "1"]);
    for _ in 0..JOBS {
        let run = "echo $UPDRAFT_JOB_ID >> order; echo first; echo last";
        queue.submit(&job(run), now()).expect("submit");
    }
    let mut node = Struck::new(home);
    let mut next_blow = 20;
    let (mut agents, mut nodes) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(300);
    loop {
        let jobs = queue.jobs().expect("jobs");
        let done = jobs.iter().filter(|job| job.status.is_final()).count();
        if done == jobs.len() {
            break;
        }
        assert!(Instant::now() < deadline, "{done} of {JOBS} jobs are done");
        if done >= next_blow {
            match node.strike() {
                Blow::Agent => agents += 1,
                Blow::Processes | Blow::Reboot => nodes += 1,
            }
            next_blow = done + 20 + node.next(60) as usize;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(
        agents >= 3 && nodes >= 5 && node.boots >= 2,
        "{agents}, {nodes}, {}",
        node.boots
    );
    let order = std::fs::read_to_string(node.home.path().join("order")).expect("order");
    let order: Vec<i64> = order
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    assert!(
        order.is_sorted_by(|a, b| a < b),
        "each at most once, in order"
    );
    let mut lost = 0;
    for row in queue.jobs().expect("jobs") {
        match row.status {
            QueueStatus::Succeeded => {
                assert!(order.contains(&row.id), "job {} never ran", row.id);
                let log = std::fs::read_to_string(queue.log(row.id)).expect("log");
                assert_eq!(log, "first\nlast\n", "job {}", row.id);
            }
            QueueStatus::FailedDriver => lost += 1,
            other => panic!("job {} ended {other:?}", row.id),
        }
    }
    assert!(lost <= nodes, "{lost} jobs lost by {nodes} blows");
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
        wait_for: WaitFor::Jobs,
    };
    queue.submit(&job("true"), now()).expect("submit");
    queue.set_lease(&lease, now()).expect("lease");
    let mut child = start(&dir);
    assert!(child.wait().expect("ends").success());
    assert_eq!(std::fs::read_to_string(ended).expect("ended"), "over\n");
    assert_eq!(
        queue.job(1).expect("job").expect("there").status,
        QueueStatus::Succeeded
    );
}

/// What cannot be started fails, what fails to end is ended again; neither ends the agent.
#[test]
fn whatever_goes_wrong_the_agent_goes_on() {
    let home = tempfile::tempdir().expect("folder");
    let dir = home.path().join("agent");
    let queue = Queue::open(&dir).expect("queue");
    for _ in 0..2 {
        queue.submit(&job("true"), now()).expect("submit");
    }
    // In the way of the first job's log.
    std::fs::remove_file(queue.log(1)).expect("its log");
    std::fs::create_dir(queue.log(1)).expect("a folder");
    let script =
        "cd \"$0\"; [ -e once ] || { touch once; echo no >&2; exit 1; }; echo over > ended";
    let script = script.replace("$0", &home.path().display().to_string());
    agent(&["set", dir.to_str().expect("utf-8"), "end_down", &script]);
    let lease = Lease {
        idle: Some(Duration::ZERO),
        down: true,
        wait_for: WaitFor::Jobs,
    };
    queue.set_lease(&lease, now()).expect("lease");
    let mut child = Command::new(AGENT)
        .arg("run")
        .arg(&dir)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the agent starts");
    assert!(child.wait().expect("ends").success());
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
    let ended = std::fs::read_to_string(home.path().join("ended"));
    assert_eq!(ended.expect("ended"), "over\n");
    let mut said = String::new();
    let mut stderr = child.stderr.take().expect("stderr");
    std::io::Read::read_to_string(&mut stderr, &mut said).expect("said");
    assert!(
        said.contains("its own end failed") && said.contains(": no; trying again"),
        "{said}"
    );
}

/// A node whose folder is gone has no use for an agent.
#[test]
fn an_agent_goes_with_its_folder() {
    let home = tempfile::tempdir().expect("folder");
    let dir = home.path().join("agent");
    let queue = Queue::open(&dir).expect("queue");
    queue.submit(&job("true"), now()).expect("submit");
    let mut child = start(&dir);
    until(|| queue.job(1).expect("job").expect("there").status.is_final());
    // The agent may be writing in this moment.
    while home.path().exists() {
        let _ = std::fs::remove_dir_all(home.path());
    }
    assert!(!child.wait().expect("ends").success());
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
    let ends = Lease {
        idle: Some(Duration::ZERO),
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
