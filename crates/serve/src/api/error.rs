//! Errors as clients see them: a status and `{"error": {message, type, param, code}}`.

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::error::Error;

/// The longest message sent back, so that a request cannot be used to amplify traffic.
const MAX_MESSAGE_BYTES: usize = 1024;

/// One error answer.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    retry_after_seconds: Option<u64>,
    body: Body,
}

/// OpenAI's form. `code` is a string or null: typed clients fail on a number.
#[derive(Debug, Clone, Serialize)]
struct Body {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    /// What llama.cpp's clients read when a prompt is too long.
    #[serde(flatten)]
    excess: Option<Excess>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Excess {
    n_prompt_tokens: u32,
    n_ctx: u32,
}

#[derive(Debug, Serialize)]
struct Envelope<'a> {
    error: &'a Body,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: &str,
    ) -> Self {
        let message = shorten(message);
        Self {
            status,
            retry_after_seconds: None,
            body: Body {
                message,
                kind,
                param: None,
                code,
                excess: None,
            },
        }
    }

    /// 400, with the field at fault if it is known.
    pub(crate) fn invalid(message: &str, param: Option<String>) -> Self {
        let mut error = Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            None,
            message,
        );
        error.body.param = param.map(|param| shorten(&param));
        error
    }

    /// 401.
    pub(crate) fn unauthorized() -> Self {
        let message = "a valid API key is needed; send it as `Authorization: Bearer KEY`";
        let code = Some("invalid_api_key");
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            code,
            message,
        )
    }

    /// 404 for a path.
    pub(crate) fn no_such_path(path: &str) -> Self {
        let message = format!("there is no `{path}`; the API is under /v1");
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            None,
            &message,
        )
    }

    /// 404 for a response.
    pub(crate) fn no_such_response(id: &str) -> Self {
        let message = format!("there is no response `{id}`; they are kept for a while only");
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            None,
            &message,
        )
    }

    /// 405.
    pub(crate) fn no_such_method(method: &str) -> Self {
        let message = format!("{method} is not possible here");
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            None,
            &message,
        )
    }

    /// 413.
    pub(crate) fn too_large(max_body_bytes: usize) -> Self {
        let message = format!("the request body is larger than {max_body_bytes} bytes");
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            None,
            &message,
        )
    }

    /// 408.
    pub(crate) fn too_slow() -> Self {
        let message = "the request body did not arrive in time";
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            None,
            message,
        )
    }

    /// 415.
    pub(crate) fn not_json() -> Self {
        let message = "the request body must be JSON; send `Content-Type: application/json`";
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            None,
            message,
        )
    }

    /// What is wrong, in a sentence.
    pub(crate) fn message(&self) -> &str {
        &self.body.message
    }

    /// The body alone, for a stream that has already begun.
    pub(crate) fn to_json(&self) -> String {
        let envelope = Envelope { error: &self.body };
        serde_json::to_string(&envelope).expect("strings and options always serialize")
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::InvalidRequest { param, .. } => Self::invalid(&message, param),
            Error::ModelNotFound { .. } => {
                let mut error = Self::new(
                    StatusCode::NOT_FOUND,
                    "invalid_request_error",
                    Some("model_not_found"),
                    &message,
                );
                error.body.param = Some("model".into());
                error
            }
            Error::ContextLength {
                prompt_tokens,
                max_model_len,
                ..
            } => {
                let code = Some("context_length_exceeded");
                let kind = "invalid_request_error";
                let mut error = Self::new(StatusCode::BAD_REQUEST, kind, code, &message);
                error.body.excess = Some(Excess {
                    n_prompt_tokens: prompt_tokens,
                    n_ctx: max_model_len,
                });
                error
            }
            Error::Overloaded { retry_after } => {
                let seconds = retry_after.as_secs().max(1);
                let kind = "rate_limit_error";
                let code = Some("rate_limit_exceeded");
                Self {
                    retry_after_seconds: Some(seconds),
                    ..Self::new(StatusCode::TOO_MANY_REQUESTS, kind, code, &message)
                }
            }
            Error::Unavailable { .. } => Self {
                retry_after_seconds: Some(1),
                ..Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "server_error",
                    None,
                    &message,
                )
            },
            Error::Timeout => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                Some("timeout"),
                &message,
            ),
            other => {
                // The cause may name files of this machine: it is for the log alone.
                tracing::error!(error = &other as &dyn std::error::Error, "a request failed");
                Self::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "server_error",
                    None,
                    &message,
                )
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(Envelope { error: &self.body })).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::GATEWAY_TIMEOUT {
            // Clients repeat what failed by themselves; this would take as long again.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

fn shorten(message: &str) -> String {
    if message.len() <= MAX_MESSAGE_BYTES {
        return message.to_owned();
    }
    let fits = |(at, _): &(usize, char)| *at <= MAX_MESSAGE_BYTES;
    let end = message.char_indices().take_while(fits).last();
    format!("{}…", &message[..end.map_or(0, |(at, _)| at)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_a_string_or_null_and_messages_are_bounded() {
        let json = ApiError::from(Error::ModelNotFound {
            model: "é".repeat(5000),
        })
        .to_json();
        assert!(json.contains(r#""code":"model_not_found""#) && json.len() < 2 * MAX_MESSAGE_BYTES);
        let json = ApiError::invalid("no", None).to_json();
        let expected =
            r#"{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}"#;
        assert_eq!(json, expected);
    }
}
