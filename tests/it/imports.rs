//! A dataset and a model imported into one store at the same time.

use std::path::Path;

use updraft::dataset::{ImportOptions, SourceOptions, import, resolve_source};
use updraft::model::import_model;
use updraft::store::conformance::s3::S3Server;
use updraft::store::{CancelToken, FinishedStage, Manifest, NoProgress, Store};

use crate::pipeline::dataset;

async fn rows(store: &Store, path: &Path) -> FinishedStage {
    let spec = path.to_str().expect("UTF-8");
    let source = resolve_source(spec, &SourceOptions::default()).await;
    let (source, options) = (source.expect("the file"), ImportOptions::default());
    let (progress, cancel) = (&NoProgress, CancelToken::new());
    let imported = import(store, "words", &*source, &options, progress, &cancel).await;
    imported.expect("imported")
}

async fn tiny(store: &Store) -> FinishedStage {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/assets/tiny");
    let imported = import_model(store, "tiny", folder, &NoProgress, &CancelToken::new()).await;
    imported.expect("imported")
}

async fn manifest(stage: &FinishedStage) -> Manifest {
    let manifest = stage.manifest().await.expect("committed");
    for object in &manifest.objects {
        stage.read(object).await.expect("whole");
    }
    manifest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dataset_and_a_model_arrive_at_the_same_time() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = dataset(folder.path());
    let alone = Store::memory();
    let (expected_rows, expected_tiny) = (rows(&alone, &data).await, tiny(&alone).await);

    let path = folder.path().join("store");
    let server = S3Server::start().await;
    for store in [
        Store::memory(),
        Store::open(path.to_str().expect("UTF-8")).expect("a folder"),
        server.store("both"),
    ] {
        // Each is begun twice, as two machines might.
        let (first, second, model, again) = tokio::join!(
            rows(&store, &data),
            rows(&store, &data),
            tiny(&store),
            tiny(&store)
        );
        for stage in [&first, &second] {
            assert_eq!(manifest(stage).await, manifest(&expected_rows).await);
        }
        for stage in [&model, &again] {
            assert_eq!(manifest(stage).await, manifest(&expected_tiny).await);
        }
    }
}
