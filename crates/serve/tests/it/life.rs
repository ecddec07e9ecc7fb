//! Load, disconnects and shutdown.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use updraft_chat::Chat;
use updraft_serve::{
    EchoEngine, Engine, EngineStats, Error, GenerateRequest, ModelInfo, ServeOptions, TokenStream,
    listen,
};

use crate::client::Server;

const PATH: &str = "/v1/chat/completions";
const JSON: &str = "Content-Type: application/json\r\n";

/// An answer of hundreds of tokens, half a second or more at the pace of [`slow`].
fn long(stream: bool) -> Value {
    let content = "x".repeat(500);
    json!({"messages": [{"role": "user", "content": content}], "stream": stream})
}

fn slow() -> EchoEngine {
    EchoEngine::new(["echo"]).with_pace(Duration::from_millis(2))
}

pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(5), "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_client_that_goes_cancels_its_request() {
    let engine = slow();
    let server = Server::start(Arc::new(engine.clone()), ServeOptions::default()).await;
    for stream in [false, true] {
        let start = Instant::now();
        let mut connection = server
            .send("POST", PATH, JSON, Some(&long(stream).to_string()))
            .await;
        until("it runs", || engine.running() == 1).await;
        if stream {
            let mut some = [0; 64];
            connection.read_exact(&mut some).await.expect("it streams");
        }
        drop(connection);
        until("it is cancelled", || engine.running() == 0).await;
        let metrics = server.get("/metrics").await.body;
        let none = "vllm:generation_tokens_total{model_name=\"echo\",engine=\"0\"} 0\n";
        assert!(
            !stream || !metrics.contains(none),
            "what was made is counted"
        );
        assert!(
            start.elapsed() < Duration::from_millis(900),
            "it did not just run to its end"
        );
    }
}

