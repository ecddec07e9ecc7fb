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
    let Configured {
        builder,
        allow_http,
        is_tigris,
    } = configure(AmazonS3Builder::new(), env);
    let patience = Patience {
        header: is_tigris.then_some(TIGRIS_CONSISTENT),
        ..Patience::default()
    };
    let built = builder
        .with_bucket_name(place.bucket)
        .with_client_options(client(allow_http))
        .with_http_connector(patience)
        .with_retry(retry())
        .build();
    place.open(built, "AWS_REGION, AWS_ENDPOINT_URL_S3 and the credentials")
}

/// Makes Tigris answer from the region that takes an object's writes: a create-only write, and what
/// another region has just written, are seen there alone.
const TIGRIS_CONSISTENT: (&str, &str) = ("x-tigris-consistent", "true");

struct Configured {
    builder: AmazonS3Builder,
    /// Whether plain HTTP is allowed.
    allow_http: bool,
    is_tigris: bool,
}

/// Takes every `AWS_*` variable that names a setting.
fn configure(
    builder: AmazonS3Builder,
    env: impl IntoIterator<Item = (String, String)>,
) -> Configured {
    let mut configured = Configured {
        builder,
        allow_http: false,
        is_tigris: false,
    };
    for (key, value) in env {
        if !key.starts_with("AWS_") || value.is_empty() {
            continue;
        }
        if key == "AWS_ALLOW_HTTP" {
            configured.allow_http |= value.eq_ignore_ascii_case("true") || value == "1";
        } else if let Ok(setting) = key.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
            if matches!(
                setting,
                AmazonS3ConfigKey::Endpoint | AmazonS3ConfigKey::S3Endpoint
            ) {
                configured.allow_http |= is_loopback(&value);
                configured.is_tigris |= is_tigris(&value);
            }
            if !matches!(setting, AmazonS3ConfigKey::Client(_)) {
                configured.builder = configured.builder.with_config(setting, value);
            }
        }
    }
    configured
}

fn is_tigris(endpoint: &str) -> bool {
    let url = ::url::Url::parse(endpoint).ok();
    let host = url
        .as_ref()
        .and_then(::url::Url::host_str)
        .unwrap_or_default();
    ["storage.dev", "storageapi.dev", "tigris.dev"]
        .iter()
        .any(|domain| {
            host.strip_suffix(domain)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tigris_is_known_by_its_endpoint() {
        for (endpoint, expected) in [
            ("https://t3.storage.dev", true),
            ("https://fly.storage.tigris.dev", true),
            ("https://t3.storageapi.dev/", true),
            ("https://notstorage.dev", false),
            ("http://127.0.0.1:9000", false),
        ] {
            let env = [("AWS_ENDPOINT_URL_S3".to_owned(), endpoint.to_owned())];
            let configured = configure(AmazonS3Builder::new(), env);
            assert_eq!(configured.is_tigris, expected, "{endpoint}");
        }
    }
}
