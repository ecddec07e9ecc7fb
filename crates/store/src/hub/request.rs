//! What to do about an answer: take it, follow it, wait, or fail. Pure decisions.

use std::time::Duration;

use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{StatusCode, Url};

use super::repo::RepoRef;
use crate::{BoxError, Error, Result};

/// How often a server error or a lost connection is tried again.
const TRIES: u32 = 5;

/// What was asked for, to name it in messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) repo: &'a RepoRef,
    pub(crate) path: Option<&'a str>,
    /// The address asked first: never a signed one.
    pub(crate) url: &'a Url,
    pub(crate) has_token: bool,
}

/// What to do before the answer is had.
#[derive(Debug)]
pub(crate) enum Detour {
    /// The answer is elsewhere.
    Follow(Url),
    /// Ask again after `wait`; fail with `otherwise` if the deadline does not allow that.
    Wait {
        /// How long.
        wait: Duration,
        /// Why.
        otherwise: Error,
    },
}

/// Decides about an answer; `None` if it is good. `failed` counts the failures before this one.
pub(crate) fn decide(
    status: StatusCode,
    headers: &HeaderMap,
    asked: &Url,
    failed: u32,
    subject: Subject<'_>,
) -> Result<Option<Detour>> {
    if status.is_redirection() {
        return follow(headers, asked, subject).map(Some);
    }
    // 416 is an answer to a range: the caller knows what it means.
    if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
        return Ok(None);
    }
    let wait = asked_to_wait(headers).unwrap_or_else(|| backoff(failed));
    if status == StatusCode::TOO_MANY_REQUESTS {
        let (url, wait_seconds) = (subject.url.to_string(), wait.as_secs());
        return Ok(Some(Detour::Wait {
            wait,
            otherwise: Error::RateLimited { url, wait_seconds },
        }));
    }
    if status.is_server_error() && failed < TRIES {
        let otherwise = unexpected(subject, &status.to_string());
        return Ok(Some(Detour::Wait { wait, otherwise }));
    }
    Err(refusal(status, headers, subject))
}

/// Decides about a connection that failed, or that no answer came by in time.
pub(crate) fn reconnect(
    error: impl Into<BoxError>,
    failed: u32,
    subject: Subject<'_>,
) -> Result<Detour> {
    let otherwise = unreachable(subject.url, error);
    if failed < TRIES {
        Ok(Detour::Wait {
            wait: backoff(failed),
            otherwise,
        })
    } else {
        Err(otherwise)
    }
}

pub(crate) fn unreachable(url: &Url, error: impl Into<BoxError>) -> Error {
    Error::Unreachable {
        url: url.to_string(),
        source: error.into(),
    }
}

fn follow(headers: &HeaderMap, asked: &Url, subject: Subject<'_>) -> Result<Detour> {
    let target = headers
        .get(LOCATION)
        .and_then(|location| location.to_str().ok())
        .and_then(|location| asked.join(location).ok());
    match target {
        Some(target) if asked.scheme() == "https" && target.scheme() != "https" => {
            Err(unexpected(subject, "a redirect away from https"))
        }
        Some(target) => Ok(Detour::Follow(target)),
        None => Err(unexpected(subject, "a redirect to nowhere")),
    }
}

/// Why the Hub said no.
fn refusal(status: StatusCode, headers: &HeaderMap, subject: Subject<'_>) -> Error {
    let repo = subject.repo.to_string();
    let entry = |path: &str| Error::EntryNotFound {
        repo: repo.clone(),
        path: path.to_owned(),
    };
    match (header(headers, "x-error-code"), status) {
        (Some("GatedRepo"), _) => Error::Gated { repo },
        (Some("RepoNotFound"), _) => Error::RepoNotFound { repo },
        (Some("RevisionNotFound"), _) => Error::RevisionNotFound {
            repo,
            revision: subject.repo.revision().to_owned(),
        },
        (Some("EntryNotFound"), _) => entry(subject.path.unwrap_or("")),
        (_, StatusCode::UNAUTHORIZED) if subject.has_token => Error::Unauthenticated {
            url: subject.url.to_string(),
        },
        (_, StatusCode::UNAUTHORIZED) => Error::RepoNotFound { repo },
        (_, StatusCode::NOT_FOUND) => match subject.path {
            Some(path) => entry(path),
            None => Error::RepoNotFound { repo },
        },
        _ => unexpected(subject, &status.to_string()),
    }
}

pub(crate) fn unexpected(subject: Subject<'_>, answer: &str) -> Error {
    Error::UnexpectedAnswer {
        url: subject.url.to_string(),
        answer: answer.to_owned(),
    }
}

