//! Which web pages may ask.

use axum::extract::{Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::app::App;

/// Answers preflight requests, and tells browsers that a page of an allowed origin may read the
/// answer. Without allowed origins nothing is added, and browsers keep to the server's own page.
pub(crate) async fn cors(State(app): State<App>, request: Request, next: Next) -> Response {
    let allowed = &app.options.allowed_origins;
    let origin = request.headers().get(ORIGIN).cloned();
    let origin =
        origin.filter(|origin| allowed.iter().any(|known| known == "*" || known == origin));
    let Some(origin) = origin else {
        return next.run(request).await;
    };
    let is_preflight = request.method() == Method::OPTIONS
        && request
            .headers()
            .contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    let asked = request
        .headers()
        .get(ACCESS_CONTROL_REQUEST_HEADERS)
        .cloned();
    let mut response = match is_preflight {
        true => StatusCode::NO_CONTENT.into_response(),
        false => next.run(request).await,
    };
    let headers = response.headers_mut();
    if is_preflight {
        allow(headers, asked);
    }
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.append(VARY, HeaderValue::from_static("origin"));
    headers.insert(
        ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static("retry-after, x-request-id, x-should-retry"),
    );
    response
}

/// Whatever headers the page wants to send: clients send more than a few of their own, and none of
/// them lets anybody in but the key.
fn allow(headers: &mut HeaderMap, asked: Option<HeaderValue>) {
    let methods = HeaderValue::from_static("GET, POST, DELETE");
    // `*` would not cover the key.
    let usual = HeaderValue::from_static("authorization, content-type, x-request-id");
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.unwrap_or(usual));
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    let varies = HeaderValue::from_static("access-control-request-headers");
    headers.append(VARY, varies);
}
