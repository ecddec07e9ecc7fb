//! Stores in local folders.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use updraft_store::Store;
use updraft_store::faults::{Fault, inject};

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
