//! Opening `s3://` stores: AWS, Tigris, MinIO, Garage, any endpoint.

#[cfg(feature = "s3")]
pub(crate) use with_feature::open;

#[cfg(not(feature = "s3"))]
pub(crate) fn open(
    url: &str,
    _rest: &str,
    _env: impl IntoIterator<Item = (String, String)>,
) -> crate::Result<crate::Store> {
    Err(crate::url::invalid(
        url,
        "this build has no S3 stores; enable the feature `s3`",
    ))
}

#[cfg(feature = "s3")]
mod with_feature {
    use std::sync::Arc;
    use std::time::Duration;

    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
    use object_store::path::Path;
    use object_store::prefix::PrefixStore;
    use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

    use crate::url::invalid;
    use crate::{Error, Result, Store};

    /// How long one request may take, body included: 128 MiB at less than half a MiB/s.
    const REQUEST_TIMEOUT: Duration = Duration::from_secs(300);
    /// How long a connection may stay silent.
    const READ_TIMEOUT: Duration = Duration::from_secs(60);
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

    pub(crate) fn open(
        url: &str,
        rest: &str,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Store> {
        if rest.contains('@') {
            return Err(invalid(
                url,
                "credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, not in the URL",
            ));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(invalid(
                url,
                "the bucket is missing; write s3://bucket/prefix",
            ));
        }
        let prefix = Path::parse(prefix.trim_matches('/')).map_err(|_| {
            invalid(
                url,
                "the prefix has an empty or relative part; write s3://bucket/prefix",
            )
        })?;
        crate::tls::install();

        let (mut builder, allow_http) = configure(AmazonS3Builder::new(), env);
        let client = ClientOptions::new()
            .with_timeout(REQUEST_TIMEOUT)
            .with_read_timeout(READ_TIMEOUT)
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_allow_http(allow_http);
        builder = builder
            .with_bucket_name(bucket)
            .with_client_options(client)
            .with_retry(retry());
        let s3 = builder.build().map_err(|error| match error {
            object_store::Error::Generic { .. } => invalid(
                url,
                "the AWS_* settings do not fit together; check AWS_REGION, AWS_ENDPOINT_URL_S3 and the credentials",
            ),
            other => Error::from_store(url.to_owned(), other),
        })?;
        let shown = if prefix.as_ref().is_empty() {
            format!("s3://{bucket}")
        } else {
            format!("s3://{bucket}/{prefix}")
        };
        let inner: Arc<dyn ObjectStore> = if prefix.as_ref().is_empty() {
            Arc::new(s3)
        } else {
            Arc::new(PrefixStore::new(s3, prefix))
        };
        Ok(Store::from_object_store(inner, shown))
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

    fn is_loopback(endpoint: &str) -> bool {
        ::url::Url::parse(endpoint).is_ok_and(|url| match url.host() {
            Some(::url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            Some(::url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(::url::Host::Ipv6(ip)) => ip.is_loopback(),
            None => false,
        })
    }

    /// Patient with a busy store (about half a minute), short with an absent one.
    fn retry() -> RetryConfig {
        RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(200),
                max_backoff: Duration::from_secs(10),
                base: 2.0,
            },
            max_retries: 7,
            retry_timeout: Duration::from_secs(60),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn only_loopback_endpoints_may_be_plain_http() {
            for endpoint in [
                "http://127.0.0.1:9000",
                "http://localhost:1",
                "http://[::1]:9000",
            ] {
                assert!(is_loopback(endpoint), "{endpoint}");
            }
            for endpoint in [
                "http://10.0.0.1:9000",
                "http://localhost.example.com",
                "nonsense",
            ] {
                assert!(!is_loopback(endpoint), "{endpoint}");
            }
        }
    }
}
