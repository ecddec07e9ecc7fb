//! The promises of a [`Store`], one function each. Each takes a store of its own or shared:
//! all paths of a promise are under a folder of its name.

use bytes::Bytes;
use serde_json::json;

use crate::faults::count;
use crate::{Created, ManifestDraft, Opened, StageId, Store, garbage, open_stage, sha256_hex};

/// Makes one `#[tokio::test]` of every promise. The argument is an expression that makes a future
/// of an `Option<Store>`; on `None` the test is skipped.
#[macro_export]
macro_rules! conformance_tests {
    ($make:expr) => {
        $crate::conformance_tests!(
            $make;
            an_absent_object_is_none
            what_is_put_is_read
            put_replaces
            create_keeps_what_is_there
            a_range_is_those_bytes
            a_listing_is_deep_sorted_and_by_folder
            deleting_twice_is_as_good_as_once
            a_large_object_is_written_in_parts
            a_dropped_writer_leaves_nothing
            a_finished_stage_costs_one_get
            two_writers_of_a_stage_agree
            garbage_is_what_no_manifest_lists
        );
    };
    ($make:expr; $($promise:ident)*) => {
        $(
            #[tokio::test]
            async fn $promise() {
                if let Some(store) = $make.await {
                    $crate::conformance::store::$promise(&store).await;
                }
            }
        )*
    };
}

/// Reading what is not there is no error.
pub async fn an_absent_object_is_none(store: &Store) {
    assert_eq!(store.get("absent/a").await.expect("get"), None);
    assert_eq!(store.head("absent/a").await.expect("head"), None);
    assert!(store.list("absent").await.expect("list").is_empty());
}

/// Bytes come back as they went in, also none at all.
pub async fn what_is_put_is_read(store: &Store) {
    for (path, bytes) in [
        ("read/empty", Bytes::new()),
        ("read/a/b-c_d.e", "x\0y".into()),
    ] {
        store.put(path, bytes.clone()).await.expect("put");
        assert_eq!(store.get(path).await.expect("get"), Some(bytes.clone()));
        let info = store.head(path).await.expect("head").expect("there");
        assert_eq!((info.path.as_str(), info.bytes), (path, bytes.len() as u64));
    }
}

/// A second put wins.
pub async fn put_replaces(store: &Store) {
    store
        .put("replace/a", "long before".into())
        .await
        .expect("put");
    store.put("replace/a", "after".into()).await.expect("put");
    assert_eq!(
        store.get("replace/a").await.expect("get"),
        Some("after".into())
    );
}

/// A create on a taken path changes nothing and tells what is there; equal bytes are ours.
pub async fn create_keeps_what_is_there(store: &Store) {
    store.delete("create/a").await.expect("delete");
    assert_eq!(
        store
            .create("create/a", "first".into())
            .await
            .expect("create"),
        Created::New
    );
    assert_eq!(
        store
            .create("create/a", "first".into())
            .await
            .expect("create"),
        Created::New
    );
    let second = store
        .create("create/a", "second".into())
        .await
        .expect("create");
    assert_eq!(second, Created::Existed("first".into()));
    assert_eq!(
        store.get("create/a").await.expect("get"),
        Some("first".into())
    );
}

/// A range read gives those bytes and no others.
pub async fn a_range_is_those_bytes(store: &Store) {
    store
        .put("range/a", "0123456789".into())
        .await
        .expect("put");
    assert_eq!(
        store.get_range("range/a", 2..5).await.expect("range"),
        Bytes::from("234")
    );
    assert!(store.get_range("range/absent", 0..1).await.is_err());
}

/// A listing holds every depth, in order, and no neighbour whose name starts alike.
pub async fn a_listing_is_deep_sorted_and_by_folder(store: &Store) {
    for path in ["list/b", "list/a/2", "list/a/1", "list-b/c"] {
        store.put(path, path.into()).await.expect("put");
    }
    let paths = |found: Vec<crate::ObjectInfo>| -> Vec<String> {
        found.into_iter().map(|object| object.path).collect()
    };
    assert_eq!(
        paths(store.list("list").await.expect("list")),
        ["list/a/1", "list/a/2", "list/b"]
    );
    assert_eq!(
        paths(store.list("list/a/").await.expect("list")),
        ["list/a/1", "list/a/2"]
    );
    assert!(store.list("").await.expect("list").len() >= 4);
}

/// Deleting what is not there is no error.
pub async fn deleting_twice_is_as_good_as_once(store: &Store) {
    store.put("delete/a", "x".into()).await.expect("put");
    store.delete("delete/a").await.expect("first");
    store.delete("delete/a").await.expect("second");
    assert_eq!(store.get("delete/a").await.expect("get"), None);
}

