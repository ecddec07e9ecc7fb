//! A store that fails, loses its answer or dies at every single call, and the run after it.

use futures::TryStreamExt as _;
use serde_json::json;
use updraft_dataset::{
    ImportOptions, MemorySource, PretokenizeOptions, Reader, ReaderOptions, Result, rejects,
};
use updraft_store::conformance::s3::S3Server;
use updraft_store::conformance::survives_every_fault;
use updraft_store::faults::{self, Fault};
use updraft_store::{FinishedStage, Store};

use crate::world::{import_into, options, pretokenize_into, row, source};

const ROWS: usize = 45;

/// Runs `stage` on a copy of `before` with the fault at every call in turn, then again without,
/// and compares what is finished then with a run that met no fault.
async fn check<S>(prepare: impl AsyncFn(&Store), stage: S)
where
    S: AsyncFn(&Store) -> Result<FinishedStage>,
{
    let clean = Store::memory();
    prepare(&clean).await;
    let expected = listed(&clean, &stage(&clean).await.expect("no fault")).await;
    for fault in Fault::ALL {
        let mut at = 1;
        loop {
            let store = Store::memory();
            prepare(&store).await;
            let (faulty, injected) = faults::inject(&store, fault, at);
            let first = stage(&faulty).await;
            if !injected.struck() {
                break;
            }
            let finished = stage(&store)
                .await
                .unwrap_or_else(|err| panic!("{fault:?} at call {at}: the rerun fails: {err}"));
            assert_eq!(
                listed(&store, &finished).await,
                expected,
                "{fault:?} at call {at}, first run {first:?}"
            );
            at += 1;
        }
        assert!(at > 10, "the stage makes more calls than {at}");
    }
}

/// The manifest's bytes and those of every object it lists.
async fn listed(store: &Store, stage: &FinishedStage) -> Vec<(String, bytes::Bytes)> {
    let mut paths = vec![stage.path("manifest.json")];
    let manifest = stage
        .manifest()
        .await
        .expect("a finished stage has a manifest");
    paths.extend(
        manifest
            .objects
            .iter()
            .chain(&manifest.more_rejects)
            .map(|object| stage.path(&object.path)),
    );
    let mut objects = Vec::new();
    for path in paths {
        let bytes = store
            .get(&path)
            .await
            .expect("memory answers")
            .unwrap_or_else(|| panic!("{path} is missing"));
        objects.push((path, bytes));
    }
    objects
}

#[tokio::test(start_paused = true)]
async fn an_import_killed_at_any_call_ends_the_same() {
    check(
        async |_| (),
        async |store| import_into(store, &source(ROWS), &options()).await,
    )
    .await;
}

/// A shard of both, a shard of rejects only, and a shard of rows.
#[tokio::test(start_paused = true)]
async fn an_import_with_rejects_killed_at_any_call_lists_each_once() {
    let bad = |i: usize| i < 130 || (150..300).contains(&i);
    let rows = (0..310).map(|i| {
        if bad(i) {
            json!({ "messages": [i] })
        } else {
            row(i)
        }
    });
    let source = MemorySource::new("rows", rows).expect("objects");
    let mut options = ImportOptions {
        format: Some("sharegpt".to_owned()),
        max_reject_rate: 1.0,
        ..options()
    };
    options.shards.max_rows = 150;
    let stage = async |store: &Store| import_into(store, &source, &options).await;
    check(async |_| (), stage).await;

    let finished = stage(&Store::memory()).await.expect("no fault");
    let rejects = rejects(&finished).await.expect("rejects");
    let mut rows: Vec<u64> = rejects
        .map_ok(|reject| reject.row)
        .try_collect()
        .await
        .expect("lists");
    rows.sort_unstable();
    let expected: Vec<u64> = (0..310).filter(|&i| bad(i)).map(|i| i as u64).collect();
    assert_eq!(rows, expected);
    let counts = finished.counts();
    assert_eq!((counts["rejected"], counts["rows"]), (280, 30));
}

#[tokio::test(start_paused = true)]
async fn a_pretokenize_killed_at_any_call_ends_the_same() {
    let import = async |store: &Store| {
        import_into(store, &source(ROWS), &options())
            .await
            .expect("import")
    };
    let stage = async |store: &Store| {
        let id = updraft_store::StageId::standardized("set")?;
        // The current pointer is read through the faulty store, as a new process would.
        let standardized = updraft_store::current(store, &id).await?.expect("imported");
        pretokenize_into(store, &standardized, &PretokenizeOptions::default()).await
    };
    check(async |store| drop(import(store).await), stage).await;

    let store = Store::memory();
    import(&store).await;
    let ready = stage(&store).await.expect("pretokenize");
    let reader = Reader::open(&ready, ReaderOptions::default())
        .await
        .expect("reader");
    let read: Vec<_> = reader.read(0, 0).try_collect().await.expect("read");
    assert_eq!(read.len(), ROWS);
}

#[tokio::test]
async fn a_finished_stage_costs_one_get_and_no_put() {
    let store = Store::memory();
    let standardized = import_into(&store, &source(ROWS), &options())
        .await
        .expect("import");
    let options_ = PretokenizeOptions::default();
    pretokenize_into(&store, &standardized, &options_)
        .await
        .expect("pretokenize");

    let (counted, calls) = faults::count(&store);
    let again = import_into(&counted, &source(ROWS), &options())
        .await
        .expect("again");
    assert!(again.reused());
    assert_eq!((calls.reads(), calls.total()), (1, 1));

    let (counted, calls) = faults::count(&store);
    assert!(
        pretokenize_into(&counted, &again, &options_)
            .await
            .expect("again")
            .reused()
    );
    assert_eq!((calls.reads(), calls.total()), (1, 1));
}

/// The same over the S3 protocol: a store that fails, loses its answer or dies at every call.
#[tokio::test]
async fn an_import_over_s3_killed_at_any_call_ends_the_same() {
    let server = S3Server::start().await;
    let tries = std::cell::Cell::new(0);
    let fresh = async || {
        tries.set(tries.get() + 1);
        server.store(&format!("try-{}", tries.get()))
    };
    let import = async |store: Store| import_into(&store, &source(ROWS), &options()).await;
    let calls = survives_every_fault(fresh, import).await;
    assert!(calls > 15, "five shards take more calls than {calls}");
}
