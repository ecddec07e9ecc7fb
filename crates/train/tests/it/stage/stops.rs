//! A stage that is killed or cancelled ends, when it runs again, in the bytes of a calm one.

use std::sync::Mutex;

use updraft_model::Threads;
use updraft_store::faults::{Fault, count, inject, watch};
use updraft_store::{CancelToken, NoProgress, Progress, ProgressSink, StageId, Store, garbage};
use updraft_train::{Error, TrainConfig, TrainStage, train_stage};

use super::{open_source, snapshot, train, world};

/// The smallest world with two checkpoints.
async fn small_world() -> (Store, TrainStage) {
    let (store, stage) = world().await;
    let config = TrainConfig {
        max_steps: Some(2),
        save_steps: 1,
        save_total_limit: 1,
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 1,
        ..stage.config
    };
    let threads = Threads::single();
    let stage = TrainStage {
        config,
        threads,
        ..stage
    };
    (store, stage)
}

/// Every fault at every store call, from opening the stage to deleting the last checkpoint.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_store_call_it_ends_in_the_same_bytes() {
    let (store, stage) = small_world().await;
    let (counted, calls) = count(&store);
    let done = train(&counted, &stage).await.expect("trained");
    let whole = snapshot(&store, &done.stage).await;
    let calls = calls.total();
    assert!(calls > 40, "{calls} calls");
    for fault in Fault::ALL {
        for at in 1..=calls {
            let (store, stage) = small_world().await;
            let (faulty, injected) = inject(&store, fault, at);
            let outcome = train(&faulty, &stage).await;
            assert!(injected.struck(), "{fault:?} at {at}");
            let done = match outcome {
                Ok(trained) => trained.stage,
                Err(_) => train(&store, &stage).await.expect("a second life").stage,
            };
            let objects = snapshot(&store, &done).await;
            let (left, committed): (Vec<_>, Vec<_>) = objects
                .into_iter()
                .partition(|(path, _)| path.contains("/checkpoints/"));
            assert_eq!(committed, whole, "{fault:?} at {at}");
            // What a kill left of the checkpoints when the stage stood already can be swept up.
            let id = StageId::done("tiny", "world").expect("a name");
            let garbage = garbage(&store, &id).await.expect("a listing");
            let swept: Vec<_> = garbage.into_iter().map(|object| object.path).collect();
            let left: Vec<_> = left.into_iter().map(|(path, _)| path).collect();
            assert_eq!(swept, left, "{fault:?} at {at}");
        }
    }
}

/// Cancelled ahead of each store call there is, training, exporting or verifying: it stops, commits nothing, and the next
/// run ends in the same bytes.
#[tokio::test(flavor = "multi_thread")]
async fn cancelled_at_any_store_call_it_stops_and_ends_in_the_same_bytes() {
    let (store, stage) = small_world().await;
    let (counted, calls) = count(&store);
    let done = train(&counted, &stage).await.expect("trained");
    let whole = snapshot(&store, &done.stage).await;
    let (mut exporting, mut finished) = (0, 0);
    for at in 1..=calls.total() {
        let (store, stage) = small_world().await;
        let cancel = CancelToken::new();
        let (counted, calls) = count(&store);
        let asking = cancel.clone();
        let watched = watch(&counted, move |call| {
            if call == at {
                asking.cancel();
            }
        });
        let outcome = train_stage(&watched, &stage, open_source(), &NoProgress, &cancel).await;
        let objects = store.list("done/tiny/world").await.expect("a listing");
        let written = |name: &str| objects.iter().any(|object| object.path.contains(name));
        match outcome {
            Ok(_) => finished += 1,
            Err(Error::Cancelled { step }) => {
                assert!(
                    !written("manifest.json") && !written("current.json"),
                    "at {at}"
                );
                if written("/lora_model/") {
                    exporting += 1;
                    assert_eq!(step, 2, "at {at}");
                    // The call that was on its way, and perhaps what it is made of.
                    let more = calls.total() - at;
                    assert!(more <= 1, "{more} calls after {at}");
                }
            }
            Err(error) => panic!("{error} at {at}"),
        }
        let again = train(&store, &stage).await.expect("a second life").stage;
        assert_eq!(snapshot(&store, &again).await, whole, "at {at}");
    }
    assert!(exporting >= 18, "{exporting} while exporting");
    // From its listing on the commit is not stopped; and the checkpoints' deletion is not.
    assert!(finished < 30, "{finished} finished all the same");
}

/// A stage that stands is a success, even if its checkpoints cannot be deleted; they are garbage.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_that_cannot_be_deleted_are_garbage_and_no_error() {
    let (store, stage) = world().await;
    let (counted, calls) = count(&store);
    train(&counted, &stage).await.expect("trained");
    let (store, stage) = world().await;
    let (faulty, injected) = inject(&store, Fault::KillBefore, calls.total());
    let done = train(&faulty, &stage).await.expect("committed").stage;
    assert!(injected.struck());
    let id = StageId::done("tiny", "world").expect("a name");
    let left = garbage(&store, &id).await.expect("a listing");
    assert!(!left.is_empty());
    for object in &left {
        assert!(object.path.contains("/checkpoints/"), "{}", object.path);
        store.delete(&object.path).await.expect("swept");
    }
    let again = train(&store, &stage).await.expect("found").stage;
    assert_eq!(again.key(), done.key());
    for object in &again.manifest().await.expect("a manifest").objects {
        again.read(object).await.expect("it is whole");
    }
}

/// Cancels at the second step, and remembers what it was told.
#[derive(Debug, Default)]
struct Watch {
    cancel: CancelToken,
    seen: Mutex<Vec<Progress>>,
}

impl ProgressSink for Watch {
    fn report(&self, progress: &Progress) {
        self.seen.lock().expect("no panic").push(progress.clone());
        if progress.done == 2 {
            self.cancel.cancel();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_it_says_so_and_continues() {
    let (store, stage) = world().await;
    let stage = TrainStage {
        config: TrainConfig {
            max_steps: Some(400),
            ..stage.config
        },
        ..stage
    };
    let watch = Watch::default();
    let error = train_stage(&store, &stage, open_source(), &watch, &watch.cancel)
        .await
        .expect_err("cancelled");
    let Error::Cancelled { step } = error else {
        panic!("{error}")
    };
    assert!((2..400).contains(&step));

    let first = watch.seen.lock().expect("no panic")[0].clone();
    assert_eq!(
        (
            first.stage.as_str(),
            first.done,
            first.total,
            first.unit.as_str()
        ),
        ("train", 1, Some(400), "steps")
    );
    for metric in ["loss", "learning_rate", "tokens_per_second"] {
        assert!(first.metrics.contains_key(metric), "{metric}");
    }
    let report = train(&store, &stage)
        .await
        .expect("the rest")
        .report
        .expect("trained");
    assert_eq!((report.resumed_from, report.steps), (step, 400));
}
