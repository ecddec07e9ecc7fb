//! A store on an S3 server, if one is given.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use object_store::aws::AmazonS3Builder;
use object_store::path::Path;
use object_store::signer::Signer;
use updraft_store::Store;

const BUCKET: &str = "updraft-test";

/// An empty store on the server that `UPDRAFT_TEST_S3_ENDPOINT` names, in a bucket made if absent;
/// without it, says why the test is skipped.
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
pub(crate) async fn s3_store(prefix: &str) -> Option<Store> {
    let Ok(endpoint) = std::env::var("UPDRAFT_TEST_S3_ENDPOINT") else {
        eprintln!(
            "skipped: set UPDRAFT_TEST_S3_ENDPOINT to an S3 server, such as moto's, to run this"
        );
        return None;
    };
    static STORES: AtomicU32 = AtomicU32::new(0);
    let number = STORES.fetch_add(1, Ordering::Relaxed);
    let started = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("after 1970");
    let url = format!("s3://{BUCKET}/{prefix}/{}-{number}", started.as_nanos());
    let env = [
        ("AWS_ENDPOINT_URL_S3", endpoint.as_str()),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "test-key"),
        ("AWS_SECRET_ACCESS_KEY", "test-secret"),
    ];
    let store = Store::open_with(&url, env.map(|(k, v)| (k.to_owned(), v.to_owned())))
        .expect("settings fit"); // also installs the TLS provider
    if number == 0 {
        make_bucket(&endpoint).await;
    } else {
        // The first test makes the bucket; the others wait until it is there.
        while store.put("ready", "".into()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        store.delete("ready").await.expect("just put");
    }
    Some(store)
}

/// `PUT /bucket`, signed.
async fn make_bucket(endpoint: &str) {
    let signer = AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_access_key_id("test-key")
        .with_secret_access_key("test-secret")
        .with_bucket_name(BUCKET)
        .build()
        .expect("settings fit");
    let lifetime = Duration::from_secs(60);
    let url = signer
        .signed_url("PUT".parse().expect("a method"), &Path::default(), lifetime)
        .await;
    let answer = reqwest::Client::new()
        .put(url.expect("signed"))
        .send()
        .await
        .expect("an answer");
    // 409: the bucket is there from an earlier run.
    assert!(
        answer.status().is_success() || answer.status() == 409,
        "{answer:?}"
    );
}
