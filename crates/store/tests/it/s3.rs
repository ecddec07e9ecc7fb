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
        ("AWS_ENDPOINT_URL_S3", endpoint.clone()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ]
    .into_iter()
    .chain(credentials())
    .map(|(key, value)| (key.to_owned(), value));
    let store = Store::open_with(&url, env).expect("settings fit"); // also installs the TLS provider
    make_bucket(&endpoint).await;
    Some(store)
}

/// Those of the environment, for a server that checks signatures, or any.
fn credentials() -> [(&'static str, String); 2] {
    ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"].map(|name| {
        (
            name,
            std::env::var(name).unwrap_or_else(|_| "test".to_owned()),
        )
    })
}

/// `PUT /bucket`, signed.
async fn make_bucket(endpoint: &str) {
    let [(_, id), (_, secret)] = credentials();
    let signer = AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_access_key_id(id)
        .with_secret_access_key(secret)
        .with_bucket_name(BUCKET)
        .build()
        .expect("settings fit");
    let lifetime = Duration::from_secs(60);
    let url = signer
        .signed_url("PUT".parse().expect("a method"), &Path::default(), lifetime)
        .await;
    let request = reqwest::Client::new()
        .put(url.expect("signed"))
        .header("content-length", "0");
    // Whatever it answers: where there is no bucket in the end, the tests will say so.
    request.send().await.expect("an answer");
}
