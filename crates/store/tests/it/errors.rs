//! Bad input: each a one-line error that names the thing and the next step, and never a secret.

use std::error::Error as _;

use serde_json::json;
use updraft_store::{
    Error, ManifestDraft, ObjectEntry, Opened, StageId, StageWriter, Store, current, finished,
    open_stage,
};

fn open_error(url: &str) -> String {
    let error = Store::open_with(url, []).expect_err(url);
    assert!(!error.to_string().contains('\n'));
    error.to_string()
}

/// The stage "toy", which is not finished.
async fn opened(store: &Store, id: &StageId) -> StageWriter {
    match open_stage(store, id, "toy", &json!(1)).await.expect("open") {
        Opened::Open(stage) => stage,
        Opened::Finished(_) => panic!("it is not finished yet"),
    }
}

#[test]
fn a_bad_url_says_what_to_write() {
    for (url, says) in [
        ("ftp://bucket", "s3://bucket/prefix"),
        ("gs://", "write gs://bucket/prefix"),
        ("az://", "write az://bucket/prefix"),
        ("s3://", "the bucket is missing"),
        ("s3://bucket/a//b", "empty or relative part"),
        ("s3://bucket/../b", "empty or relative part"),
        ("file://host/folder", "three slashes"),
        ("memory://x", "memory://"),
        ("", "has no name"),
    ] {
        let message = open_error(url);
        assert!(message.contains(says), "{url}: {message}");
    }
}

#[test]
fn credentials_in_a_url_are_refused_and_not_repeated() {
    for url in [
        "s3://AKIAKEY:sEcRet@bucket/prefix",
        "s3://AKIAKEY:sEc/Ret@bucket/prefix",
        "ftp://u:sEcRet@host/x",
    ] {
        let message = open_error(url);
        assert!(
            !message.contains("Ret") && !message.contains("AKIA"),
            "{message}"
        );
    }
}