/// An object of several parts is whole, and its entry tells size and hash.
pub async fn a_large_object_is_written_in_parts(store: &Store) {
    let mut writer = store.writer("large/a").expect("a path");
    let mut whole = Vec::new();
    for chunk in 0..41u8 {
        let bytes = vec![chunk; 1_000_003];
        whole.extend_from_slice(&bytes);
        writer.write(bytes.into()).await.expect("write");
    }
    let entry = writer.finish().await.expect("finish");
    assert_eq!(
        (entry.bytes, entry.sha256),
        (whole.len() as u64, sha256_hex(&whole))
    );
    let found = store.get("large/a").await.expect("get").expect("there");
    assert!(found == whole, "other bytes came back");
    store.delete("large/a").await.expect("delete");
}

/// An object is not there before its writer finishes, nor ever when it is dropped.
pub async fn a_dropped_writer_leaves_nothing(store: &Store) {
    let mut writer = store.writer("dropped/a").expect("a path");
    writer.write(vec![1; 17 << 20].into()).await.expect("write");
    assert_eq!(store.head("dropped/a").await.expect("head"), None);
    drop(writer);
    let mut writer = store.writer("dropped/a").expect("a path");
    writer.write(vec![1; 17 << 20].into()).await.expect("write");
    writer.abort().await;
    assert!(store.list("dropped").await.expect("list").is_empty());
}

async fn open(store: &Store, id: &StageId, inputs: &serde_json::Value) -> Opened {
    open_stage(store, id, "test", inputs).await.expect("open")
}

/// What a commit leaves is found again by its inputs with one GET and no write.
pub async fn a_finished_stage_costs_one_get(store: &Store) {
    let id = StageId::raw("one-get").expect("a name");
    if let Opened::Open(stage) = open(store, &id, &json!(1)).await {
        let object = stage
            .put_object("a", "x".into())
            .await
            .expect("put")
            .with_rows(1);
        let draft = ManifestDraft {
            objects: vec![object],
            ..ManifestDraft::default()
        };
        assert!(!stage.commit(draft).await.expect("commit").reused());
    }
    let (counted, calls) = count(store);
    let Opened::Finished(found) = open(&counted, &id, &json!(1)).await else {
        panic!("a finished stage was opened again")
    };
    assert_eq!((calls.reads(), calls.total()), (1, 1));
    assert!(found.reused());
    let manifest = found.manifest().await.expect("manifest");
    assert_eq!(manifest.objects[0].rows, Some(1));
    assert_eq!(
        found.read(&manifest.objects[0]).await.expect("read"),
        Bytes::from("x")
    );
}

/// Two processes that make one stage at once get one result, which holds.
pub async fn two_writers_of_a_stage_agree(store: &Store) {
    let id = StageId::raw("two-writers").expect("a name");
    let make = async |name: &str| {
        let Opened::Open(stage) = open(store, &id, &json!(1)).await else {
            return None;
        };
        let object = stage
            .put_object(name, name.to_owned().into())
            .await
            .expect("put");
        Some((
            stage,
            ManifestDraft {
                objects: vec![object],
                ..ManifestDraft::default()
            },
        ))
    };
    let (Some((first, one)), Some((second, two))) = (make("one").await, make("two").await) else {
        return; // A store kept from an earlier run.
    };
    let first = first
        .commit(one)
        .await
        .expect("commit")
        .manifest()
        .await
        .expect("manifest");
    let second = second
        .commit(two)
        .await
        .expect("commit")
        .manifest()
        .await
        .expect("manifest");
    assert_eq!(first, second);
    assert_eq!(first.objects[0].path, "one");
}

/// Garbage is every object of the name that no manifest lists, and of no other name.
pub async fn garbage_is_what_no_manifest_lists(store: &Store) {
    let id = StageId::raw("garbage").expect("a name");
    if let Opened::Open(stage) = open(store, &id, &json!(1)).await {
        let kept = stage.put_object("kept", "x".into()).await.expect("put");
        stage.put_object("left", "y".into()).await.expect("put");
        let draft = ManifestDraft {
            objects: vec![kept],
            ..ManifestDraft::default()
        };
        stage.commit(draft).await.expect("commit");
    }
    if let Opened::Open(stage) = open(store, &id, &json!("never finished")).await {
        stage.put_object("half", "z".into()).await.expect("put");
    }
    let below = StageId::raw("garbage/below").expect("a name");
    if let Opened::Open(stage) = open(store, &below, &json!(1)).await {
        stage.put_object("other", "z".into()).await.expect("put");
    }
    let mut names: Vec<String> = garbage(store, &id)
        .await
        .expect("garbage")
        .into_iter()
        .filter_map(|object| Some(object.path.rsplit_once('/')?.1.to_owned()))
        .collect();
    names.sort();
    assert_eq!(names, ["half", "left"]);
}
