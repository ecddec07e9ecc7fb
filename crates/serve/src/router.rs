//! Paths, and what every request passes on its way in.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tracing::Instrument;

use crate::api::error::ApiError;
use crate::api::{
    adapters, chat, completions, embeddings, llama_cpp, models, openapi, operation, responses,
    tokenize,
};
use crate::app::{App, ServeOptions};
use crate::auth::require_key;
use crate::cors::cors;
use crate::engine::Engine;
use crate::error::Error;
use crate::outflow::outflow;
use crate::page;

/// The name clients and logs know a request by.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest request id taken from a client.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// The OpenAI-compatible API over an engine, to nest into an application of your own.
///
/// [`serve`](crate::serve) runs the same router with a graceful shutdown.
pub fn router(engine: Arc<dyn Engine>, options: ServeOptions) -> Router {
    routes(App::new(engine, options))
}

pub(crate) fn routes(app: App) -> Router {
    // The key is asked for where the handlers are, not by comparing paths: whatever spelling of a
    // path reaches a handler has passed it.
    let guarded = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/responses", post(responses::create))
        .route(
            "/v1/responses/{id}",
            get(responses::get).delete(responses::delete),
        )
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/embeddings", post(embeddings::create))
        .route(
            "/v1/chat/completions/input_tokens",
            post(llama_cpp::input_tokens),
        )
        .route("/chat/completions", post(chat::create))
        .route(
            "/chat/completions/input_tokens",
            post(llama_cpp::input_tokens),
        )
        .route("/completion", post(llama_cpp::completion))
        .route("/completions", post(llama_cpp::completion))
        .route("/models", get(models::list))
        .route("/slots", get(llama_cpp::slots))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize));
    let guarded = guarded.route_layer(middleware::from_fn_with_state(app.clone(), bounded));
    let guarded = match app.options.runtime_adapters {
        true => guarded
            .route("/v1/load_lora_adapter", post(adapters::load))
            .route("/v1/unload_lora_adapter", post(adapters::unload)),
        false => guarded,
    };
    let guarded = guarded.route_layer(middleware::from_fn_with_state(app.clone(), require_key));
    Router::new()
        .route("/", get(page::page))
        .route("/health", get(operation::health))
        .route("/ping", get(operation::health).post(operation::health))
        .route("/load", get(operation::load))
        .route("/openapi.json", get(openapi::document))
        .route("/version", get(operation::version))
        .route("/metrics", get(operation::metrics))
        .merge(guarded)
        .fallback(|uri: Uri| async move { ApiError::no_such_path(uri.path()) })
        .method_not_allowed_fallback(|method: Method| async move {
            ApiError::no_such_method(method.as_str())
        })
        .layer(middleware::from_fn_with_state(app.clone(), outflow))
        .layer(middleware::from_fn_with_state(app.clone(), cors))
        .layer(middleware::from_fn_with_state(app.clone(), trace))
        .with_state(app)
}

/// Counts a request's time from its arrival, whatever it waits for before its first token.
async fn bounded(
    axum::extract::State(app): axum::extract::State<App>,
    request: Request,
    next: Next,
) -> Response {
    let answer = next.run(request);
    let Some(timeout) = app.options.request_timeout else {
        return answer.await;
    };
    match tokio::time::timeout(timeout, answer).await {
        Ok(response) => response,
        Err(_) => ApiError::from(Error::Timeout).into_response(),
    }
}

/// Names the request, in the log and in the answer.
async fn trace(
    axum::extract::State(app): axum::extract::State<App>,
    request: Request,
    next: Next,
) -> Response {
    let given = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|id| is_acceptable(id));
    let id = given.cloned().unwrap_or_else(|| {
        HeaderValue::from_str(&app.id("req-")).expect("an id of hexadecimal digits")
    });
    let span = tracing::info_span!(
        "request",
        id = id.to_str().unwrap_or_default(),
        method = %request.method(),
        path = request.uri().path(),
    );
    let mut response = async {
        let response = next.run(request).await;
        tracing::info!(status = response.status().as_u16(), "answered");
        response
    }
    .instrument(span)
    .await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Printable and short, so that nobody writes into our log what they like.
fn is_acceptable(id: &HeaderValue) -> bool {
    let bytes = id.as_bytes();
    (1..=MAX_REQUEST_ID_BYTES).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
}
