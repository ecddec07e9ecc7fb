//! Several workers that train one stage, to its end and cancelled on the way.

use std::sync::atomic::{AtomicBool, Ordering};

use updraft_train::Launch;

use super::*;

/// A port of loopback that was free a moment ago.
fn meeting_point() -> String {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    free.local_addr().expect("bound").to_string()
}

/// Three workers train one stage over one store: one result, the loss of one worker, and all of them know it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn workers_train_a_stage_together() {
    let accumulated = |stage: TrainStage| TrainStage {
        config: TrainConfig {
            gradient_accumulation_steps: 3,
            ..stage.config
        },
        threads: Threads::single(),
        ..stage
    };
    let (store, stage) = world().await;
    let alone = train(&store, &accumulated(stage)).await.expect("trained");

    let master = meeting_point();
    let (store, stage) = world().await;
    let worker = |rank| {
        let (store, stage, master) = (store.clone(), stage.clone(), master.clone());
        tokio::spawn(async move {
            let launch = Launch {
                rank,
                num_workers: 3,
                master,
            };
            let stage = TrainStage {
                launch: Some(launch),
                ..accumulated(stage)
            };
            train(&store, &stage).await
        })
    };
    let mut ends = Vec::new();
    for worker in [0, 1, 2].map(worker) {
        ends.push(worker.await.expect("no panic").expect("trained"));
    }
    let loss = |end: &Trained| {
        end.report
            .as_ref()
            .expect("this process trained")
            .train_loss
    };
    for end in &ends {
        assert_eq!(end.stage.dir(), ends[0].stage.dir());
        assert!(
            (loss(end) / loss(&alone) - 1.0).abs() < 1e-6,
            "{}",
            loss(end)
        );
    }
    let found = train(&store, &accumulated(stage)).await.expect("found");
    assert!(
        found.report.is_none(),
        "how many trained it is not part of its key"
    );
}

/// Cancelled at any call that the first worker makes to the store, be it in training or while it exports, both say so and
/// nothing is committed; or it was too late, and both have the result.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn workers_that_are_cancelled_say_so_together() {
    let (mut cancelled, mut at) = (0, 1);
    loop {
        let (store, stage) = world().await;
        let cancel = CancelToken::new();
        let called = Arc::new(AtomicBool::new(false));
        let (switch, reached) = (cancel.clone(), called.clone());
        let watched = updraft_store::faults::watch(&store, move |call| {
            if call == at {
                reached.store(true, Ordering::Relaxed);
                switch.cancel();
            }
        });
        let master = meeting_point();
        let worker = |rank, store: Store| {
            let (stage, cancel) = (stage.clone(), cancel.clone());
            let launch = Launch {
                rank,
                num_workers: 2,
                master: master.clone(),
            };
            tokio::spawn(async move {
                let stage = TrainStage {
                    config: TrainConfig {
                        gradient_accumulation_steps: 2,
                        ..stage.config
                    },
                    launch: Some(launch),
                    threads: Threads::single(),
                    ..stage
                };
                train_stage(&store, &stage, open_source(), &NoProgress, &cancel).await
            })
        };
        let (first, second) = (worker(0, watched), worker(1, store.clone()));
        let ends = (
            first.await.expect("no panic"),
            second.await.expect("no panic"),
        );
        match ends {
            (Ok(first), Ok(second)) => assert_eq!(first.stage.dir(), second.stage.dir()),
            (Err(Error::Cancelled { .. }), Err(Error::Cancelled { .. })) => {
                cancelled += 1;
                let id = StageId::done("tiny", "world").expect("a name");
                let found = updraft_store::current(&store, &id).await.expect("a look");
                assert!(found.is_none(), "cancelled at call {at}, and committed");
            }
            (first, second) => panic!("at call {at}: {:?}, {:?}", first.err(), second.err()),
        }
        if !called.load(Ordering::Relaxed) {
            break;
        }
        at += 4;
    }
    assert!(cancelled > 5, "{cancelled} of {at} calls");
}
