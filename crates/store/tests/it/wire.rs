//! Stages over the S3 protocol, while the server and the connections to it fail.

use futures::StreamExt;
use updraft_store::conformance::s3::{S3Server, WireFault};
use updraft_store::conformance::survives_every_fault;
use updraft_store::{Created, Error, FinishedStage, Result, Store};

use crate::kill::{SHARDS, large_stage, toy_stage};

/// A process that dies at any of its calls, each try in a folder of its own.
#[tokio::test]
async fn a_stage_over_s3_ends_the_same_whatever_happens_at_any_call() {
    let server = S3Server::start().await;
    let tries = std::cell::Cell::new(0);
    let fresh = async || {
        tries.set(tries.get() + 1);
        server.store(&format!("try-{}", tries.get()))
    };
    let calls = survives_every_fault(fresh, toy_stage).await;
    assert_eq!(calls, 6 + 2 * u64::from(SHARDS));
    assert_eq!(server.orphaned_parts(), 0);
}

/// Runs side by side: each spends its time waiting for the client's patience.
const AT_ONCE: usize = 12;

/// One run against a server that meets a fault at its `at`-th request; the manifest's bytes.
async fn run(
    stage: impl AsyncFn(Store) -> Result<FinishedStage>,
    fault: Option<(WireFault, u64)>,
) -> (Vec<u8>, u64) {
    let server = S3Server::start().await;
    if let Some((fault, at)) = fault {
        server.fail_at(fault, at);
    }
    let store = server.store("stage");
    // The client retries by itself where that is safe; where it is not, the next run goes on.
    let finished = match stage(store.clone()).await {
        Ok(finished) => finished,
        Err(error) => {
            assert!(error.is_retryable(), "{fault:?}: {error}");
            stage(store.clone()).await.expect("the next run finishes")
        }
    };
    let requests = server.requests();
    let manifest = finished.manifest().await.expect("committed");
    for object in &manifest.objects {
        finished.read(object).await.expect("whole");
    }
    assert_eq!(server.orphaned_parts(), 0, "{fault:?}: parts were left");
    let manifest = store
        .get(&finished.path("manifest.json"))
        .await
        .expect("answers");
    (manifest.expect("committed").to_vec(), requests)
}

/// Each fault at every request.
async fn survives_every_wire_fault(
    stage: impl AsyncFn(Store) -> Result<FinishedStage>,
    faults: &[WireFault],
) {
    let (expected, requests) = run(&stage, None).await;
    let cases = faults
        .iter()
        .flat_map(|&fault| (1..=requests).map(move |at| (fault, at)));
    let runs = cases.map(|case| {
        let stage = &stage;
        async move { (case, run(stage, Some(case)).await.0) }
    });
    let mut runs = futures::stream::iter(runs).buffer_unordered(AT_ONCE);
    while let Some((case, manifest)) = runs.next().await {
        assert!(manifest == expected, "{case:?}: another manifest");
    }
}

#[tokio::test]
async fn a_failing_server_changes_nothing() {
    survives_every_wire_fault(toy_stage, &WireFault::ALL).await;
}

#[tokio::test]
async fn a_failing_multipart_upload_leaves_no_parts() {
    // Parts are lost from sight where a request takes effect and its answer does not come.
    let faults = [WireFault::DropAfter, WireFault::FailAfter];
    survives_every_wire_fault(large_stage, &faults).await;
}

#[tokio::test]
async fn a_wrong_secret_is_refused() {
    let server = S3Server::start().await;
    let store = server.store_signed_with("a", "guessed");
    let error = store.get("x").await.expect_err("refused");
    assert!(matches!(error, Error::Denied { .. }), "{error:?}");
}

#[tokio::test]
async fn a_version_is_read_as_long_as_it_is_there() {
    let server = S3Server::start().await;
    for store in [server.store("a"), Store::memory(), crate::folder_store()] {
        assert_eq!(
            store.create("x", "one".into()).await.expect("create"),
            Created::New
        );
        let etag = store.head("x").await.expect("head").expect("there").etag;
        assert!(etag.is_some());
        let read = async || store.get_range_of("x", 0..3, etag.as_deref()).await;
        assert_eq!(read().await.expect("the same"), "one");
        store.put("x", "other".into()).await.expect("put");
        assert!(matches!(read().await, Err(Error::Changed { .. })));
    }
}
