//! Request bodies: read within the limit, parsed with the path of what is wrong.

use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::error::ApiError;
use crate::app::App;
use crate::error::{Error, Result};

/// A body that claims to be JSON. [`read`](JsonBody::read) it as often as needed.
#[derive(Debug)]
pub(crate) struct JsonBody(Bytes);

impl JsonBody {
    /// The same, as if one field were not there: it means something else to `T`.
    pub(crate) fn read_without<T: DeserializeOwned>(&self, field: &str) -> Result<T> {
        let mut fields: serde_json::Map<String, serde_json::Value> = self.read()?;
        fields.remove(field);
        let fields = serde_json::Value::Object(fields);
        serde_path_to_error::deserialize(fields).map_err(|error| Error::InvalidRequest {
            message: format!("the request body is not valid: {}", error.inner()),
            param: Some(error.path().to_string()),
        })
    }

    /// The fields that `T` knows; others are ignored.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T> {
        // A list would do for a struct, its fields in order: not what anybody means.
        if !self.0.trim_ascii_start().starts_with(b"{") {
            let message = "the request body must be a JSON object";
            return Err(Error::InvalidRequest {
                message: message.to_owned(),
                param: None,
            });
        }
        let mut deserializer = serde_json::Deserializer::from_slice(&self.0);
        let refuse = |error: &serde_json::Error, param| {
            let message = format!("the request body is not valid: {error}");
            Error::InvalidRequest { message, param }
        };
        let value: T = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
            let path = error.path().to_string();
            refuse(error.inner(), (path != ".").then_some(path))
        })?;
        deserializer.end().map_err(|error| refuse(&error, None))?;
        Ok(value)
    }
}

impl FromRequest<App> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let content_type = request.headers().get(CONTENT_TYPE);
        let content_type = content_type.and_then(|value| value.to_str().ok());
        if !content_type.is_some_and(is_json) {
            return Err(ApiError::not_json());
        }
        let body = Bytes::from_request(request, app);
        let Ok(body) = tokio::time::timeout(app.options.read_timeout, body).await else {
            return Err(ApiError::too_slow());
        };
        body.map(Self)
            .map_err(|rejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(app.options.max_body_bytes),
                _ => ApiError::invalid("the request body could not be read", None),
            })
    }
}

fn is_json(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    media_type.eq_ignore_ascii_case("application/json")
        || (media_type.starts_with("application/") && media_type.ends_with("+json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_by_any_of_its_names() {
        assert!(is_json("application/json"));
        assert!(is_json("Application/JSON; charset=utf-8"));
        assert!(is_json("application/vnd.api+json"));
        assert!(!is_json("text/plain") && !is_json(""));
    }

    #[test]
    fn the_path_of_what_is_wrong_is_given() {
        #[derive(Debug, serde::Deserialize)]
        struct Fields {
            #[expect(dead_code, reason = "only parsed")]
            list: Vec<u32>,
        }
        let error = JsonBody(Bytes::from_static(b"{\"list\": [1, \"x\"]}")).read::<Fields>();
        let error = ApiError::from(error.expect_err("a string is no number")).to_json();
        assert!(error.contains(r#""param":"list[1]""#), "{error}");
        assert!(
            JsonBody(Bytes::from_static(b"[[1]]"))
                .read::<Fields>()
                .is_err(),
            "not an object"
        );
    }
}
