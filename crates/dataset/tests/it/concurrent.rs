//! Several processes that import one dataset at once: one result, as if there were one process.

use std::process::{Child, Command, Stdio};

use updraft_dataset::conformance::Generated;
use updraft_dataset::{ImportOptions, ShardPlan};
use updraft_store::conformance::s3::S3Server;
use updraft_store::{StageId, Store, current};

use crate::world::import_into;

/// Set in a process that imports, to its store.
const CHILD: &str = "UPDRAFT_CONCURRENT_CHILD_STORE";

/// Twelve shards.
fn source() -> Generated {
    Generated {
        rows: 600,
        row_bytes: 200,
    }
}

fn options() -> ImportOptions {
    let shards = ShardPlan {
        max_rows: 50,
        ..ShardPlan::default()
    };
    ImportOptions {
        shards,
        ..ImportOptions::default()
    }
}

async fn manifest(store: &Store) -> Vec<u8> {
    let id = StageId::standardized("set").expect("a name");
    let stage = current(store, &id)
        .await
        .expect("answers")
        .expect("finished");
    for object in &stage.manifest().await.expect("committed").objects {
        stage.read(object).await.expect("whole");
    }
    let bytes = store
        .get(&stage.path("manifest.json"))
        .await
        .expect("answers");
    bytes.expect("committed").to_vec()
}

async fn alone() -> Vec<u8> {
    let store = Store::memory();
    import_into(&store, &source(), &options())
        .await
        .expect("imported");
    manifest(&store).await
}

#[tokio::test]
async fn child() {
    if let Ok(store) = std::env::var(CHILD) {
        let store = Store::open(&store).expect("opened");
        import_into(&store, &source(), &options())
            .await
            .expect("imported");
    }
}

fn start(store: &str) -> Child {
    Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "concurrent::child"])
        .env(CHILD, store)
        .stdout(Stdio::null())
        .spawn()
        .expect("started")
}

#[tokio::test]
async fn processes_on_one_folder_make_one_result() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = folder.path().to_str().expect("UTF-8");
    let mut children: Vec<Child> = (0..4).map(|_| start(url)).collect();
    // One is killed somewhere on its way: its half-written shards are nobody's.
    children[0].kill().expect("killed");
    children[0].wait().expect("gone");
    for mut child in children.drain(1..) {
        assert!(child.wait().expect("ended").success());
    }
    let store = Store::open(url).expect("opened");
    assert!(manifest(&store).await == alone().await);
}

#[tokio::test]
async fn tasks_over_s3_make_one_result() {
    let server = S3Server::start().await;
    let runs = (0..3).map(|_| {
        let store = server.store("set");
        tokio::spawn(async move { import_into(&store, &source(), &options()).await })
    });
    for run in runs.collect::<Vec<_>>() {
        let finished = run.await.expect("no panic").expect("imported");
        assert_eq!(finished.counts()["rows"], 600);
    }
    assert!(manifest(&server.store("set")).await == alone().await);
}