#[test]
fn debug_shows_no_credentials() {
    let env = [
        ("AWS_ACCESS_KEY_ID", "AKIAKEY"),
        ("AWS_SECRET_ACCESS_KEY", "sEcRet"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let store = Store::open_with("s3://bucket/prefix", env).expect("settings fit");
    assert_eq!(store.url(), "s3://bucket/prefix");
    let shown = format!("{store:?}");
    assert!(
        !shown.contains("AKIAKEY") && !shown.contains("sEcRet"),
        "{shown}"
    );
}

#[test]
fn a_file_in_the_way_is_named() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    for url in [file.path().to_path_buf(), file.path().join("below")] {
        let message = open_error(url.to_str().expect("plain"));
        assert!(message.contains("a file is in the way"), "{message}");
    }
}

// Time is paused so that the retries' waits pass at once.
#[tokio::test(start_paused = true)]
async fn an_unreachable_store_is_named() {
    let env = [
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9"),
        ("AWS_ACCESS_KEY_ID", "AKIAKEY"),
        ("AWS_SECRET_ACCESS_KEY", "sEcRet"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let store = Store::open_with("s3://bucket/prefix", env).expect("opening asks nothing");
    let error = store
        .get("a")
        .await
        .expect_err("nobody listens on the discard port");
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .starts_with("s3://bucket/prefix/a does not answer"),
        "{error}"
    );
    let chain: Vec<String> = std::iter::successors(error.source(), |error| (*error).source())
        .map(ToString::to_string)
        .collect();
    assert!(!chain.concat().contains("sEcRet"), "{chain:?}");
}

#[tokio::test]
async fn a_path_that_leaves_the_store_is_refused() {
    let store = Store::memory();
    for path in ["../a", "a/../../b", "a//b"] {
        assert!(
            matches!(store.get(path).await, Err(Error::InvalidName { .. })),
            "{path}"
        );
    }
    let id = StageId::raw("toy").expect("a name");
    let stage = opened(&store, &id).await;
    for name in ["../../a", "manifest.json", "journal/00000.json", "a b"] {
        assert!(stage.put_object(name, "x".into()).await.is_err(), "{name}");
        assert!(stage.object_writer(name).is_err(), "{name}");
    }
}

/// A manifest somebody else wrote cannot make a reader open files outside the stage.
#[tokio::test]
async fn a_manifest_that_lists_paths_outside_is_not_read() {
    let store = Store::memory();
    let id = StageId::raw("toy").expect("a name");
    let stage = opened(&store, &id).await;
    let path = stage.path("manifest.json");
    let key16 = stage.key().key16();
    stage
        .commit(ManifestDraft::default())
        .await
        .expect("commit");
    let text = String::from_utf8(
        store
            .get(&path)
            .await
            .expect("get")
            .expect("there")
            .to_vec(),
    );
    let mut manifest: serde_json::Value = serde_json::from_str(&text.expect("text")).expect("json");
    manifest["objects"] = json!([{"path": "../../../etc/passwd", "bytes": 1, "sha256": ""}]);
    store
        .put(&path, manifest.to_string().into())
        .await
        .expect("put");
    let error = finished(&store, &id, &key16).await.expect_err("refused");
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

#[test]
fn a_local_path_stays_in_the_store() {
    let store = crate::folder_store();
    assert_eq!(store.local_path("../../etc/passwd"), None);
    let root = store.local_path("").expect("a local store");
    assert_eq!(store.local_path("a/b"), Some(root.join("a/b")));
    assert_eq!(Store::memory().local_path("a"), None);
}

/// A draft that lists what is not there, or not so, is not committed.
#[tokio::test]
async fn a_manifest_never_lists_what_is_not_there() {
    let store = Store::memory();
    let id = StageId::raw("toy").expect("a name");
    for (path, bytes) in [("absent", 1), ("there", 2)] {
        let stage = opened(&store, &id).await;
        stage.put_object("there", "x".into()).await.expect("put");
        let object = ObjectEntry {
            path: path.into(),
            rows: None,
            bytes,
            sha256: String::new(),
        };
        let draft = ManifestDraft {
            objects: vec![object],
            ..ManifestDraft::default()
        };
        let error = stage.commit(draft).await.expect_err("not so");
        assert!(
            matches!(error, Error::Missing { .. } | Error::Corrupt { .. }),
            "{error}"
        );
        assert!(current(&store, &id).await.expect("get").is_none());
    }
}

#[tokio::test]
async fn a_changed_or_removed_manifest_is_noticed() {
    let store = Store::memory();
    let id = StageId::raw("toy").expect("a name");
    let stage = opened(&store, &id).await;
    let finished = stage
        .commit(ManifestDraft::default())
        .await
        .expect("commit");
    let path = finished.path("manifest.json");
    store.put(&path, "{}".into()).await.expect("put");
    assert!(matches!(
        finished.manifest().await,
        Err(Error::Corrupt { .. })
    ));
    store.delete(&path).await.expect("delete");
    let error = finished.manifest().await.expect_err("removed");
    assert!(error.to_string().contains("current.json"), "{error}");
}

/// An object that another process's commit lists is never replaced by other bytes.
#[tokio::test]
async fn a_committed_object_is_not_replaced() {
    let store = Store::memory();
    let id = StageId::raw("toy").expect("a name");
    let inputs = json!(1);
    let mut stages = Vec::new();
    for _ in 0..2 {
        match open_stage(&store, &id, "toy", &inputs).await.expect("open") {
            Opened::Open(stage) => stages.push(stage),
            Opened::Finished(_) => panic!("nothing is committed yet"),
        }
    }
    let (slow, fast) = (stages.pop().expect("two"), stages.pop().expect("two"));
    let object = fast.put_object("a", "fast".into()).await.expect("put");
    let draft = ManifestDraft {
        objects: vec![object.clone()],
        ..ManifestDraft::default()
    };
    let finished = fast.commit(draft).await.expect("commit");

    assert!(matches!(
        slow.put_object("a", "slow".into()).await,
        Err(Error::Superseded { .. })
    ));
    let mut writer = slow.object_writer("a").expect("a name");
    writer.write("slow".into()).await.expect("write");
    assert!(matches!(
        writer.finish().await,
        Err(Error::Superseded { .. })
    ));
    assert_eq!(
        slow.put_object("a", "fast".into())
            .await
            .expect("the same bytes"),
        object
    );
    assert_eq!(finished.read(&object).await.expect("read"), "fast");
}

/// A pointer that cannot be read is not believed, and not in the way.
#[tokio::test]
async fn a_broken_pointer_is_repaired() {
    let store = Store::memory();
    let id = StageId::raw("toy").expect("a name");
    let stage = opened(&store, &id).await;
    let key = *stage
        .commit(ManifestDraft::default())
        .await
        .expect("commit")
        .key();
    store
        .put(&id.current_path(), "{\"key\":".into())
        .await
        .expect("put");
    let again = open_stage(&store, &id, "toy", &json!(1))
        .await
        .expect("open");
    assert!(matches!(again, Opened::Finished(_)));
    let found = current(&store, &id).await.expect("get").expect("repaired");
    assert_eq!(*found.key(), key);
}

/// Earlier options again: found, nothing made, and `current.json` names them again.
#[tokio::test]
async fn returning_to_earlier_inputs_moves_the_pointer() {
    let store = Store::memory();
    let id = StageId::raw("toy").expect("a name");
    for inputs in [1, 2] {
        if let Opened::Open(stage) = open_stage(&store, &id, "toy", &inputs).await.expect("open") {
            stage
                .commit(ManifestDraft::default())
                .await
                .expect("commit");
        }
    }
    let newest = current(&store, &id)
        .await
        .expect("get")
        .expect("two are finished");
    let Opened::Finished(first) = open_stage(&store, &id, "toy", &1).await.expect("open") else {
        panic!("made again")
    };
    assert_ne!(first.key(), newest.key());
    let now = current(&store, &id)
        .await
        .expect("get")
        .expect("still there");
    assert_eq!(now.key(), first.key());
}