#[tokio::test]
async fn more_than_fits_is_a_429_with_a_time() {
    let engine = slow().with_max_running(2);
    let server = Server::start(Arc::new(engine.clone()), ServeOptions::default()).await;
    let _first = server
        .send("POST", PATH, JSON, Some(&long(true).to_string()))
        .await;
    until("one runs", || engine.running() == 1).await;
    // Two at once are one too many: none of them is left behind.
    let mut two = long(true);
    two["n"] = json!(2);
    let answer = server.post(PATH, &two).await;
    answer.error(429, Some("rate_limit_exceeded"));
    assert!(
        answer
            .header("retry-after")
            .expect("a time")
            .parse::<u64>()
            .expect("seconds")
            > 0
    );
    assert_eq!(engine.running(), 1);
    let metrics = server.get("/metrics").await.body;
    assert!(
        metrics.contains("vllm:admission_rejections_total{model_name=\"echo\",engine=\"0\"} 1\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("vllm:num_requests_running{model_name=\"echo\",engine=\"0\"} 1\n"),
        "{metrics}"
    );
}

#[tokio::test]
async fn shutdown_lets_requests_end() {
    let engine = slow();
    let mut server = Server::start(Arc::new(engine.clone()), ServeOptions::default()).await;
    let mut connection = server
        .send("POST", PATH, JSON, Some(&long(true).to_string()))
        .await;
    until("it runs", || engine.running() == 1).await;
    // Whoever looks is told, until the last answer is out: on new connections, and on one that was
    // there before but had not asked yet.
    let mut early = TcpStream::connect(server.addr).await.expect("it listens");
    server.stop();
    until_draining(&server).await;
    let question = b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n";
    early.write_all(question).await.expect("it is not closed");
    let mut told = String::new();
    early.read_to_string(&mut told).await.expect("an answer");
    assert!(told.starts_with("HTTP/1.1 503"), "{told}");
    server.post(PATH, &long(false)).await.error(503, None);
    assert_eq!(engine.running(), 1, "it still runs");
    let mut answer = String::new();
    connection
        .read_to_string(&mut answer)
        .await
        .expect("the whole answer");
    assert!(answer.contains("\"finish_reason\":\"stop\"") && answer.contains("[DONE]"));
    (&mut server.task).await.expect("no panic");
    assert!(
        TcpStream::connect(server.addr).await.is_err(),
        "it no longer listens"
    );
}

/// Until `/health` says that the server drains; it may still be ready for a moment.
async fn until_draining(server: &Server) {
    let start = Instant::now();
    loop {
        let health = server.get("/health").await;
        if health.status == 503 {
            health.error(503, None);
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "never draining");
    }
}

/// A response in the background has no connection that waits for it.
#[tokio::test]
async fn shutdown_lets_the_background_end() {
    let engine = slow();
    let mut server = Server::start(Arc::new(engine.clone()), ServeOptions::default()).await;
    let body = json!({"input": "x".repeat(200), "background": true});
    let begun = Instant::now();
    let response = server.post("/v1/responses", &body).await.json();
    assert_eq!(response["status"], "in_progress");
    until("it runs", || engine.running() == 1).await;
    server.stop();
    (&mut server.task).await.expect("no panic");
    assert_eq!(engine.running(), 0);
    // Its 200 tokens take two milliseconds each.
    assert!(
        begun.elapsed() >= Duration::from_millis(400),
        "it was let to its end"
    );
}

#[tokio::test]
async fn shutdown_does_not_wait_forever() {
    let engine = EchoEngine::new(["echo"]).with_pace(Duration::from_secs(1));
    let options = ServeOptions {
        drain_timeout: Duration::from_millis(50),
        ..ServeOptions::default()
    };
    let mut server = Server::start(Arc::new(engine.clone()), options).await;
    let body = long(true).to_string();
    let mut connection = server.send("POST", PATH, JSON, Some(&body)).await;
    let mut head = [0; 15];
    connection
        .read_exact(&mut head)
        .await
        .expect("it has begun");
    server.stop();
    let start = Instant::now();
    let mut rest = String::new();
    connection.read_to_string(&mut rest).await.expect("an end");
    assert!(
        rest.contains("shutting down") && rest.contains("[DONE]"),
        "{rest}"
    );
    (&mut server.task).await.expect("no panic");
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(engine.running(), 0);
}

#[tokio::test]
async fn a_taken_port_is_said_in_one_line() {
    let taken = listen(([127, 0, 0, 1], 0).into())
        .await
        .expect("a free port");
    let addr = taken.local_addr().expect("bound");
    let error = listen(addr).await.expect_err("it is taken");
    assert!(matches!(error, Error::PortInUse { .. }));
    let expected =
        format!("{addr} is already in use; stop the other process or choose another port");
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn operators_see_what_goes_on() {
    let server = Server::echo().await;
    assert_eq!(
        server.get("/version").await.json()["version"],
        env!("CARGO_PKG_VERSION")
    );
    let body = json!({"messages": [{"role": "user", "content": "hello"}]});
    server.post(PATH, &body).await;
    let metrics = server.get("/metrics").await;
    assert!(
        metrics
            .header("content-type")
            .expect("set")
            .starts_with("text/plain; version=0.0.4")
    );
    for line in [
        "vllm:prompt_tokens_total{model_name=\"echo\",engine=\"0\"} 5\n",
        "vllm:generation_tokens_total{model_name=\"echo\",engine=\"0\"} 6\n",
        "vllm:request_success_total{model_name=\"echo\",engine=\"0\",finished_reason=\"stop\"} 1\n",
        "vllm:time_to_first_token_seconds_count{model_name=\"echo\",engine=\"0\"} 1\n",
    ] {
        assert!(
            metrics.body.contains(line),
            "{line} is not in\n{}",
            metrics.body
        );
    }
}

/// A decoder whose thread has ended.
#[derive(Debug)]
struct Ended(EchoEngine);

#[async_trait::async_trait]
impl Engine for Ended {
    fn models(&self) -> Vec<ModelInfo> {
        self.0.models()
    }

    fn chat(&self, model: &str) -> Option<Arc<Chat>> {
        self.0.chat(model)
    }

    async fn generate(&self, _: GenerateRequest) -> updraft_serve::Result<TokenStream> {
        let reason = "the engine has stopped";
        Err(Error::Unavailable { reason })
    }

    fn stats(&self) -> Vec<EngineStats> {
        let alive = EngineStats::idle("alive");
        let ended = EngineStats {
            alive: false,
            ..EngineStats::idle("echo")
        };
        vec![alive, ended]
    }
}

/// One dead decoder of several is enough for a balancer to look elsewhere, and for clients to come
/// again; operators can still see why.
#[tokio::test]
async fn a_dead_engine_is_not_healthy() {
    let engine = Arc::new(Ended(EchoEngine::new(["echo"])));
    let server = Server::start(engine, ServeOptions::default()).await;
    for path in ["/health", "/ping"] {
        server.get(path).await.error(503, None);
    }
    for stream in [false, true] {
        let answer = server.post(PATH, &long(stream)).await;
        answer.error(503, None);
        assert!(answer.header("retry-after").is_some());
    }
    assert_eq!(server.get("/metrics").await.status, 200);
}
