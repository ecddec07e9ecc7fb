use super::super::queue::{JobRow, JobSpec};
use super::*;

fn node() -> (tempfile::TempDir, Queue) {
    let dir = tempfile::tempdir().expect("folder");
    let queue = Queue::open(dir.path().join("agent")).expect("queue");
    (dir, queue)
}

fn job(run: &str) -> JobSpec {
    JobSpec {
        run: Some(run.to_owned()),
        ..JobSpec::default()
    }
}

fn agent(queue: &Queue) -> Agent {
    Agent::take(queue.dir()).expect("take").expect("free")
}

/// Looks until every job has ended.
fn drain(agent: &mut Agent) -> Vec<JobRow> {
    loop {
        agent.look().expect("look");
        let jobs = agent.queue.jobs().expect("jobs");
        if jobs.iter().all(|job| job.status.is_final()) {
            return jobs;
        }
        if let Ok(id) = agent.ended.1.recv_timeout(TICK) {
            agent.spawned.remove(&id);
        }
    }
}

#[test]
fn jobs_end_with_the_status_they_earned() {
    let (_dir, queue) = node();
    let with_setup = |setup: &str| JobSpec {
        setup: Some(setup.to_owned()),
        ..job("echo ran")
    };
    for spec in [
        job("exit 0"),
        job("exit 3"),
        with_setup("exit 4"),
        with_setup("export A=b"),
    ] {
        queue.submit(&spec, now()).expect("submit");
    }
    let got: Vec<_> = drain(&mut agent(&queue))
        .iter()
        .map(|job| (job.status, job.exit_code))
        .collect();
    assert_eq!(
        got,
        [
            (QueueStatus::Succeeded, Some(0)),
            (QueueStatus::Failed, Some(3)),
            (QueueStatus::FailedSetup, Some(4)),
            (QueueStatus::Succeeded, Some(0)),
        ]
    );
    let log = std::fs::read_to_string(queue.log(3)).expect("log");
    assert_eq!(log, "", "run must not follow a failed setup");
}

#[test]
fn a_job_of_an_earlier_boot_is_lost_and_the_next_one_runs() {
    let (_dir, queue) = node();
    for _ in 0..2 {
        queue.submit(&job("true"), now()).expect("submit");
    }
    queue
        .claim(1, "an earlier boot", now())
        .expect("claim")
        .expect("pending");
    let jobs = drain(&mut agent(&queue));
    assert_eq!(jobs[0].status, QueueStatus::FailedDriver);
    assert_eq!(jobs[1].status, QueueStatus::Succeeded);
}

#[test]
fn a_claimed_job_whose_wrapper_never_came_runs_once() {
    let (dir, queue) = node();
    queue
        .submit(&job("echo once >> count"), now())
        .expect("submit");
    queue
        .claim(1, &boot_id(), now())
        .expect("claim")
        .expect("pending");
    let jobs = drain(&mut agent(&queue));
    assert_eq!(jobs[0].status, QueueStatus::Succeeded);
    // The wrapper of the first attempt, late: the claim is taken, it must not run the job.
    let folder = queue.job_dir(1);
    let late = Command::new("bash")
        .args(["-c", wrapper::SCRIPT, "late"])
        .arg(&folder)
        .arg("1")
        .current_dir(dir.path())
        .status();
    assert!(late.expect("bash").success());
    let count = std::fs::read_to_string(dir.path().join("count")).expect("ran");
    assert_eq!(count, "once\n");
}

#[test]
fn accelerators_are_counted_and_order_is_kept() {
    let (dir, queue) = node();
    queue.set("gpus", "2").expect("set");
    for gpus in [1, 2, 1] {
        let spec = JobSpec {
            gpus,
            ..job(&format!(
                "echo {gpus} >> order; test $(ls busy 2>/dev/null | wc -l) -lt 2"
            ))
        };
        queue.submit(&spec, now()).expect("submit");
    }
    let too_many = JobSpec {
        gpus: 3,
        ..job("echo never >> order")
    };
    queue.submit(&too_many, now()).expect("submit");
    let mut agent = agent(&queue);
    agent.look().expect("look");
    // The second does not fit beside the first, and the third may not overtake it.
    let statuses: Vec<_> = queue
        .jobs()
        .expect("jobs")
        .iter()
        .map(|job| job.status)
        .collect();
    assert_eq!(statuses[1..3], [QueueStatus::Pending, QueueStatus::Pending]);
    let jobs = drain(&mut agent);
    assert_eq!(jobs[3].status, QueueStatus::FailedSetup);
    let order = std::fs::read_to_string(dir.path().join("order")).expect("order");
    assert_eq!(order, "1\n2\n1\n");
}

