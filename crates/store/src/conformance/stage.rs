//! A stage ends the same whatever happens at any of its store calls.

use std::fmt::Debug;

use bytes::Bytes;
use futures::StreamExt;

use crate::faults::{Fault, count, inject};
use crate::layout::MANIFEST;
use crate::{FinishedStage, StageId, Store, current};

/// Cases run side by side.
const CASES_AT_ONCE: usize = 16;

/// Runs a stage with each fault at each of its store calls, then again without, and checks that
/// it always ends with the byte-identical manifest, that everything listed is there and whole,
/// that nothing is called finished that is not, and that one more run writes nothing.
///
/// `fresh` makes a store holding what the stage reads; `run` runs the stage to its end.
/// Returns how many calls an undisturbed run makes.
///
/// # Panics
/// When a promise is broken, naming the fault and the call.
pub async fn survives_every_fault<E: Debug>(
    fresh: impl AsyncFn() -> Store,
    run: impl AsyncFn(Store) -> Result<FinishedStage, E>,
) -> u64 {
    let (store, calls) = count(&fresh().await);
    let finished = run(store.clone())
        .await
        .expect("an undisturbed run finishes");
    let num_calls = calls.total();
    let expected = manifest_bytes(&finished).await;
    let cases = Fault::ALL
        .iter()
        .flat_map(|&fault| (1..=num_calls).map(move |at| (fault, at)));
    let cases = cases.map(|(fault, at)| {
        let (fresh, run, expected, id) = (&fresh, &run, &expected, finished.id());
        async move {
            let case = format!("{fault:?} at call {at} of {num_calls}");
            let store = fresh().await;
            let (faulty, injected) = inject(&store, fault, at);
            // Whether this run finishes is its own affair; what it leaves behind is ours.
            let _ = run(faulty).await;
            assert!(injected.struck(), "{case}: never reached");
            survived(&case, &store, id, expected, run).await;
        }
    });
    // Side by side: a run spends its time waiting before it tries again.
    futures::stream::iter(cases)
        .buffer_unordered(CASES_AT_ONCE)
        .collect::<()>()
        .await;
    num_calls
}

/// Runs once more without a fault, and a third time, and looks at what there is.
async fn survived<E: Debug>(
    case: &str,
    store: &Store,
    id: &StageId,
    expected: &Bytes,
    run: &impl AsyncFn(Store) -> Result<FinishedStage, E>,
) {
    if let Some(claimed) = current(store, id).await.expect("the store answers") {
        assert_whole(&claimed, &format!("{case}, before the rerun")).await;
    }
    let again = run(store.clone())
        .await
        .unwrap_or_else(|error| panic!("{case}: {error:?}"));
    assert!(
        manifest_bytes(&again).await == expected,
        "{case}: another manifest"
    );
    assert_whole(&again, case).await;
    let (counted, calls) = count(store);
    let third = run(counted)
        .await
        .unwrap_or_else(|error| panic!("{case}: {error:?}"));
    assert!(third.reused(), "{case}: a third run made the stage again");
    assert_eq!(
        calls.writes() + calls.deletes(),
        0,
        "{case}: a third run wrote"
    );
}

async fn manifest_bytes(stage: &FinishedStage) -> Bytes {
    let path = stage.path(MANIFEST);
    stage
        .store()
        .get(&path)
        .await
        .expect("the store answers")
        .expect("a finished stage has a manifest")
}

async fn assert_whole(stage: &FinishedStage, case: &str) {
    let manifest = stage
        .manifest()
        .await
        .unwrap_or_else(|error| panic!("{case}: {error}"));
    for object in &manifest.objects {
        stage
            .read(object)
            .await
            .unwrap_or_else(|error| panic!("{case}: {error}"));
    }
}
