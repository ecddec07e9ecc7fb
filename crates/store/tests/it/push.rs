//! Uploading a folder to a server that answers as the Hub does.

use std::time::Duration;

use serde_json::{Value, json};
use updraft_store::hub::{HubClient, HubConfig, PushOptions, RepoRef};
use updraft_store::{CancelToken, Error, NoProgress, Result, sha256_hex};

use crate::hub_server::{Asked, Reply, Server, TOKEN, reply};

const LARGE: usize = 25;

/// A folder with a small file, an empty one, a large one, one that is ignored and a hidden one.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("sub")).expect("made");
    std::fs::create_dir(folder.path().join(".git")).expect("made");
    for (name, bytes) in [
        ("README.md", &b"# toy"[..]),
        ("empty.bin", b""),
        ("sub/model.bin", &[7; LARGE]),
        ("ignored.log", b"x"),
        (".git/config", b"hidden"),
    ] {
        std::fs::write(folder.path().join(name), bytes).expect("written");
    }
    folder
}

fn body(asked: &Asked) -> Value {
    serde_json::from_slice(&asked.body).expect("JSON")
}

/// Answers as the Hub; `storage` says where large files go.
fn hub(asked: &Asked, storage: &dyn Fn(&Value) -> Value) -> Reply {
    let answer = match asked.target.as_str() {
        "/api/repos/create" => return reply(409, &[], "exists"),
        "/api/datasets/owner/toy/preupload/main" => {
            let body = body(asked);
            let mode = |file: &Value| {
                let path = file["path"].as_str().expect("a path");
                json!({ "path": path, "uploadMode": if path.ends_with(".bin") { "lfs" } else { "regular" }, "shouldIgnore": path.ends_with(".log") })
            };
            json!({ "files": body["files"].as_array().expect("a list").iter().map(mode).collect::<Vec<_>>() })
        }
        "/datasets/owner/toy.git/info/lfs/objects/batch" => {
            let objects = body(asked)["objects"]
                .as_array()
                .expect("a list")
                .iter()
                .map(storage)
                .collect::<Vec<_>>();
            json!({ "transfer": "basic", "objects": objects })
        }
        "/api/datasets/owner/toy/commit/main" => json!({ "commitOid": "c0ffee", "commitUrl": "" }),
        _ => return reply(200, &[("etag", "\"part\"")], ""),
    };
    reply(
        200,
        &[("content-type", "application/json")],
        answer.to_string(),
    )
}

async fn push(server: &Server) -> Result<String> {
    let folder = folder();
    let repo = RepoRef::dataset("owner/toy").expect("a name");
    let client = server.client();
    client
        .push_folder(
            &repo,
            folder.path(),
            &PushOptions::default(),
            &NoProgress,
            &CancelToken::new(),
        )
        .await
}

#[tokio::test]
async fn a_folder_becomes_one_commit_and_the_token_stays_with_the_hub() {
    let storage = Server::start(|_, _| reply(200, &[], "")).await;
    let place = storage.url();
    let server = Server::start(move |asked, _| {
        hub(asked, &|object| json!({ "oid": object["oid"], "size": object["size"], "actions": { "upload": { "href": format!("{place}/bucket/object") } } }))
    })
    .await;
    assert_eq!(push(&server).await.expect("pushed"), "c0ffee");

    let asked = server.asked();
    assert!(
        asked
            .iter()
            .all(|asked| asked.headers["authorization"] == format!("Bearer {TOKEN}"))
    );
    let commit = asked.last().expect("a commit");
    let lines: Vec<Value> = commit
        .body
        .split(|&byte| byte == b'\n')
        .map(|line| serde_json::from_slice(line).expect("JSON"))
        .collect();
    let sha256 = sha256_hex(&[7; LARGE]);
    let expected = [
        json!({ "key": "header", "value": { "summary": "Upload by updraft", "description": "" } }),
        json!({ "key": "file", "value": { "path": "README.md", "content": "IyB0b3k=", "encoding": "base64" } }),
        json!({ "key": "file", "value": { "path": "empty.bin", "content": "", "encoding": "base64" } }),
        json!({ "key": "lfsFile", "value": { "path": "sub/model.bin", "algo": "sha256", "oid": sha256, "size": LARGE } }),
    ];
    assert_eq!(lines, expected);
    let stored = storage.asked();
    assert_eq!(
        (stored.len(), stored[0].method.as_str(), &stored[0].body[..]),
        (1, "PUT", &[7; LARGE][..])
    );
    assert!(
        !stored[0].headers.contains_key("authorization"),
        "the token went to another host"
    );
}