#[test]
fn variables_are_exact_private_and_gone_with_the_job() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, queue) = node();
    let mut spec = job("printf '%s' \"$WORD\"; echo \" $UPDRAFT_JOB_ID $SKYPILOT_TASK_ID\"");
    spec.environment
        .insert("WORD".into(), "a 'b' $c\n\"d\" \\".into());
    spec.environment
        .insert("UPDRAFT_CLUSTER".into(), "c".into());
    queue.submit(&spec, now()).expect("submit");
    let env = queue.job_dir(1).join("env");
    let mode = std::fs::metadata(&env).expect("env").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(
        !format!("{spec:?}").contains("'b'"),
        "debug must not show values"
    );
    drain(&mut agent(&queue));
    let log = std::fs::read_to_string(queue.log(1)).expect("log");
    assert_eq!(log, "a 'b' $c\n\"d\" \\ 1 updraft_c_1\n");
    assert!(!env.exists());
}

#[test]
fn cancelled_jobs_end_waiting_or_running() {
    let (_dir, queue) = node();
    queue.set("slots", "1").expect("set");
    queue
        .submit(&job("echo up; sleep 600"), now())
        .expect("submit");
    queue.submit(&job("echo never"), now()).expect("submit");
    let mut agent = agent(&queue);
    agent.look().expect("look");
    while std::fs::read_to_string(queue.log(1))
        .expect("log")
        .is_empty()
    {
        std::thread::yield_now();
    }
    assert_eq!(queue.cancel(None, now()).expect("cancel"), 2);
    let jobs = drain(&mut agent);
    assert_eq!(jobs[0].status, QueueStatus::Cancelled);
    assert_eq!(jobs[1].status, QueueStatus::Cancelled);
}

#[test]
fn one_agent_per_node() {
    let (_dir, queue) = node();
    let _first = agent(&queue);
    assert!(Agent::take(queue.dir()).expect("take").is_none());
}

#[test]
fn idleness_survives_a_restart() {
    let (_dir, queue) = node();
    let lease = crate::Lease {
        idle: Some(Duration::from_secs(600)),
        down: true,
        wait_for: crate::WaitFor::Jobs,
    };
    queue.set_lease(&lease, now() - 599).expect("lease");
    assert!(!agent(&queue).is_over().expect("judged"));
    queue.touch(now() - 600).expect("a second later");
    // Another agent, as after `kill -9`: it counts from the record, not from its own start.
    assert!(agent(&queue).is_over().expect("judged"));
    queue.submit(&job("true"), now()).expect("submit");
    assert!(
        !agent(&queue)
            .is_over()
            .expect("a waiting job keeps the node")
    );
}

#[test]
fn a_client_that_brings_files_keeps_the_node() {
    let (_dir, queue) = node();
    for wait_for in [crate::WaitFor::Jobs, crate::WaitFor::None] {
        let lease = crate::Lease {
            idle: Some(Duration::ZERO),
            down: true,
            wait_for,
        };
        queue.set_lease(&lease, now()).expect("lease");
        queue.hold(now() + 600).expect("hold");
        assert!(!agent(&queue).is_over().expect("judged"), "{wait_for:?}");
        queue.hold(now() - 1).expect("a shorter one");
        assert!(!agent(&queue).is_over().expect("judged"), "{wait_for:?}");
        // The client has died: nobody renews it.
        queue.release().expect("release");
        assert!(agent(&queue).is_over().expect("judged"), "{wait_for:?}");
    }
}

#[test]
fn a_cancelled_job_has_time_to_end_by_itself() {
    let (_dir, queue) = node();
    let run = "trap 'sleep 1; echo saved; exit 0' TERM; echo up; while :; do sleep 0.05; done";
    queue.submit(&job(run), now()).expect("submit");
    let mut agent = agent(&queue);
    agent.look().expect("look");
    while std::fs::read_to_string(queue.log(1)).expect("log") != "up\n" {
        std::thread::yield_now();
    }
    queue.cancel(Some(1), now()).expect("cancel");
    let jobs = drain(&mut agent);
    assert_eq!(jobs[0].status, QueueStatus::Cancelled);
    let log = std::fs::read_to_string(queue.log(1)).expect("log");
    assert!(log.starts_with("up\n") && log.ends_with("saved\n"), "{log}");
}