/// What `RateLimit: "api";r=0;t=55` or `Retry-After: 55` asks for.
fn asked_to_wait(headers: &HeaderMap) -> Option<Duration> {
    let window = header(headers, "ratelimit").and_then(|limit| {
        limit
            .split(';')
            .find_map(|part| part.trim().strip_prefix("t="))
    });
    let retry_after = headers
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok());
    let seconds = window.or(retry_after)?.trim().parse().ok()?;
    // No seconds at all say nothing: asking again at once would be a loop without pause.
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

fn backoff(failed: u32) -> Duration {
    Duration::from_millis(250) * 2u32.pow(failed.min(6))
}

/// The address of the next page: `<https://…>; rel="next"`.
pub(crate) fn next_page(headers: &HeaderMap, asked: &Url) -> Option<Url> {
    headers
        .get_all("link")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .find_map(|links| {
            links.split(',').find_map(|link| {
                let (address, attributes) = link.trim().strip_prefix('<')?.split_once('>')?;
                let is_next = attributes
                    .split(';')
                    .any(|attribute| matches!(attribute.trim(), "rel=\"next\"" | "rel=next"));
                is_next.then(|| asked.join(address).ok())?
            })
        })
}

pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().expect("name"), value.parse().expect("value")))
            .collect()
    }

    fn step(status: u16, pairs: &[(&'static str, &str)], failed: u32) -> Result<Option<Detour>> {
        let url = Url::parse("https://hub.example/a/b").expect("url");
        let repo = RepoRef::model("o/m").expect("id");
        let subject = Subject {
            repo: &repo,
            path: Some("config.json"),
            url: &url,
            has_token: true,
        };
        decide(
            StatusCode::from_u16(status).expect("status"),
            &headers(pairs),
            &url,
            failed,
            subject,
        )
    }

    fn fails(status: u16, pairs: &[(&'static str, &str)]) -> Error {
        step(status, pairs, 0).expect_err("a refusal")
    }

    #[test]
    fn error_codes_have_their_own_errors() {
        let code = |code| [("x-error-code", code)];
        assert!(matches!(
            fails(403, &code("GatedRepo")),
            Error::Gated { .. }
        ));
        assert!(matches!(
            fails(401, &code("RepoNotFound")),
            Error::RepoNotFound { .. }
        ));
        assert!(matches!(
            fails(404, &code("RevisionNotFound")),
            Error::RevisionNotFound { .. }
        ));
        assert!(matches!(
            fails(404, &code("EntryNotFound")),
            Error::EntryNotFound { .. }
        ));
        assert!(matches!(fails(404, &[]), Error::EntryNotFound { .. }));
        assert!(matches!(fails(401, &[]), Error::Unauthenticated { .. }));
        assert!(matches!(fails(418, &[]), Error::UnexpectedAnswer { .. }));
    }

    #[test]
    fn a_busy_server_is_given_the_time_it_asks_for() {
        let waits = |pairs: &[(&'static str, &str)]| match step(429, pairs, 0) {
            Ok(Some(Detour::Wait {
                wait,
                otherwise: Error::RateLimited { .. },
            })) => wait.as_secs_f32(),
            other => panic!("{other:?}"),
        };
        assert_eq!(waits(&[("ratelimit", "\"api\";r=0;t=55")]), 55.0);
        assert_eq!(waits(&[("retry-after", "7")]), 7.0);
        assert_eq!(waits(&[("retry-after", "0")]), 0.25, "never at once");
        assert_eq!(
            waits(&[("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT")]),
            0.25
        );
    }

    #[test]
    fn server_errors_are_tried_a_few_times() {
        assert!(matches!(step(503, &[], 0), Ok(Some(Detour::Wait { .. }))));
        assert!(matches!(
            step(503, &[], TRIES),
            Err(Error::UnexpectedAnswer { .. })
        ));
    }

    #[test]
    fn a_redirect_may_not_leave_tls() {
        assert!(matches!(
            step(302, &[("location", "http://cdn.example/x")], 0),
            Err(Error::UnexpectedAnswer { .. })
        ));
        let Ok(Some(Detour::Follow(url))) = step(302, &[("location", "/c/d")], 0) else {
            panic!("a relative redirect")
        };
        assert_eq!(url.as_str(), "https://hub.example/c/d");
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        let url = Url::parse("https://hub.example/api/x").expect("url");
        let next = |link: &str| next_page(&headers(&[("link", link)]), &url).map(String::from);
        let both =
            "<https://hub.example/p>; rel=\"prev\", <https://hub.example/n?c=1>; rel=\"next\"";
        assert_eq!(next(both).as_deref(), Some("https://hub.example/n?c=1"));
        assert_eq!(next("</n>; rel=\"prev\""), None);
    }
}