#[tokio::test]
async fn a_large_file_goes_in_the_parts_asked_for_or_not_at_all() {
    let storage = Server::start(|asked, _| reply(200, &[("etag", &asked.target)], "")).await;
    let place = storage.url();
    let server = Server::start(move |asked, _| {
        hub(asked, &|object| {
            let header = json!({ "chunk_size": "10", "1": format!("{place}/1"), "2": format!("{place}/2"), "3": format!("{place}/3") });
            json!({ "oid": object["oid"], "actions": { "upload": { "href": format!("{place}/complete"), "header": header } } })
        })
    })
    .await;
    push(&server).await.expect("pushed");
    let stored = storage.asked();
    let sent: Vec<(&str, usize)> = stored
        .iter()
        .map(|asked| (asked.target.as_str(), asked.body.len()))
        .collect();
    assert_eq!(sent[..3], [("/1", 10), ("/2", 10), ("/3", 5)]);
    let parts = json!([{ "partNumber": 1, "etag": "/1" }, { "partNumber": 2, "etag": "/2" }, { "partNumber": 3, "etag": "/3" }]);
    assert_eq!(
        (stored[3].method.as_str(), &body(&stored[3])["parts"]),
        ("POST", &parts)
    );

    let there =
        Server::start(|asked, _| hub(asked, &|object| json!({ "oid": object["oid"] }))).await;
    push(&there).await.expect("pushed");
    assert!(
        there.asked().iter().all(|asked| asked.method == "POST"),
        "nothing is uploaded twice"
    );
}

#[tokio::test]
async fn refusals_are_those_of_reading() {
    let server = Server::start(|_, _| reply(401, &[], "")).await;
    let error = push(&server).await.expect_err("refused");
    assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
    let odd = Server::start(|asked, _| {
        hub(
            asked,
            &|object| json!({ "oid": object["oid"], "error": { "code": 422 } }),
        )
    })
    .await;
    let error = push(&odd).await.expect_err("no place").to_string();
    assert!(
        error.contains("no place for one of the files") && !error.contains(TOKEN),
        "{error}"
    );
}

#[tokio::test]
async fn a_body_that_is_taken_slowly_arrives() {
    const BYTES: usize = 128 << 10;
    let storage = Server::start(|_, _| reply(200, &[], "")).await;
    let (place, stall) = (storage.url(), Duration::from_millis(20));
    storage.sip(3 * stall); // 960 ms for all of it, where an answer must come within 80 ms
    let server = Server::start(move |asked, _| {
        hub(asked, &|object| json!({ "oid": object["oid"], "size": object["size"], "actions": { "upload": { "href": format!("{place}/bucket/object") } } }))
    })
    .await;
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("model.bin"), vec![7; BYTES]).expect("written");
    let client = HubClient::new(HubConfig {
        endpoint: server.url(),
        stall,
        ..HubConfig::default()
    })
    .expect("a good endpoint");
    let commit = client
        .push_folder(
            &RepoRef::dataset("owner/toy").expect("a name"),
            folder.path(),
            &PushOptions::default(),
            &NoProgress,
            &CancelToken::new(),
        )
        .await;
    assert_eq!(commit.expect("pushed"), "c0ffee");
    let stored: Vec<usize> = storage
        .asked()
        .iter()
        .map(|asked| asked.body.len())
        .collect();
    assert_eq!(stored, [BYTES]);
}
