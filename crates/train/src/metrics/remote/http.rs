//! Requests to a tracking server: JSON there and back, credentials to the server alone.

use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, LOCATION};
use reqwest::{Client, Method, RequestBuilder, StatusCode, Url, redirect};
use serde_json::Value;

use super::secret::Secret;
use crate::{Error, Result};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request brought nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// The server cannot be reached, is busy or is broken; later it may work. It may have done what
    /// was asked all the same.
    #[error("{0}")]
    Down(String),
    /// The server says no, and will say it again.
    #[error("{status}: {message}{}", in_brackets(code))]
    Refused {
        /// The HTTP status.
        status: u16,
        /// MLflow's `error_code`, such as `RESOURCE_DOES_NOT_EXIST`; else empty.
        code: String,
        message: String,
    },
}

fn in_brackets(code: &str) -> String {
    match code {
        "" => String::new(),
        code => format!(" ({code})"),
    }
}

/// How a client says who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    #[cfg(feature = "mlflow")]
    None,
    #[cfg(feature = "mlflow")]
    Bearer(Secret),
    Basic {
        user: String,
        password: Secret,
    },
}

/// A client of one server.
#[derive(Debug)]
pub(super) struct Server {
    http: Client,
    base: Url,
    credentials: Credentials,
}

impl Server {
    /// A client of the server at `address`, which was set by the variable `field`.
    pub(super) fn new(
        address: &str,
        field: &'static str,
        credentials: Credentials,
    ) -> Result<Self> {
        let invalid = |expected| Error::Config {
            field,
            // An address may hold a password.
            value: "an address".to_owned(),
            expected,
        };
        let base = Url::parse(address)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some())
            .ok_or_else(|| invalid("it must be like https://host"))?;
        if !base.username().is_empty() || base.password().is_some() {
            return Err(invalid("credentials must not be part of it"));
        }
        install_tls();
        let http = Client::builder()
            .user_agent(concat!("updraft/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(|error| Error::Thread(error.into()))?;
        Ok(Self {
            http,
            base,
            credentials,
        })
    }

    /// The server's address.
    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// Fetches JSON from a path below the server's address.
    #[cfg(feature = "mlflow")]
    pub(super) async fn get(
        &self,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Value, Failure> {
        let mut url = self.url(path);
        url.query_pairs_mut().extend_pairs(query);
        self.send(self.http.request(Method::GET, url)).await
    }

    /// Sends JSON to a path below the server's address.
    pub(super) async fn post(&self, path: &[&str], body: &Value) -> Result<Value, Failure> {
        let body = serde_json::to_vec(body).expect("JSON values serialize");
        let request = self.http.request(Method::POST, self.url(path));
        let request = request.header(CONTENT_TYPE, "application/json").body(body);
        self.send(request).await
    }

    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        url.path_segments_mut()
            .expect("http and https URLs have a path")
            .pop_if_empty()
            .extend(path);
        url
    }

    async fn send(&self, request: RequestBuilder) -> Result<Value, Failure> {
        let request = match &self.credentials {
            #[cfg(feature = "mlflow")]
            Credentials::None => request,
            #[cfg(feature = "mlflow")]
            Credentials::Bearer(token) => request.bearer_auth(token.expose()),
            Credentials::Basic { user, password } => {
                request.basic_auth(user, Some(password.expose()))
            }
        };
        let down = |error: reqwest::Error| Failure::Down(chain(&error.without_url()));
        let answer = request.send().await.map_err(down)?;
        let status = answer.status();
        let location = answer.headers().get(LOCATION);
        let moved = location.map(|to| String::from_utf8_lossy(to.as_bytes()).into_owned());
        let body = answer.bytes().await.map_err(down)?;
        judge(status, moved, &body)
    }
}

fn judge(status: StatusCode, moved: Option<String>, body: &[u8]) -> Result<Value, Failure> {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let refused = |message: String, code: &str| Failure::Refused {
        status: status.as_u16(),
        code: code.to_owned(),
        message,
    };
    if status.is_success() {
        let not_json = || refused("the answer is not JSON: is this the server?".to_owned(), "");
        return json.ok_or_else(not_json);
    }
    if status.is_redirection() {
        // Following would hand the credentials to another host.
        let host = moved.and_then(|to| Some(Url::parse(&to).ok()?.host_str()?.to_owned()));
        let host = host.as_deref().unwrap_or("another address");
        return Err(refused(
            format!("it redirects to {host}: give that address"),
            "",
        ));
    }
    let text = |name: &str| json.as_ref().and_then(|json| json[name].as_str());
    let later = [
        StatusCode::REQUEST_TIMEOUT,
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::TOO_EARLY,
    ];
    if status.is_server_error() || later.contains(&status) {
        return Err(Failure::Down(format!("the server answers {status}")));
    }
    let message = text("message").or_else(|| text("error"));
    let message = message
        .unwrap_or("no reason given")
        .chars()
        .take(200)
        .collect();
    Err(refused(message, text("error_code").unwrap_or_default()))
}

/// An error with its sources, as a sender's one line.
fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| {
        format!("{text}: {source}")
    })
}

/// Makes ring the process's TLS provider unless the application has chosen one already.
fn install_tls() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Losing a race means that somebody else has just installed one: as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, body: &str) -> Option<String> {
        let status = StatusCode::from_u16(status).expect("a status");
        let moved = Some("https://elsewhere.example/?key=1".to_owned());
        match judge(status, moved, body.as_bytes()) {
            Err(failure @ Failure::Refused { .. }) => Some(failure.to_string()),
            _ => None,
        }
    }

    #[test]
    fn what_may_work_later_is_told_from_what_will_not() {
        for later in [408, 425, 429, 500, 502, 503, 504] {
            assert_eq!(refused(later, "{}"), None, "{later}");
        }
        assert_eq!(refused(200, "{}"), None);
        let message = refused(200, "<html>").expect("no JSON");
        assert!(message.contains("is not JSON"), "{message}");
        let body = r#"{"message": "no access", "error_code": "PERMISSION_DENIED"}"#;
        let message = refused(403, body).expect("refused");
        assert_eq!(message, "403: no access (PERMISSION_DENIED)");
        let message = refused(302, "").expect("not followed");
        assert_eq!(
            message,
            "302: it redirects to elsewhere.example: give that address"
        );
    }

    #[test]
    fn an_address_must_be_one_and_hold_no_password() {
        for (address, expected) in [
            ("wandb.ai", "https://host"),
            ("file:///tmp", "https://host"),
            ("https://me:secret@host", "must not be part"),
        ] {
            let error = Server::new(address, "MLFLOW_TRACKING_URI", Credentials::None);
            let error = error.expect_err(address).to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
