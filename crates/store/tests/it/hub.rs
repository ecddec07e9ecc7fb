//! The Hub client against a server that behaves as the Hub does, and as badly.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use serde_json::json;
use tokio::net::TcpListener;
use updraft_store::hub::{HubClient, HubConfig, RepoFile, RepoRef, ResolvedRepo};
use updraft_store::{
    CancelToken, Error, ManifestDraft, Opened, Result, StageId, Store, fetch, open_stage,
    sha256_hex,
};

use crate::hub_server::{Reply, Server, TOKEN, ranged, reply};

fn content(length: usize) -> Bytes {
    (0..length).map(|i| (i * 31 % 251) as u8).collect()
}

fn repo() -> RepoRef {
    RepoRef::dataset("owner/data").expect("an id")
}

/// A resolved repository with one file, as if listed.
fn resolved(path: &str, whole: &Bytes) -> (ResolvedRepo, RepoFile) {
    let file = RepoFile {
        path: path.to_owned(),
        size: whole.len() as u64,
        oid: "0".to_owned(),
        lfs_sha256: Some(sha256_hex(whole)),
    };
    (
        ResolvedRepo {
            repo: repo(),
            sha: "c0ffee".to_owned(),
            files: vec![file.clone()],
        },
        file,
    )
}

async fn all(body: impl Stream<Item = Result<Bytes>>) -> Result<Bytes> {
    let chunks: Vec<Bytes> = body.try_collect().await?;
    Ok(chunks.concat().into())
}

#[tokio::test]
async fn a_revision_is_pinned_and_every_page_listed() {
    let server = Server::start(|asked, _| match asked.target.as_str() {
        "/api/datasets/owner/data/revision/refs%2Fconvert%2Fparquet" => {
            reply(200, &[], json!({"sha": "c0ffee", "more": 1}).to_string())
        }
        "/api/datasets/owner/data/tree/c0ffee?recursive=true" => reply(
            200,
            &[(
                "link",
                "</api/datasets/owner/data/tree/c0ffee?recursive=true&cursor=x>; rel=\"next\"",
            )],
            json!([
                {"type": "directory", "path": "data", "oid": "1", "size": 0},
                {"type": "file", "path": "data/b c.parquet", "oid": "2", "size": 9,
                 "lfs": {"oid": "ab", "size": 9, "pointerSize": 1}, "xetHash": "x"},
            ])
            .to_string(),
        ),
        "/api/datasets/owner/data/tree/c0ffee?recursive=true&cursor=x" => reply(
            200,
            &[],
            json!([{"type": "file", "path": "README.md", "oid": "3", "size": 4}]).to_string(),
        ),
        _ => reply(404, &[], ""),
    })
    .await;
    let found = server
        .client()
        .resolve(&repo().at("refs/convert/parquet"))
        .await
        .expect("resolved");
    assert_eq!(found.sha, "c0ffee");
    let paths: Vec<_> = found.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["README.md", "data/b c.parquet"]);
    assert_eq!(found.files[1].lfs_sha256.as_deref(), Some("ab"));
    assert!(
        server
            .asked()
            .iter()
            .all(|asked| asked.headers["authorization"].ends_with(TOKEN))
    );
}

