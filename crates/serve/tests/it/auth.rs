//! Keys, and ways around them that must not be.

use std::sync::Arc;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use updraft_serve::{ApiKeys, EchoEngine, ServeOptions};

use crate::client::Server;

async fn guarded() -> Server {
    let api_keys = ApiKeys::new(["token-abc123", "second"]);
    let options = ServeOptions {
        api_keys,
        ..ServeOptions::default()
    };
    Server::start(Arc::new(EchoEngine::new(["echo"])), options).await
}

#[tokio::test]
async fn each_key_opens_and_nothing_else_does() {
    let server = guarded().await;
    for key in ["token-abc123", "second"] {
        let header = format!("Authorization: Bearer {key}\r\n");
        assert_eq!(
            server
                .request("GET", "/v1/models", &header, None)
                .await
                .status,
            200
        );
    }
    for header in [
        "",
        "Authorization: Bearer wrong\r\n",
        "Authorization: Bearer \r\n",
        "Authorization: Bearer\r\n",
        "Authorization: Basic token-abc123\r\n",
        "Authorization: token-abc123\r\n",
    ] {
        let answer = server.request("GET", "/v1/models", header, None).await;
        answer.error(401, Some("invalid_api_key"));
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
}

#[tokio::test]
async fn no_spelling_of_a_path_goes_around() {
    let server = guarded().await;
    for path in [
        "/v1/models",
        "/v1/models/echo",
        "//v1/models",
        "/%76%31/models",
        "/v1//models",
        "/./v1/models",
        "http://elsewhere/v1/models",
        "/tokenize",
        "/models",
        "/slots",
        "/v1/responses/resp_1",
        "/v1/nowhere",
    ] {
        let answer = server.request("GET", path, "", None).await;
        assert!(
            [401, 404, 405].contains(&answer.status),
            "{path}: {}",
            answer.status
        );
    }
    let body = json!({"messages": [{"role": "user", "content": "hi"}]});
    server
        .post("/v1/chat/completions", &body)
        .await
        .error(401, Some("invalid_api_key"));
    server
        .post("/tokenize", &json!({"prompt": "x"}))
        .await
        .error(401, Some("invalid_api_key"));
}

/// No name a client gives itself or the server opens anything.
#[tokio::test]
async fn forged_headers_open_nothing() {
    let server = guarded().await;
    for header in [
        "Host: localhost/health?",
        "Host: x\r\nX-Original-URL: /health",
        "Host: x\r\nX-Rewrite-URL: /health",
        "Host: x\r\nX-Forwarded-For: 127.0.0.1",
        "Host: x\r\nX-Forwarded-Prefix: /health",
        "Host: x\r\nX-Api-Key: wrong",
        "Host: x\r\nAuthorization: Bearer wrong\r\nAuthorization: Bearer token-abc123",
    ] {
        let head = format!("GET /v1/models HTTP/1.1\r\nConnection: close\r\n{header}\r\n\r\n");
        let mut stream = TcpStream::connect(server.addr).await.expect("it listens");
        stream.write_all(head.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        let refused = ["HTTP/1.1 401", "HTTP/1.1 400"];
        assert!(
            refused.iter().any(|status| answer.starts_with(status)),
            "{header}: {answer}"
        );
    }
}

#[tokio::test]
async fn operators_need_no_key() {
    let server = guarded().await;
    for path in ["/health", "/ping", "/load", "/version", "/metrics"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
}
