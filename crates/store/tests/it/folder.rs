//! Stores in local folders.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use updraft_store::faults::{Fault, inject};
use updraft_store::{ManifestDraft, Opened, StageId, Store, garbage, open_stage};

/// An empty store in a folder of its own under the build's scratch folder, which the first call empties.
pub(crate) fn folder_store() -> Store {
    static EMPTIED: OnceLock<()> = OnceLock::new();
    static STORES: AtomicU32 = AtomicU32::new(0);
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("updraft-store");
    EMPTIED.get_or_init(|| {
        if scratch.exists() {
            std::fs::remove_dir_all(&scratch).expect("scratch of an earlier run");
        }
    });
    let folder = scratch.join(format!(
        "{}/made/by/open",
        STORES.fetch_add(1, Ordering::Relaxed)
    ));
    Store::open(folder.to_str().expect("a plain path")).expect("a folder")
}

/// Every file in a folder, whatever its name, at any depth.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("entry").path());
    entries
        .flat_map(|path| {
            if path.is_dir() {
                files(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}

/// A failed or dropped writer must not keep the disk's space under a hidden name.
#[tokio::test]
async fn a_failed_writer_leaves_no_file_behind() {
    let store = folder_store();
    let root = store.local_path("").expect("a local store");
    for at in 1..=4 {
        let (faulty, _) = inject(&store, Fault::Fail, at);
        let mut writer = faulty.writer("a").expect("a path");
        let mut failed = false;
        for _ in 0..2 {
            failed |= writer.write(vec![1; 17 << 20].into()).await.is_err();
        }
        let finished = writer.finish().await;
        assert!(failed || finished.is_err(), "no fault at call {at}");
        assert!(
            finished.is_err(),
            "finished after a failed write, at call {at}"
        );
        assert_eq!(files(&root), Vec::<PathBuf>::new(), "at call {at}");
    }
}

/// A killed write leaves a file that no listing shows; garbage does, and it can be deleted.
#[tokio::test]
async fn what_a_killed_write_leaves_is_garbage() {
    let store = folder_store();
    let id = StageId::models("owner/toy").expect("a name");
    let Opened::Open(stage) = open_stage(&store, &id, "toy", &1).await.expect("open") else {
        panic!("a new store has no finished stage")
    };
    let object = stage.put_object("a", "x".into()).await.expect("put");
    let dir = stage.dir().to_owned();
    let below = StageId::models("owner/toy/below").expect("a name");
    let left = [
        format!("{dir}/b/model.safetensors#1"),
        format!("{dir}/a#12"),
        format!("{}#1", id.current_path()),
    ];
    for path in left.iter().chain([&format!("{}#1", below.current_path())]) {
        let file = store.local_path(path).expect("a local store");
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        std::fs::write(file, "half").expect("written");
    }
    let draft = ManifestDraft {
        objects: vec![object],
        ..ManifestDraft::default()
    };
    stage
        .commit(draft)
        .await
        .expect("what is left is in nobody's way");
    let found = garbage(&store, &id).await.expect("garbage");
    let mut paths: Vec<&str> = found.iter().map(|object| object.path.as_str()).collect();
    let mut expected: Vec<&str> = left.iter().map(String::as_str).collect();
    paths.sort_unstable();
    expected.sort_unstable();
    assert_eq!(paths, expected);
    for object in &found {
        assert_eq!(object.bytes, 4);
        store.delete(&object.path).await.expect("deleted");
        store.delete(&object.path).await.expect("deleted twice");
    }
    assert!(garbage(&store, &id).await.expect("garbage").is_empty());
    let Opened::Finished(_) = open_stage(&store, &id, "toy", &1).await.expect("open") else {
        panic!("the stage is finished")
    };
}