#[test]
fn jobs_that_run_together_have_accelerators_of_their_own() {
    let (dir, queue) = node();
    queue.set("gpus", "4").expect("set");
    for (number, gpus) in [(1, 1), (2, 2), (3, 1), (4, 0)] {
        let run = format!(
            "echo ${{CUDA_VISIBLE_DEVICES-none}}; until [ -e ~/go{number} ]; do read -t 0.02 <> <(:); done"
        );
        let spec = JobSpec { gpus, ..job(&run) };
        queue.submit(&spec, now()).expect("submit");
    }
    let mut agent = agent(&queue);
    agent.look().expect("look");
    let said = |id: i64| loop {
        let log = std::fs::read_to_string(queue.log(id)).expect("log");
        if !log.is_empty() {
            return log.trim().to_owned();
        }
        std::thread::yield_now();
    };
    assert_eq!([1, 2, 3, 4].map(said), ["0", "1,2", "3", "none"]);
    // What one gives back is the next one's.
    std::fs::write(dir.path().join("go2"), "").expect("go");
    let spec = JobSpec {
        gpus: 2,
        ..job("echo $CUDA_VISIBLE_DEVICES")
    };
    queue.submit(&spec, now()).expect("submit");
    for number in [1, 3, 4] {
        std::fs::write(dir.path().join(format!("go{number}")), "").expect("go");
    }
    while !queue.job(5).expect("job").expect("there").status.is_final() {
        agent.look().expect("look");
    }
    assert_ne!(said(5), "", "it has two");
    drain(&mut agent);
}

#[test]
fn a_jobs_home_is_its_nodes_and_no_variable_is_in_the_way() {
    let (dir, queue) = node();
    std::fs::write(dir.path().join(".bashrc"), "FROM_RC=rc\necho noise\n").expect("write");
    std::fs::write(dir.path().join("mounted"), "file\n").expect("write");
    let mut spec =
        job("pwd; cat ~/mounted; echo $FROM_RC $d $1; echo $code $stat $base $PYTHONUNBUFFERED");
    spec.setup = Some("echo set up in $PWD > ~/setup".into());
    spec.workdir = Some("sky_workdir".into());
    for name in ["d", "code", "stat", "base"] {
        spec.environment.insert(name.into(), format!("my-{name}"));
    }
    queue.submit(&spec, now()).expect("submit");
    let jobs = drain(&mut agent(&queue));
    assert_eq!(jobs[0].status, QueueStatus::Succeeded);
    let home = dir.path().display();
    let log = std::fs::read_to_string(queue.log(1)).expect("log");
    let mut lines = log.lines();
    assert_eq!(lines.next(), Some(format!("{home}/sky_workdir").as_str()));
    assert_eq!(lines.next(), Some("file"));
    assert!(
        lines.next().is_some_and(|line| line.starts_with("rc my-d")),
        "{log}"
    );
    assert_eq!(lines.next(), Some("my-code my-stat my-base 1"));
    let setup = std::fs::read_to_string(dir.path().join("setup")).expect("setup");
    assert_eq!(setup, format!("set up in {home}/sky_workdir\n"));
}

#[test]
fn conda_is_there_to_be_activated() {
    let (dir, queue) = node();
    // A user's home with conda in it, as the agent was started with; the job's own is another.
    let user = dir.path().join("user");
    let profile = user.join("miniconda3/etc/profile.d");
    std::fs::create_dir_all(&profile).expect("folder");
    std::fs::write(profile.join("conda.sh"), "conda() { echo \"$@\"; }\n").expect("write");
    queue
        .submit(&job("conda activate skypilot; bash -c 'conda info'"), now())
        .expect("submit");
    let attempt = queue
        .claim(1, &boot_id(), now())
        .expect("claim")
        .expect("pending");
    let status = Command::new("bash")
        .args(["-c", wrapper::SCRIPT, "updraft-job"])
        .arg(queue.job_dir(1))
        .arg(attempt.to_string())
        .current_dir(dir.path())
        .env("HOME", &user)
        .env("PATH", "/usr/bin:/bin")
        .output()
        .expect("bash");
    let said = String::from_utf8_lossy(&status.stdout);
    assert_eq!(said, "activate skypilot\ninfo\n", "{status:?}");
}

#[test]
fn a_cancelled_job_leaves_no_variables() {
    let (_dir, queue) = node();
    let mut spec = job("true");
    spec.environment.insert("TOKEN".into(), "hunter2".into());
    queue.submit(&spec, now()).expect("submit");
    assert!(queue.job_dir(1).join("env").exists());
    assert_eq!(queue.cancel(Some(1), now()).expect("cancel"), 1);
    assert!(!queue.job_dir(1).join("env").exists());
}