#[tokio::test]
async fn a_listing_that_leads_out_or_never_ends_is_refused() {
    for (path, link, says) in [
        ("../../etc/passwd", None, "leads out"),
        ("a", Some("</again>; rel=\"next\""), "without end"),
    ] {
        let server = Server::start(move |asked, _| {
            if asked.target.contains("/revision/") {
                return reply(200, &[], json!({"sha": "c0ffee"}).to_string());
            }
            let page = json!([{"type": "file", "path": path, "oid": "1", "size": 1}]);
            let link = link.map(|link| ("link", link));
            reply(200, link.as_slice(), page.to_string())
        })
        .await;
        let error = server.client().resolve(&repo()).await.expect_err("refused");
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[tokio::test]
async fn a_redirect_is_followed_without_the_token() {
    let whole = content(1000);
    let cdn = Server::start({
        let whole = whole.clone();
        move |asked, _| ranged(asked, &whole, "\"v1\"")
    })
    .await;
    let hub = Server::start({
        let target = format!("{}/blob?Signature=sIgNed", cdn.url());
        move |_, _| {
            reply(
                302,
                &[("location", &target), ("x-repo-commit", "c0ffee")],
                "",
            )
        }
    })
    .await;
    let (repo, file) = resolved("data/b c.parquet", &whole);
    let found = all(hub.client().read(&repo, &file, 10..20))
        .await
        .expect("read");
    assert_eq!(found, whole.slice(10..20));

    let asked = hub.asked();
    assert_eq!(
        asked[0].target,
        "/datasets/owner/data/resolve/c0ffee/data/b%20c.parquet"
    );
    assert_eq!(asked[0].headers["authorization"], format!("Bearer {TOKEN}"));
    let asked = cdn.asked();
    assert_eq!(
        (asked.len(), asked[0].headers["range"].as_str()),
        (1, "bytes=10-19")
    );
    assert!(!asked[0].headers.contains_key("authorization"));
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    let whole = content(100_000);
    let server = Server::start({
        let whole = whole.clone();
        move |asked, before| Reply {
            cut: (before < 2).then_some(30_000),
            ..ranged(asked, &whole, "\"v1\"")
        }
    })
    .await;
    let (repo, file) = resolved("a", &whole);
    let found = all(server.client().read(&repo, &file, 0..file.size))
        .await
        .expect("read");
    assert!(found == whole);

    let asked = server.asked();
    assert_eq!(asked.len(), 3);
    assert!(!asked[0].headers.contains_key("if-range"));
    for again in &asked[1..] {
        assert_eq!(again.headers["if-range"], "\"v1\"");
        assert_ne!(again.headers["range"], asked[0].headers["range"]);
    }
}

#[tokio::test]
async fn a_change_in_mid_download_is_noticed() {
    let (old, new) = (
        content(1000),
        content(1000)
            .slice(1..)
            .iter()
            .chain(b"x")
            .copied()
            .collect(),
    );
    let server = Server::start({
        let old = old.clone();
        move |asked, before| match before {
            0 => Reply {
                cut: Some(300),
                ..ranged(asked, &old, "\"v1\"")
            },
            _ => ranged(asked, &new, "\"v2\""),
        }
    })
    .await;
    let (repo, file) = resolved("a", &old);
    let error = all(server.client().read(&repo, &file, 0..1000))
        .await
        .expect_err("changed");
    assert!(matches!(error, Error::Changed { .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_ignores_ranges_is_read_all_the_same() {
    let whole = content(1000);
    let server = Server::start({
        let whole = whole.clone();
        move |_, _| reply(200, &[], whole.clone())
    })
    .await;
    let (repo, file) = resolved("a", &whole);
    let found = all(server.client().read(&repo, &file, 700..900))
        .await
        .expect("read");
    assert_eq!(found, whole.slice(700..900));
}

#[tokio::test]
async fn another_size_than_listed_is_an_error() {
    let server = Server::start(|asked, _| ranged(asked, &content(2000), "\"v1\"")).await;
    let (repo, file) = resolved("a", &content(1000));
    let error = all(server.client().read(&repo, &file, 0..1000))
        .await
        .expect_err("other size");
    assert!(matches!(error, Error::UnexpectedAnswer { .. }), "{error}");
}

#[tokio::test]
async fn a_busy_hub_is_waited_for_as_long_as_it_asks() {
    let server = Server::start(|_, before| match before {
        0 => reply(429, &[("ratelimit", "\"api\";r=0;t=1")], ""),
        1 => reply(503, &[], ""),
        _ => reply(
            200,
            &[],
            if before == 2 {
                "{\"sha\":\"c0ffee\"}"
            } else {
                "[]"
            },
        ),
    })
    .await;
    let start = Instant::now();
    server.client().resolve(&repo()).await.expect("resolved");
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(server.asked().len(), 4);
}

#[tokio::test]
async fn a_wait_beyond_the_deadline_is_not_begun() {
    let server = Server::start(|_, _| reply(429, &[("ratelimit", "\"api\";r=0;t=290")], "")).await;
    let client = server.client_within(Duration::from_secs(5));
    let start = Instant::now();
    let error = client.resolve(&repo()).await.expect_err("too long");
    assert!(
        matches!(
            error,
            Error::RateLimited {
                wait_seconds: 290,
                ..
            }
        ),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(4));
}

#[tokio::test]
async fn a_silent_hub_ends_with_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let deadline = Duration::from_millis(300);
    let config = HubConfig {
        endpoint,
        deadline,
        ..HubConfig::default()
    };
    let error = HubClient::new(config)
        .expect("good")
        .resolve(&repo())
        .await
        .expect_err("silent");
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn refusals_have_names_and_show_no_token() {
    for (status, code, says) in [
        (403, "GatedRepo", "is gated"),
        (401, "GatedRepo", "is gated"),
        (401, "RepoNotFound", "is not on the Hub"),
        (404, "RevisionNotFound", "has no revision 'main'"),
        (401, "", "refused the token"),
        (418, "", "answered 418"),
    ] {
        let server = Server::start(move |_, _| reply(status, &[("x-error-code", code)], "")).await;
        let error = server.client().resolve(&repo()).await.expect_err(code);
        let message = error.to_string();
        assert!(
            message.contains(says) && !message.contains('\n'),
            "{code}: {message}"
        );
        assert!(!format!("{error:?}").contains(TOKEN));
    }
    let server = Server::start(|_, _| reply(404, &[("x-error-code", "EntryNotFound")], "")).await;
    let (repo, file) = resolved("a", &content(9));
    let error = all(server.client().read(&repo, &file, 0..9))
        .await
        .expect_err("no such file");
    assert!(
        matches!(&error, Error::EntryNotFound { path, .. } if path == "a"),
        "{error}"
    );
}

#[tokio::test]
async fn offline_means_no_call() {
    let server = Server::start(|_, _| reply(500, &[], "")).await;
    let config = HubConfig {
        endpoint: server.url(),
        offline: true,
        ..HubConfig::default()
    };
    let error = HubClient::new(config)
        .expect("good")
        .resolve(&repo())
        .await
        .expect_err("offline");
    assert!(matches!(error, Error::Offline { .. }), "{error}");
    assert!(server.asked().is_empty());
}

/// A large file goes into a stage by several requests, through breaks, and its hash is checked.
#[tokio::test]
async fn a_large_file_is_imported_in_pieces() {
    let whole = content(40 << 20);
    let server = Server::start({
        let whole = whole.clone();
        move |asked, before| Reply {
            cut: (before == 1).then_some(1000),
            ..ranged(asked, &whole, "\"v1\"")
        }
    })
    .await;
    let (repo, file) = resolved("model.safetensors", &whole);
    let store = Store::memory();
    let id = StageId::models("owner/data").expect("a name");
    let opened = open_stage(&store, &id, "import-model", &repo.sha)
        .await
        .expect("open");
    let Opened::Open(stage) = opened else {
        panic!("a new store has no finished stage")
    };

    let writer = stage.object_writer(&file.path).expect("a name");
    let (body, cancel) = (server.client().read_all(&repo, &file), CancelToken::new());
    let mut heard = 0;
    let entry = fetch::copy(body, writer, file.lfs_sha256.as_deref(), &cancel, |bytes| {
        heard += bytes;
    })
    .await
    .expect("copied");
    assert_eq!((heard, server.asked().len()), (whole.len() as u64, 6));
    let draft = ManifestDraft {
        objects: vec![entry.clone()],
        ..ManifestDraft::default()
    };
    let finished = stage.commit(draft).await.expect("commit");
    assert!(finished.read(&entry).await.expect("read") == whole);
}
