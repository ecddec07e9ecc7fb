//! A power cut at any instant costs nothing but time.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use serde_json::Value;
use updraft::store::{Manifest, Store};

use crate::pipeline::{dataset, finish, kill_when, stop_when, train};

fn finished(stage: &'static str) -> impl Fn(&Value) -> bool {
    move |event| event["event"] == "finished" && event["stage"] == stage
}

fn trained(steps: u64) -> impl Fn(&Value) -> bool {
    move |event| event["stage"] == "train" && event["done"].as_u64() >= Some(steps)
}

/// Every manifest of the store, byte for byte, after checking that what it lists is there and whole.
async fn manifests(root: &Path) -> BTreeMap<String, String> {
    let store = Store::open(&root.display().to_string()).expect("local store");
    let mut manifests = BTreeMap::new();
    for object in store.list("").await.expect("list") {
        let Some(dir) = object.path.strip_suffix("/manifest.json") else {
            continue;
        };
        let bytes = store.get(&object.path).await.expect("get").expect("listed");
        let manifest: Manifest = serde_json::from_slice(&bytes).expect("a manifest");
        for entry in &manifest.objects {
            let object = store
                .get(&format!("{dir}/{}", entry.path))
                .await
                .expect("get")
                .expect("listed");
            assert_eq!(sha256(&object), entry.sha256, "{dir}/{}", entry.path);
        }
        manifests.insert(
            dir.to_owned(),
            String::from_utf8(bytes.to_vec()).expect("JSON"),
        );
    }
    manifests
}

/// Asked to stop, two workers end with a checkpoint, which the same command with one worker goes on from; the result is
/// one worker's, but for the last bits.
#[test]
fn two_workers_that_are_stopped_go_on_as_one() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let (store, data) = (dir.path().join("store"), dataset(dir.path()));
    let long = |workers: &str| {
        let mut command = train(&store, &data);
        command.args([
            "--max-steps",
            "400",
            "--save-steps",
            "1000",
            "--workers",
            workers,
        ]);
        command
    };
    let (code, reached) = stop_when(long("2"), trained(3));
    assert_eq!((code, reached), (Some(143), true));
    let events = finish(long("1"));
    let first = events.iter().find(|event| event["stage"] == "train");
    let step = first
        .and_then(|event| event["done"].as_u64())
        .expect("a step");
    assert!(
        step > 3,
        "it went on after the checkpoint, with step {step}"
    );
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Path, size and time of change of every file.
fn files(root: &Path) -> Vec<(String, u64, SystemTime)> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("folder") {
            let entry = entry.expect("entry");
            let metadata = entry.metadata().expect("metadata");
            match metadata.is_dir() {
                true => folders.push(entry.path()),
                false => {
                    let changed = metadata.modified().expect("a file system with times");
                    found.push((entry.path().display().to_string(), metadata.len(), changed));
                }
            }
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn killed_anywhere_it_ends_as_if_it_never_was() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let calm = dir.path().join("calm");
    finish(train(&calm, &data));
    let expected = manifests(&calm).await;
    assert_eq!(
        expected.len(),
        4,
        "import, model, pretokenize and train: {:?}",
        expected.keys()
    );

    // One store that is killed again and again: at each boundary, between two checkpoints, twice in
    // a row after a resume, and when the last step is done and the export begins.
    let stormy = dir.path().join("stormy");
    assert!(kill_when(train(&stormy, &data), finished("import")));
    assert!(kill_when(train(&stormy, &data), finished("model")));
    assert!(kill_when(train(&stormy, &data), finished("pretokenize")));
    assert!(kill_when(train(&stormy, &data), trained(4)));
    assert!(kill_when(train(&stormy, &data), trained(7)));
    assert!(kill_when(train(&stormy, &data), trained(8)));
    finish(train(&stormy, &data));
    assert_eq!(manifests(&stormy).await, expected);
}

#[tokio::test]
async fn a_second_run_writes_nothing() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let store = dir.path().join("store");
    finish(train(&store, &data));
    let before = files(&store);
    let events = finish(train(&store, &data));
    assert_eq!(files(&store), before);
    let finished: Vec<_> = events
        .iter()
        .filter(|event| event["event"] == "finished")
        .collect();
    assert_eq!(finished.len(), 4);
    assert!(
        finished
            .iter()
            .all(|event| event["reused"] == true && event["bytes_written"] == 0)
    );
}

#[tokio::test]
async fn rejected_rows_are_counted_and_listed_with_their_reason() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let store = dir.path().join("store");
    finish(train(&store, &data));
    let manifests = manifests(&store).await;
    let import = manifests
        .iter()
        .find(|(path, _)| path.starts_with("standardized/"))
        .expect("import")
        .1;
    let manifest: Manifest = serde_json::from_str(import).expect("a manifest");
    let rejects: Vec<_> = manifest
        .rejects
        .iter()
        .map(|reject| (reject.row, reject.reason.as_str()))
        .collect();
    assert_eq!(rejects.len(), 2, "{rejects:?}");
    assert!(rejects[1].1.contains("martian"), "{rejects:?}");
}
