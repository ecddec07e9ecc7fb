//! What every store behind HTTP has: a bucket and a prefix, and the patience to try again.

use std::sync::Arc;
use std::time::Duration;

use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use crate::url::invalid;
use crate::{Error, Result, Store};

/// Longer than one request may take, or none that ran out of time would be tried again.
const RETRY_TIMEOUT: Duration = Duration::from_secs(1800);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A URL's bucket and the prefix in it.
pub(crate) struct Place<'a> {
    pub(crate) bucket: &'a str,
    url: &'a str,
    prefix: Path,
}

impl<'a> Place<'a> {
    /// Splits `bucket/prefix`; `credentials` says where those belong that a URL must not hold.
    pub(crate) fn parse(url: &'a str, rest: &'a str, credentials: &str) -> Result<Self> {
        if rest.contains('@') {
            let reason = format!("credentials belong in {credentials}, not in the URL");
            return Err(invalid(url, reason));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
        if bucket.is_empty() {
            let reason = format!("the bucket is missing; write {scheme}://bucket/prefix");
            return Err(invalid(url, reason));
        }
        let prefix = Path::parse(prefix.trim_matches('/')).map_err(|_| {
            let reason =
                format!("the prefix has an empty or relative part; write {scheme}://bucket/prefix");
            invalid(url, reason)
        })?;
        Ok(Self {
            bucket,
            url,
            prefix,
        })
    }

    /// The store, or why its settings do not fit together: `hint` names those to check.
    pub(crate) fn open<S: ObjectStore>(
        self,
        built: object_store::Result<S>,
        hint: &str,
    ) -> Result<Store> {
        let store = built.map_err(|error| match error {
            object_store::Error::Generic { .. } => invalid(
                self.url,
                format!("the settings do not fit together; check {hint}"),
            ),
            other => Error::from_store(self.url.to_owned(), other),
        })?;
        let scheme = self.url.split_once("://").map_or("", |(scheme, _)| scheme);
        let bucket = format!("{scheme}://{}", self.bucket);
        if self.prefix.as_ref().is_empty() {
            return Ok(Store::from_object_store(Arc::new(store), bucket));
        }
        let url = format!("{bucket}/{}", self.prefix);
        Ok(Store::from_object_store(
            Arc::new(PrefixStore::new(store, self.prefix)),
            url,
        ))
    }
}

/// A deadline on connecting; [`Patience`](crate::patience::Patience) has the others.
pub(crate) fn client(allow_http: bool) -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_allow_http(allow_http)
}

/// Patient with a busy store (about half a minute of waiting), short with an absent one.
pub(crate) fn retry() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(10),
            base: 2.0,
        },
        max_retries: 7,
        retry_timeout: RETRY_TIMEOUT,
    }
}

/// Only an endpoint on this machine may be asked in the clear.
#[cfg(any(feature = "s3", feature = "az"))]
pub(crate) fn is_loopback(endpoint: &str) -> bool {
    ::url::Url::parse(endpoint).is_ok_and(|url| match url.host() {
        Some(::url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(::url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(::url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    })
}

#[cfg(all(test, feature = "s3"))]
mod tests {
    use super::*;

    /// A whole shard in one request.
    const PUT_BYTES: u64 = 64 << 20;

    #[test]
    fn a_request_that_ran_out_of_time_is_tried_again() {
        let patience = crate::patience::Patience::default();
        let sending = Duration::from_secs(PUT_BYTES / patience.slowest_upload);
        assert!(retry().retry_timeout > patience.request + sending);
    }

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
