//! Server-sent events: `data: {json}`, at last `data: [DONE]`.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde::Serialize;
use serde_json::Value;

use super::error::ApiError;
use crate::error::Error;

/// How often a silent stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Streams chunks. An error becomes the last chunk, in OpenAI's form, before `[DONE]`.
pub(crate) fn respond<C: Serialize + Send + 'static>(
    chunks: impl Stream<Item = Result<C, Error>> + Send + 'static,
) -> Response {
    let done = futures::stream::once(async { Ok(Event::default().data("[DONE]")) });
    stream(frames(chunks).chain(done))
}

/// Up to the first error, which is told too.
fn frames<C: Serialize>(
    chunks: impl Stream<Item = Result<C, Error>>,
) -> impl Stream<Item = Result<Event, Infallible>> {
    let mut failed = false;
    chunks
        .take_while(move |chunk| {
            std::future::ready(!std::mem::replace(&mut failed, chunk.is_err()))
        })
        .map(|chunk| match chunk {
            Ok(chunk) => serde_json::to_string(&chunk).expect("chunks have string keys only"),
            Err(error) => ApiError::from(error).to_json(),
        })
        .map(|data| Ok(Event::default().data(data)))
}

/// Streams chunks as [`respond`] does, but their end is an end.
pub(crate) fn respond_without_done<C: Serialize + Send + 'static>(
    chunks: impl Stream<Item = Result<C, Error>> + Send + 'static,
) -> Response {
    stream(frames(chunks))
}

/// Streams events that carry their own type. There is no `[DONE]`: the last event says so.
pub(crate) fn respond_typed(events: impl Stream<Item = Value> + Send + 'static) -> Response {
    stream(events.map(|event| {
        let kind = event["type"].as_str().unwrap_or_default();
        Ok(Event::default().event(kind).data(event.to_string()))
    }))
}

fn stream(frames: impl Stream<Item = Result<Event, Infallible>> + Send + 'static) -> Response {
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive");
    let mut response = Sse::new(frames).keep_alive(keep_alive).into_response();
    // Proxies that buffer would turn a stream into one late answer.
    response
        .headers_mut()
        .insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
