//! Opening `s3://` stores: AWS, Tigris, MinIO, Garage, any endpoint.

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};

use crate::cloud::{Place, client, is_loopback, retry};
use crate::patience::Patience;
use crate::{Result, Store};

pub(crate) fn open(
    url: &str,
    rest: &str,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Store> {
    let place = Place::parse(url, rest, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")?;
    crate::tls::install();
    let (builder, allow_http) = configure(AmazonS3Builder::new(), env);
    let built = builder
        .with_bucket_name(place.bucket)
        .with_client_options(client(allow_http))
        .with_http_connector(Patience::default())
        .with_retry(retry())
        .build();
    place.open(built, "AWS_REGION, AWS_ENDPOINT_URL_S3 and the credentials")
}

/// Takes every `AWS_*` variable that names a setting; says whether plain HTTP is allowed.
fn configure(
    mut builder: AmazonS3Builder,
    env: impl IntoIterator<Item = (String, String)>,
) -> (AmazonS3Builder, bool) {
    let mut allow_http = false;
    for (key, value) in env {
        if !key.starts_with("AWS_") || value.is_empty() {
            continue;
        }
        if key == "AWS_ALLOW_HTTP" {
            allow_http |= value.eq_ignore_ascii_case("true") || value == "1";
        } else if let Ok(setting) = key.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
            if matches!(
                setting,
                AmazonS3ConfigKey::Endpoint | AmazonS3ConfigKey::S3Endpoint
            ) {
                allow_http |= is_loopback(&value);
            }
            if !matches!(setting, AmazonS3ConfigKey::Client(_)) {
                builder = builder.with_config(setting, value);
            }
        }
    }
    (builder, allow_http)
}
