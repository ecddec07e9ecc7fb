//! The articles' story on several machines over ssh, each with an address, a home and processes of its
//! own: ranks, queue, logs, a reboot, autostop, down, and a service whose machine dies under load.

use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::time::{Duration, Instant};

use updraft_provision::agent::{AgentBinary, JobRow, QueueStatus};
use updraft_provision::providers::ssh::SshProvider;
use updraft_provision::{
    Engine, EnvOverrides, ExecOptions, FailoverPolicy, JobId, LaunchRequest, Lease, State, Task,
    WaitFor,
};

use crate::lab::{Lab, run_inside};

#[test]
fn stories_on_machines_of_their_own() {
    run_inside("machines::inside::");
}

/// A client of a lab.
struct Client {
    engine: Engine,
    agent: AgentBinary,
    options: ExecOptions,
    _dir: tempfile::TempDir,
}

impl Client {
    fn of(lab: &Lab) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let state = Arc::new(State::open(dir.path().join("state")).expect("state"));
        let project = dir.path().join("project");
        std::fs::create_dir_all(project.join("cache")).expect("project");
        for (name, text) in [
            ("words", "hello"),
            (".gitignore", "cache/\n"),
            ("cache/big", "x"),
        ] {
            std::fs::write(project.join(name), text).expect("write");
        }
        let provider = Arc::new(SshProvider::new(lab.hosts.clone()));
        Self {
            engine: Engine::new(state, vec![provider]),
            agent: AgentBinary::new(env!("CARGO_BIN_EXE_updraft-agent"), "").expect("agent"),
            options: ExecOptions {
                setup: true,
                base: project,
            },
            _dir: dir,
        }
    }

    async fn launch(&self, yaml: &str, lease: Lease) {
        let request = LaunchRequest {
            later: Vec::new(),
            cluster: "c".into(),
            lease: Some(lease),
            policy: FailoverPolicy::default(),
        };
        self.engine
            .launch_guarded(&task(yaml), &request, &self.agent)
            .await
            .expect("launch");
    }

    async fn exec(&self, yaml: &str) -> JobId {
        let task = task(yaml);
        let job = self.engine.exec("c", &task, &self.agent, &self.options);
        job.await.expect("exec")
    }

    async fn wait(&self, job: JobId) -> JobRow {
        self.engine.wait("c", &self.agent, job).await.expect("wait")
    }

    /// The whole log of a job, in an order that does not depend on who was faster.
    async fn log(&self, job: JobId) -> Vec<String> {
        let logs = self.engine.logs("c", &self.agent, Some(job), true).await;
        let mut logs = logs.expect("logs");
        let mut lines = Vec::new();
        while let Some(line) = logs.next_line().await.expect("line") {
            lines.push(line);
        }
        lines.sort();
        lines
    }
}

fn task(yaml: &str) -> Task {
    Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml)
}

/// How many machines of the lab hold something of ours.
fn taken(lab: &Lab, count: u8) -> usize {
    let is_taken = |number: &u8| lab.home(*number).join(".updraft-instance").exists();
    (0..count).filter(is_taken).count()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not in a minute");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Each rank tells the first one its number; the first says who has called.
const ROLL_CALL: &str = r#"
num_nodes: 3
workdir: .
setup: cat words > heard
run: |
  test -e words && ! test -e cache && cat heard && echo
  me=$(sed -n $((SKYPILOT_NODE_RANK + 1))p <<<"$SKYPILOT_NODE_IPS")
  ip -4 addr | grep -q "inet $me/" || exit 9
  if [ $SKYPILOT_NODE_RANK = 0 ]; then
    perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 5555, Listen => 9, ReuseAddr => 1) or die $!;
      for (1, 2) { $c = $s->accept; chomp($w = <$c>); push @all, $w } print "called: @{[sort @all]}\n"'
  else
    first=$(head -1 <<<"$SKYPILOT_NODE_IPS")
    until echo $SKYPILOT_NODE_RANK > /dev/tcp/$first/5555; do sleep 0.05; done 2>/dev/null
  fi
"#;

mod inside {
    use super::*;

