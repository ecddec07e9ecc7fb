//! What browsers need: the page, and the permission to ask from other pages.

use std::sync::Arc;

use updraft_serve::{ApiKeys, EchoEngine, ServeOptions};

use crate::client::Server;

async fn server(origins: &[&str]) -> Server {
    let options = ServeOptions {
        allowed_origins: origins.iter().map(|&origin| origin.to_owned()).collect(),
        api_keys: ApiKeys::new(["key"]),
        ..ServeOptions::default()
    };
    Server::start(Arc::new(EchoEngine::new(["echo"])), options).await
}

#[tokio::test]
async fn the_page_needs_nothing_but_this_server() {
    let server = server(&[]).await;
    let page = server.get("/").await;
    assert_eq!(page.status, 200);
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    let policy = page.header("content-security-policy").expect("set");
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"));
    for elsewhere in ["http://", "https://", "src=", "@import"] {
        assert!(!page.body.contains(elsewhere), "{elsewhere}");
    }
}

#[tokio::test]
async fn pages_of_allowed_origins_may_ask() {
    let preflight = "Origin: http://a.example\r\nAccess-Control-Request-Method: POST\r\n\
                     Access-Control-Request-Headers: authorization,content-type\r\n";
    let path = "/v1/chat/completions";
    for (origins, allowed) in [
        (&["http://a.example", "http://b.example"][..], true),
        (&["*"], true),
        (&["http://b.example"], false),
        (&[], false),
    ] {
        let server = server(origins).await;
        let origin = allowed.then_some("http://a.example");
        // A preflight request carries no key.
        let answer = server.request("OPTIONS", path, preflight, None).await;
        assert_eq!(answer.status == 204, allowed, "{origins:?}");
        assert_eq!(answer.header("access-control-allow-origin"), origin);
        let names = answer.header("access-control-allow-headers");
        assert_eq!(
            names.is_some_and(|names| names.contains("authorization")),
            allowed
        );
        // Refusals can be read too.
        let header = "Origin: http://a.example\r\n";
        let answer = server.request("GET", "/v1/models", header, None).await;
        assert_eq!(answer.status, 401);
        assert_eq!(answer.header("access-control-allow-origin"), origin);
    }
}

/// A browser with OpenAI's own client in it asks first whether it may send what that client sends,
/// deletes what it stored, and reads what tells it not to try again.
#[tokio::test]
async fn openais_client_works_in_a_browser() {
    let server = server(&["http://a.example"]).await;
    let asked = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,\
                 x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,\
                 x-stainless-runtime-version,x-stainless-timeout";
    for (method, path) in [
        ("POST", "/v1/chat/completions"),
        ("DELETE", "/v1/responses/resp_1"),
    ] {
        let preflight = format!(
            "Origin: http://a.example\r\nAccess-Control-Request-Method: {method}\r\n\
             Access-Control-Request-Headers: {asked}\r\n"
        );
        let answer = server.request("OPTIONS", path, &preflight, None).await;
        assert_eq!(answer.status, 204);
        let methods = answer.header("access-control-allow-methods");
        assert!(methods.is_some_and(|methods| methods.contains(method)));
        assert_eq!(answer.header("access-control-allow-headers"), Some(asked));
    }
    let origin = "Origin: http://a.example\r\n";
    let answer = server.request("GET", "/v1/models", origin, None).await;
    let read = answer.header("access-control-expose-headers");
    assert!(read.is_some_and(|read| read.contains("x-should-retry")));
}
