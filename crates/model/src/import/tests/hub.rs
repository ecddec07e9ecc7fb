//! Models from a server that lists and sends as the Hub does.

use std::collections::BTreeSet;

use sha1::{Digest as _, Sha1};
use updraft_store::hub::{HubClient, HubConfig, RepoRef};
use updraft_store::sha256_hex;
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

use super::*;

/// So small that the tiny model's weights have several.
const SEGMENT_BYTES: u64 = 10_000;

/// Git's name of a file.
fn git_oid(bytes: &[u8]) -> String {
    let mut sum = Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
    sum.update(bytes);
    let hex = |byte: &u8| format!("{byte:02x}");
    sum.finalize().iter().map(hex).collect()
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).expect("a file")
}

/// A Hub whose `owner/tiny` is a folder's files, the weights as a large file. What it sends of a
/// file in `instead` is another content than it lists.
async fn serve(folder: &Path, instead: &[(&str, Vec<u8>)]) -> MockServer {
    let server = MockServer::start().await;
    let mut tree = vec![json!({ "type": "directory", "path": "onnx", "oid": "0", "size": 0 })];
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let name = entry.expect("an entry").file_name();
        let name = name.into_string().expect("UTF-8");
        let bytes = read(folder, &name);
        let mut item =
            json!({ "type": "file", "path": name, "oid": git_oid(&bytes), "size": bytes.len() });
        if name == SINGLE_FILE {
            item["lfs"] =
                json!({ "oid": sha256_hex(&bytes), "size": bytes.len(), "pointerSize": 1 });
        }
        tree.push(item);
        let other = instead.iter().find(|(other, _)| *other == name);
        let bytes = other.map_or(bytes, |(_, bytes)| bytes.clone());
        Mock::given(wiremock::matchers::path(format!(
            "/owner/tiny/resolve/c0ffee/{name}"
        )))
        .respond_with(move |request: &Request| ranged(request, &bytes))
        .mount(&server)
        .await;
    }
    for (route, answer) in [
        ("revision/main", json!({ "sha": "c0ffee" })),
        ("tree/c0ffee", json!(tree)),
    ] {
        let answer = ResponseTemplate::new(200).set_body_json(answer);
        let path = format!("/api/models/owner/tiny/{route}");
        Mock::given(wiremock::matchers::path(path))
            .respond_with(answer)
            .mount(&server)
            .await;
    }
    server
}

fn ranged(request: &Request, bytes: &[u8]) -> ResponseTemplate {
    let (first, last) = range_of(request).expect("the client asks for ranges");
    ResponseTemplate::new(206)
        .insert_header("etag", "\"v1\"")
        .insert_header(
            "content-range",
            format!("bytes {first}-{last}/{}", bytes.len()).as_str(),
        )
        .set_body_bytes(&bytes[first..=last])
}

