//! Stores in local folders.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use updraft_store::Store;

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
