//! Several nodes of one cluster: they begin together, in one order, and end together.

use std::sync::Arc;
use std::time::{Duration, Instant};

use updraft_provision::agent::{Queue, QueueStatus};
use updraft_provision::providers::local::LocalProvider;
use updraft_provision::{LaunchRequest, Lease, WaitFor};

use crate::clusters::{Story, task, until};

/// A story on two nodes of this machine, which end themselves when they have been idle for a second.
async fn two_nodes() -> (Story, Vec<std::path::PathBuf>) {
    let story =
        Story::new(|dir| Arc::new(LocalProvider::new(dir.join("instances")).expect("absolute")));
    let request = LaunchRequest {
        lease: Some(Lease {
            idle: Some(Duration::from_secs(1)),
            down: true,
            wait_for: WaitFor::Jobs,
        }),
        ..story.request()
    };
    let two = task("num_nodes: 2\n");
    let launched = story
        .engine
        .launch_guarded(&two, &request, &story.agent)
        .await
        .expect("launch");
    let root = story.dir.path().join("instances");
    let folders = launched.iter().map(|instance| root.join(&instance.id.0));
    let folders = folders.collect();
    (story, folders)
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

/// Nobody but the nodes themselves: no client asks, follows or waits.
#[tokio::test]
async fn a_node_that_does_nothing_stays_while_another_of_its_cluster_works() {
    let (story, folders) = two_nodes().await;
    // Only the head has this job. Both are held for files to be brought until a job comes: that of the
    // second ends at once.
    let both = task("num_nodes: 2\nrun: 'true'\n");
    let alone = task("run: sleep 5; ls -d ../../../*/instance.json | wc -l > ~/../../../seen\n");
    for job in [&both, &alone] {
        let exec = story
            .engine
            .exec("mycluster", job, &story.agent, &story.options);
        exec.await.expect("exec");
    }
    let seen = story.dir.path().join("seen");
    until("the end of the job", || {
        seen.exists() && !folders[0].exists()
    })
    .await;
    assert_eq!(std::fs::read_to_string(seen).expect("seen").trim(), "2");
    until("the end of the other", || !folders[1].exists()).await;
}

/// Detached, a job of two nodes that fails on one ends on the other.
#[tokio::test]
async fn a_detached_job_that_fails_on_one_node_ends_on_the_other() {
    for (fails, other) in [(0, 1), (1, 0)] {
        let (story, folders) = two_nodes().await;
        let yaml = format!(
            "num_nodes: 2\nrun: |\n  [ $SKYPILOT_NODE_RANK = {fails} ] && exit 7\n  exec sleep 600\n"
        );
        // Opened before the job can end its node.
        let queue = Queue::open(folders[other].join("files/.updraft")).expect("queue");
        let fails_once = task(&yaml);
        let exec = story
            .engine
            .exec("mycluster", &fails_once, &story.agent, &story.options);
        exec.await.expect("exec");
        let cancelled = || {
            let jobs = queue.jobs().expect("jobs");
            jobs.last()
                .is_some_and(|job| job.status == QueueStatus::Cancelled)
        };
        until("the end of the other part", cancelled).await;
        until("the end of both nodes", || {
            folders.iter().all(|folder| !folder.exists())
        })
        .await;
    }
}

/// A job that one node cannot be given is taken back from the one that has it.
#[tokio::test]
async fn a_job_that_is_not_on_all_its_nodes_is_on_none() {
    let (story, folders) = two_nodes().await;
    // In the way of the second node's job.
    std::fs::write(folders[1].join("files/.updraft/jobs/1"), "").expect("write");
    let two = task("num_nodes: 2\nrun: exec sleep 600\n");
    let exec = story
        .engine
        .exec("mycluster", &two, &story.agent, &story.options);
    exec.await.expect_err("the second cannot take it");
    let queue = Queue::open(folders[0].join("files/.updraft"));
    let queue = queue.expect("queue");
    until("the end of the first part", || {
        let jobs = queue.jobs().expect("jobs");
        matches!(jobs.as_slice(), [job] if job.status == QueueStatus::Cancelled)
    })
    .await;
    story.engine.down("mycluster").await.expect("down");
}

/// The commands of a job begin on no node before the setup has ended on all of them.
#[tokio::test]
async fn commands_begin_when_the_setup_has_ended_on_every_node() {
    let (story, folders) = two_nodes().await;
    let proof = story.dir.path().join("set-up");
    let proof = proof.display();
    for slow in [0, 1] {
        let yaml = format!(
            "num_nodes: 2\nsetup: |\n  [ $SKYPILOT_NODE_RANK = {slow} ] || exit 0\n  sleep 2; touch {proof}-{slow}\n\
             run: test -e {proof}-{slow}\n"
        );
        let both = task(&yaml);
        let exec = story
            .engine
            .exec("mycluster", &both, &story.agent, &story.options);
        let job = exec.await.expect("exec");
        let ended = story.engine.wait("mycluster", &story.agent, job).await;
        assert_eq!(ended.expect("ended").status, QueueStatus::Succeeded);
    }
    story.engine.down("mycluster").await.expect("down");
    assert!(folders.iter().all(|folder| !folder.exists()));
}

/// Whoever queues at the same moment, jobs wait in one order on every node.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_wait_in_one_order_on_every_node() {
    let (story, folders) = two_nodes().await;
    let both = task("num_nodes: 2\nrun: sleep 600\n");
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let (engine, agent) = (story.engine.clone(), story.agent.clone());
        let (both, options) = (both.clone(), story.options.clone());
        clients.spawn(async move { engine.exec("mycluster", &both, &agent, &options).await });
    }
    while let Some(queued) = clients.join_next().await {
        queued.expect("no panic").expect("queued");
    }
    let queue = Queue::open(folders[1].join("files/.updraft")).expect("queue");
    let heads: Vec<i64> = queue
        .jobs()
        .expect("jobs")
        .iter()
        .map(|job| job.head)
        .collect();
    assert_eq!(heads, [1, 2, 3, 4, 5, 6]);
    story.engine.down("mycluster").await.expect("down");
}
