//! Request bodies: read within the limit, parsed with the path of what is wrong.

use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;
use super::weighed::KeptFields;
use crate::app::App;
use crate::error::{Error, Result};

/// A body that claims to be JSON. [`read`](JsonBody::read) it as often as needed.
#[derive(Debug)]
pub(crate) struct JsonBody {
    bytes: Vec<u8>,
    arrived: Instant,
    /// Its share of what all bodies may take together.
    _room: Option<OwnedSemaphorePermit>,
}

impl JsonBody {
    /// When the request's head had come.
    pub(crate) fn arrived(&self) -> Instant {
        self.arrived
    }

    /// The fields that `T` knows; others are ignored.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T> {
        // A list would do for a struct, its fields in order: not what anybody means.
        if !self.bytes.trim_ascii_start().starts_with(b"{") {
            let message = "the request body must be a JSON object";
            return Err(Error::InvalidRequest {
                message: message.to_owned(),
                param: None,
            });
        }
        let mut deserializer = serde_json::Deserializer::from_slice(&self.bytes);
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
        let arrived = Instant::now();
        let body = read(request.into_body(), app);
        match tokio::time::timeout(app.options.read_timeout, body).await {
            Err(_) => Err(ApiError::too_slow()),
            Ok(read) => {
                let (bytes, room) = read?;
                let body = Self {
                    bytes,
                    arrived,
                    _room: room,
                };
                body.read::<KeptFields>()?;
                Ok(body)
            }
        }
    }
}

/// Piece by piece: a body takes no more room than what has come of it.
async fn read(body: Body, app: &App) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), ApiError> {
    let most = app.options.max_body_bytes;
    if body.size_hint().lower() > most as u64 {
        return Err(ApiError::too_large(most));
    }
    let (mut bytes, mut room) = (Vec::new(), None::<OwnedSemaphorePermit>);
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let unreadable = |_| ApiError::invalid("the request body could not be read", None);
        let piece = piece.map_err(unreadable)?;
        if bytes.len() + piece.len() > most {
            return Err(ApiError::too_large(most));
        }
        let more = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        let more = app.bodies.clone().try_acquire_many_owned(more);
        let more = more.map_err(|_| Error::Overloaded {
            retry_after: Duration::from_secs(1),
        })?;
        match &mut room {
            Some(room) => room.merge(more),
            None => room = Some(more),
        }
        bytes.extend_from_slice(&piece);
    }
    Ok((bytes, room))
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
        let body = |json: &str| JsonBody {
            bytes: json.as_bytes().to_vec(),
            arrived: Instant::now(),
            _room: None,
        };
        let error = body("{\"list\": [1, \"x\"]}").read::<Fields>();
        let error = ApiError::from(error.expect_err("a string is no number")).to_json();
        assert!(error.contains(r#""param":"list[1]""#), "{error}");
        assert!(body("[[1]]").read::<Fields>().is_err(), "not an object");
    }
}
