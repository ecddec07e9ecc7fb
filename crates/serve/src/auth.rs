//! Bearer keys, compared in constant time.

use std::fmt;

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::api::error::ApiError;
use crate::app::App;

/// The keys that open the API, kept only as SHA-256 digests. None opens it to everybody.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl ApiKeys {
    /// The digests of these keys; empty ones are left out.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Self {
        let keys = keys.into_iter();
        Self(
            keys.filter(|key| !key.as_ref().is_empty())
                .map(|key| digest(key.as_ref()))
                .collect(),
        )
    }

    /// Whether everybody may enter.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this is one of the keys. Takes as long whichever it is, or none.
    #[must_use]
    pub fn admit(&self, key: &str) -> bool {
        let candidate = digest(key);
        let any = self
            .0
            .iter()
            .fold(Choice::from(0), |any, key| any | key.ct_eq(&candidate));
        any.into()
    }
}

/// Who asks: the key, as its digest; everybody is the same where no key is needed.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Owner([u8; 32]);

impl Owner {
    pub(crate) fn of(key: &str) -> Self {
        Self(digest(key))
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Owner")
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({} keys)", self.0.len())
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// Lets a request through if it carries one of the keys.
pub(crate) async fn require_key(
    State(app): State<App>,
    mut request: Request,
    next: Next,
) -> Response {
    let keys = &app.options.api_keys;
    let owner = match bearer(&request) {
        _ if keys.is_open() => Owner::default(),
        Some(key) if keys.admit(key) => Owner::of(key),
        _ => return ApiError::unauthorized().into_response(),
    };
    request.extensions_mut().insert(owner);
    next.run(request).await
}

fn bearer(request: &Request) -> Option<&str> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_of_several_keys_opens() {
        let keys = ApiKeys::new(["one", "", "two"]);
        assert!(keys.admit("one") && keys.admit("two"));
        assert!(!keys.admit("three") && !keys.admit(""));
        assert!(ApiKeys::new([""]).is_open());
    }

    #[test]
    fn debug_shows_no_key() {
        assert_eq!(format!("{:?}", ApiKeys::new(["secret"])), "ApiKeys(1 keys)");
    }
}
