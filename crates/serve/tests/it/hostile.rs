//! Requests that no honest client sends.

use std::sync::Arc;

use serde_json::json;
use updraft_serve::{EchoEngine, ServeOptions};

use crate::client::Server;

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn bodies_that_are_no_request() {
    let server = Server::echo().await;
    let deep = format!("{{\"messages\": {}", "[".repeat(1_000_000));
    for body in [
        "",
        "{",
        "null",
        "[]",
        "\"text\"",
        "{}",
        "{} {}",
        "{\"messages\": \"hi\"}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"temperature\": NaN}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"temperature\": 1e400}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"n\": 1, \"n\": 2}",
        deep.as_str(),
    ] {
        let error = server.post_text(PATH, body).await.error(400, None);
        assert!(
            error.to_string().len() < 2048,
            "an error is short: {}",
            error.to_string().len()
        );
    }
    // The server is none the worse.
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_a_413() {
    let options = ServeOptions {
        max_body_bytes: 1000,
        ..ServeOptions::default()
    };
    let server = Server::start(Arc::new(EchoEngine::new(["echo"])), options).await;
    let body = json!({"messages": [{"role": "user", "content": "x".repeat(2000)}]});
    server.post(PATH, &body).await.error(413, None);
}

#[tokio::test]
async fn only_json_is_taken() {
    let server = Server::echo().await;
    for headers in ["", "Content-Type: text/plain\r\n"] {
        server
            .request("POST", PATH, headers, Some("{}"))
            .await
            .error(415, None);
    }
}

#[tokio::test]
async fn wrong_paths_and_methods_answer_in_the_same_form() {
    let server = Server::echo().await;
    server.get("/v2/models").await.error(404, None);
    let answer = server.get(PATH).await;
    answer.error(405, None);
    assert_eq!(answer.header("allow"), Some("POST"));
    server
        .request("DELETE", "/v1/models", "", None)
        .await
        .error(405, None);
    let long = format!("/{}", "a".repeat(5000));
    assert!(
        server.get(&long).await.body.len() < 2048,
        "nothing is echoed at length"
    );
}

#[tokio::test]
async fn a_request_keeps_an_honest_id() {
    let server = Server::echo().await;
    let id = |header: &'static str| {
        let server = &server;
        async move {
            let answer = server.request("GET", "/health", header, None).await;
            answer
                .header("x-request-id")
                .expect("always there")
                .to_owned()
        }
    };
    assert_eq!(id("X-Request-Id: mine-1\r\n").await, "mine-1");
    let (first, second) = (id("").await, id("X-Request-Id: with space\r\n").await);
    assert!(first.starts_with("req-") && second.starts_with("req-") && first != second);
}
