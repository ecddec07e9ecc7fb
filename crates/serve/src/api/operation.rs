//! What operators ask: is it alive, which version, how busy.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::error::ApiError;
use crate::app::App;
use crate::error::Error;

/// 200 while requests are taken; 503 once the server drains or an engine's thread has ended.
pub(crate) async fn health(State(app): State<App>) -> Result<StatusCode, ApiError> {
    app.check_ready()?;
    match app.engine.stats().iter().all(|engine| engine.alive) {
        true => Ok(StatusCode::OK),
        false => Err(Error::Unavailable {
            reason: "the engine has stopped",
        }
        .into()),
    }
}

/// How many requests there are, for balancers that ask.
pub(crate) async fn load(State(app): State<App>) -> Json<serde_json::Value> {
    let engines = app.engine.stats().into_iter();
    let load: usize = engines.map(|engine| engine.running + engine.waiting).sum();
    Json(json!({ "server_load": load }))
}

pub(crate) async fn version() -> Response {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") })).into_response()
}

pub(crate) async fn metrics(State(app): State<App>) -> Response {
    let text = app.metrics.render(&app.engine.stats());
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response()
}