fn range_of(request: &Request) -> Option<(usize, usize)> {
    let range = request.headers.get("range")?.to_str().ok()?;
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

async fn import_from(server: &MockServer, store: &Store) -> Result<FinishedStage> {
    let config = HubConfig {
        endpoint: server.uri(),
        ..HubConfig::default()
    };
    let repo = RepoRef::model("owner/tiny").expect("a repository's id");
    let source = Source::hub(HubClient::new(config).expect("a client"), &repo).await?;
    let (id, cancel) = (
        StageId::models("owner/tiny").expect("a name"),
        CancelToken::new(),
    );
    super::super::import(store, &id, &source, SEGMENT_BYTES, &NoProgress, &cancel).await
}

#[tokio::test]
async fn a_repository_arrives_like_a_folder() {
    let (folder, store) = (folder(), Store::memory());
    let server = serve(folder.path(), &[]).await;
    let stage = import_from(&server, &store)
        .await
        .expect("a sound repository");
    let local = import(&store, folder.path()).await.expect("a sound folder");
    let objects = stage.manifest().await.expect("committed").objects;
    assert_eq!(objects, local.manifest().await.expect("committed").objects);
    assert!(
        import_from(&server, &store)
            .await
            .expect("finished before")
            .reused()
    );
    let requests = server.received_requests().await.expect("recorded");
    let is_pickle = |request: &Request| request.url.path().ends_with(".bin");
    assert!(!requests.iter().any(is_pickle));
    let left = updraft_store::garbage(&store, stage.id()).await;
    let left = left.expect("memory answers");
    assert!(
        left.iter().all(|object| object.path.contains("/journal/")),
        "{left:?}"
    );
}

/// Large files are known by their SHA-256, small ones by Git's name of them.
#[tokio::test]
async fn what_is_not_what_the_hub_lists_is_not_committed() {
    for (name, expected) in [
        (SINGLE_FILE, "its SHA-256 is"),
        (TOKENIZER_FILE, "its Git blob hash is"),
    ] {
        let (folder, store) = (folder(), Store::memory());
        let mut other = read(folder.path(), name);
        *other.last_mut().expect("not empty") ^= 1;
        let server = serve(folder.path(), &[(name, other)]).await;
        let error = import_from(&server, &store)
            .await
            .expect_err("another hash")
            .to_string();
        assert!(error.contains(expected), "{error}");
        let id = StageId::models("owner/tiny").expect("a name");
        let current = updraft_store::current(&store, &id).await;
        assert!(current.expect("memory answers").is_none());

        // What was wrong is not kept: from a Hub that is right now, the same import succeeds.
        let server = serve(folder.path(), &[]).await;
        import_from(&server, &store).await.expect("sound now");
    }
}

/// The segments of the weights that a store holds, by where they begin.
async fn kept(store: &Store) -> BTreeSet<String> {
    let listed = store.list("").await.expect("memory answers");
    let journal = |path: &str| path.contains("/journal/").then(|| path.to_owned());
    let mut kept = BTreeSet::new();
    for path in listed.iter().filter_map(|object| journal(&object.path)) {
        let entry = store.get(&path).await.expect("memory answers");
        let entry = String::from_utf8(entry.expect("listed").to_vec()).expect("JSON");
        if entry.contains("segments/") {
            kept.insert(path);
        }
    }
    kept
}

/// Killed at any call, the next run fetches no segment that is kept, and ends the same.
#[tokio::test]
async fn a_killed_download_goes_on_within_the_file() {
    let folder = folder();
    let server = serve(folder.path(), &[]).await;
    let whole = Store::memory();
    let expected = import_from(&server, &whole).await.expect("never killed");
    let expected = expected.manifest().await.expect("committed");
    let weights = expected.object(SINGLE_FILE).expect("listed").bytes;
    let num_segments = weights.div_ceil(SEGMENT_BYTES) as usize;
    assert!(num_segments > 3, "{num_segments}");

    let mut most = 0;
    for at in 1.. {
        let store = Store::memory();
        let (faulty, injected) = faults::inject(&store, Fault::KillAfter, at);
        let first = import_from(&server, &faulty).await;
        if !injected.struck() {
            break;
        }
        assert!(first.is_err() || at > 10, "killed at call {at}");
        let kept = kept(&store).await.len();
        // At the first server, requests of the killed run may still be coming in.
        let again = serve(folder.path(), &[]).await;
        let stage = import_from(&again, &store)
            .await
            .expect("the next run finishes");
        let manifest = stage.manifest().await.expect("committed");
        assert_eq!(manifest, expected, "killed at call {at}");
        let requests = again.received_requests().await.expect("recorded");
        let is_segment = |request: &&Request| {
            let length = range_of(request).map_or(0, |(first, last)| last - first + 1) as u64;
            let whole = length == SEGMENT_BYTES || length == weights % SEGMENT_BYTES;
            request.url.path().ends_with(SINGLE_FILE) && whole
        };
        let fetched = requests.iter().filter(is_segment).count();
        if first.is_err() && fetched > 0 {
            assert_eq!(fetched + kept, num_segments, "killed at call {at}");
            most = most.max(kept);
        }
    }
    assert!(
        most + 1 >= num_segments,
        "{most} segments were kept at most"
    );
}