    #[tokio::test]
    #[ignore = "runs in namespaces that `stories_on_machines_of_their_own` makes"]
    async fn three_nodes_work_together_and_end_themselves() {
        let Some(mut lab) = Lab::new(3) else { return };
        let client = Client::of(&lab);
        client.launch("num_nodes: 3\n", Lease::default()).await;
        assert_eq!(taken(&lab, 3), 3);
        let job = client.exec(ROLL_CALL).await;
        assert_eq!(client.wait(job).await.status, QueueStatus::Succeeded);
        assert_eq!(
            client.log(job).await,
            [
                "(rank 0, 10.77.0.10) called: 1 2",
                "(rank 0, 10.77.0.10) hello",
                "(rank 1, 10.77.0.11) hello",
                "(rank 2, 10.77.0.12) hello",
            ]
        );

        // A job of one node does not shift the numbers of those on all.
        let alone = client
            .exec("run: echo alone on $SKYPILOT_NUM_NODES\n")
            .await;
        assert_eq!(client.log(alone).await, ["alone on 1"]);
        let all =
            "num_nodes: 3\nrun: |\n  [ $SKYPILOT_NODE_RANK = 1 ] && exit 7\n  exec sleep 600\n";
        // The others, which wait for the one that failed, are cancelled: followed or waited for.
        let broken = client.exec(all).await;
        assert_eq!(client.log(broken).await, Vec::<String>::new());
        let row = client.wait(broken).await;
        assert_eq!((row.status, row.exit_code), (QueueStatus::Failed, Some(7)));
        let forever = client.exec("num_nodes: 3\nrun: exec sleep 600\n").await;
        let queue = client
            .engine
            .queue("c", &client.agent)
            .await
            .expect("queue");
        assert_eq!(
            queue.iter().map(|job| job.id).collect::<Vec<_>>(),
            [1, 2, 3, 4]
        );
        let cancelled = client
            .engine
            .cancel("c", &client.agent, Some(forever))
            .await;
        assert_eq!(cancelled.expect("cancel"), 1);
        assert_eq!(client.wait(forever).await.status, QueueStatus::Cancelled);

        // A machine goes down under a job and comes back: the job is lost, the next one runs.
        let struck = client
            .exec("num_nodes: 3\nrun: echo up; exec sleep 600\n")
            .await;
        let up = || {
            (0..3).all(|number| {
                let jobs = lab
                    .home(number)
                    .join(".updraft-instance/files/.updraft/jobs");
                let logs = std::fs::read_dir(jobs).into_iter().flatten().flatten();
                let newest = logs
                    .max_by_key(|entry| entry.file_name().to_string_lossy().parse::<i64>().ok());
                newest.is_some_and(|job| {
                    std::fs::read(job.path().join("run.log")).unwrap_or_default() == b"up\n"
                })
            })
        };
        until("the job on all machines", up).await;
        lab.reboot(2);
        assert_eq!(client.wait(struck).await.status, QueueStatus::FailedDriver);
        let again = client.exec("num_nodes: 3\nrun: echo back\n").await;
        assert_eq!(client.wait(again).await.status, QueueStatus::Succeeded);
        assert_eq!(client.log(again).await.len(), 3);

        // Idle, each ends itself; the client finds nothing and keeps nothing.
        let lease = Lease {
            idle: Some(Duration::from_secs(1)),
            down: true,
            wait_for: WaitFor::Jobs,
        };
        client
            .engine
            .autostop("c", &client.agent, lease)
            .await
            .expect("autostop");
        until("all machines given back", || taken(&lab, 3) == 0).await;
        assert_eq!(client.engine.gc().await.expect("gc"), []);
        assert!(client.engine.state().clusters().expect("rows").is_empty());
        assert!(client.engine.state().open_nodes().expect("rows").is_empty());
    }

    #[tokio::test]
    #[ignore = "runs in namespaces that `stories_on_machines_of_their_own` makes"]
    async fn somebody_at_a_terminal_keeps_a_node_from_ending() {
        let Some(lab) = Lab::new(1) else { return };
        let client = Client::of(&lab);
        let mut session = lab.log_in(0);
        let mut said = String::new();
        let stdout = session.stdout.take().expect("output");
        BufReader::new(stdout).read_line(&mut said).expect("line");
        assert_eq!(said.trim(), "welcome");
        let lease = Lease {
            idle: Some(Duration::from_secs(1)),
            down: true,
            wait_for: WaitFor::JobsAndSsh,
        };
        client.launch("{}", lease).await;
        // Long enough for the node to have ended several times over.
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(taken(&lab, 1), 1, "a node ended under somebody");
        session.kill().expect("log out");
        session.wait().expect("reaped");
        until("the node given back", || taken(&lab, 1) == 0).await;
    }

    #[tokio::test]
    #[ignore = "runs in namespaces that `stories_on_machines_of_their_own` makes"]
    async fn down_ends_what_runs_on_every_machine() {
        let Some(lab) = Lab::new(2) else { return };
        let client = Client::of(&lab);
        client.launch("num_nodes: 2\n", Lease::default()).await;
        client
            .exec("num_nodes: 2\nrun: (sleep 600 &) ; exec sleep 600\n")
            .await;
        client.engine.down("c").await.expect("down");
        assert_eq!(taken(&lab, 2), 0);
        let left = || {
            let list = std::process::Command::new("pgrep")
                .args(["-x", "sleep"])
                .output();
            String::from_utf8_lossy(&list.expect("pgrep").stdout)
                .lines()
                .count()
        };
        until("an end of all jobs", || left() == 0).await;
        assert!(client.engine.state().open_nodes().expect("rows").is_empty());
    }
}
