//! A file of these bytes, read through the source to its end or its error.

use std::sync::{Once, OnceLock};

use futures::TryStreamExt as _;
use tokio::runtime::Runtime;
use updraft_dataset::source::{Cursor, Files};
use updraft_dataset::{Source as _, SourceOptions};
use updraft_store::Store;

static QUIET: Once = Once::new();

pub fn read(name: &str, bytes: &[u8]) {
    // A decoder's panic that the source makes an error of is no find; one that leaves it is.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| ())));
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| Runtime::new().expect("threads"));
    runtime.block_on(async {
        let store = Store::memory();
        store.put(name, bytes.to_vec().into()).await.expect("memory");
        let options = SourceOptions::default();
        let source = Files::in_store(&store, "", &options).await.expect("a data file");
        if let Ok(batches) = source.open(Cursor::default()).await {
            let rows = batches.map_ok(|batch| batch.rows().len());
            // An error is an answer; a panic or a read without end is not.
            let _ = rows.try_fold(0, |sum, rows| async move { Ok(sum + rows) }).await;
        }
    });
}
