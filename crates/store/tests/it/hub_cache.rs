//! The cache of `huggingface_hub`, read instead of the network.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::TryStreamExt;
use serde_json::json;
use updraft_store::hub::{HubClient, HubConfig, RepoRef, ResolvedRepo};
use updraft_store::{Error, sha256_hex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Git's name of `{}`.
const OID: &str = "9e26dfeeb6e641a33dae4961196235bdb965b21b";

/// Lays a file into the cache as `huggingface_hub` does: a blob, and a link to it.
fn put(repo: &Path, path: &str, id: &str, bytes: &[u8]) {
    let blob = repo.join("blobs").join(id);
    let link = repo.join("snapshots").join(COMMIT).join(path);
    for file in [&blob, &link] {
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("made");
    }
    std::fs::write(&blob, bytes).expect("written");
    #[cfg(unix)]
    std::os::unix::fs::symlink(&blob, &link).expect("linked");
    #[cfg(not(unix))]
    std::fs::copy(&blob, &link).expect("copied");
}

/// `owner/toy` with a small file, a large one, and nothing else.
fn cache() -> (tempfile::TempDir, PathBuf) {
    let cache = tempfile::tempdir().expect("a folder");
    let repo = cache.path().join("models--owner--toy");
    put(&repo, "config.json", OID, b"{}");
    let weights = vec![7; 3 << 20];
    put(
        &repo,
        "sub/model.safetensors",
        &sha256_hex(&weights),
        &weights,
    );
    std::fs::create_dir(repo.join("refs")).expect("made");
    std::fs::write(repo.join("refs/main"), COMMIT).expect("written");
    (cache, repo)
}

/// A client to whom no server will ever answer, and who takes what is there.
fn offline(cache: &Path) -> HubClient {
    offline_with(cache, true)
}

fn offline_with(cache: &Path, partial_cache: bool) -> HubClient {
    let config = HubConfig {
        endpoint: "http://127.0.0.1:9".to_owned(),
        offline: true,
        cache: Some(cache.to_owned()),
        partial_cache,
        ..HubConfig::default()
    };
    HubClient::new(config).expect("a client")
}

async fn read(client: &HubClient, repo: &ResolvedRepo, path: &str) -> Result<Vec<u8>, Error> {
    let file = repo
        .files
        .iter()
        .find(|file| file.path == path)
        .expect("listed");
    let bytes: Vec<Bytes> = client.read_all(repo, file).try_collect().await?;
    Ok(bytes.concat())
}

#[tokio::test]
async fn offline_a_repository_is_what_was_fetched() {
    let (cache, repo) = cache();
    let client = offline(cache.path());
    for revision in ["main", COMMIT] {
        let toy = RepoRef::model("owner/toy").expect("a name").at(revision);
        let found = client.resolve(&toy).await.expect("cached");
        let paths: Vec<&str> = found.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(
            (found.sha.as_str(), &paths[..]),
            (COMMIT, &["config.json", "sub/model.safetensors"][..])
        );
        assert_eq!(
            read(&client, &found, "config.json").await.expect("cached"),
            b"{}"
        );
        let weights = read(&client, &found, "sub/model.safetensors")
            .await
            .expect("cached");
        assert!(weights == vec![7; 3 << 20]);
        let file = &found.files[1];
        assert_eq!(file.content_id(), sha256_hex(&weights));
        let middle: Vec<Bytes> = client
            .read(&found, file, 5..9)
            .try_collect()
            .await
            .expect("cached");
        assert_eq!(middle.concat(), [7; 4]);
    }

    // A listing knows of files that were not fetched: reading one needs the network.
    let files = json!({
        "config.json": { "size": 2, "blob_id": OID },
        "b.json": { "size": 5, "blob_id": "b".repeat(40) },
    });
    std::fs::create_dir(repo.join("trees")).expect("made");
    let tree = json!({ "format_version": 1, "files": files }).to_string();
    std::fs::write(repo.join("trees").join(format!("{COMMIT}.json")), tree).expect("written");
    let found = client
        .resolve(&RepoRef::model("owner/toy").expect("a name"))
        .await
        .expect("cached");
    assert_eq!(found.files.len(), 2);
    assert_eq!(
        read(&client, &found, "config.json").await.expect("cached"),
        b"{}"
    );
    let error = read(&client, &found, "b.json")
        .await
        .expect_err("not cached");
    assert!(matches!(error, Error::Offline { .. }), "{error}");
}

/// Without a listing nobody knows what is missing: a set of a hundred shards of which one was
/// fetched would be a set of one.
#[tokio::test]
async fn files_without_a_listing_are_refused_unless_asked_for() {
    let (cache, _) = cache();
    let client = offline_with(cache.path(), false);
    let toy = RepoRef::model("owner/toy").expect("a name");
    let error = client.resolve(&toy).await.expect_err("no listing");
    assert!(matches!(error, Error::PartlyCached { .. }), "{error}");
    assert!(error.to_string().contains("UPDRAFT_PARTIAL_CACHE=1"));
}

#[tokio::test]
async fn what_the_cache_lacks_is_offline() {
    let (cache, _) = cache();
    let client = offline(cache.path());
    for repo in [
        RepoRef::model("owner/other").expect("a name"),
        RepoRef::dataset("owner/toy").expect("a name"),
        RepoRef::model("owner/toy").expect("a name").at("v2"),
        RepoRef::model("owner/toy")
            .expect("a name")
            .at("../../main"),
    ] {
        let error = client.resolve(&repo).await.expect_err("not cached");
        assert!(matches!(error, Error::Offline { .. }), "{repo}: {error}");
    }
}

/// Half of a file, or another version of it, is not taken for the file.
#[tokio::test]
async fn a_file_of_another_size_or_content_is_not_taken() {
    let (cache, repo) = cache();
    let client = offline(cache.path());
    let found = client
        .resolve(&RepoRef::model("owner/toy").expect("a name"))
        .await
        .expect("cached");
    let mut longer = found.clone();
    longer.files[0].size = 3;
    assert!(read(&client, &longer, "config.json").await.is_err());
    #[cfg(unix)]
    {
        let mut other = found.clone();
        other.files[0].oid = "c".repeat(40);
        assert!(read(&client, &other, "config.json").await.is_err());
    }
    std::fs::write(repo.join("blobs").join(OID), "{ }").expect("written");
    assert!(read(&client, &found, "config.json").await.is_err());
}
