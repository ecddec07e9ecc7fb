//! Clients that are slow or large, and requests that take too long.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use updraft_serve::{EchoEngine, ServeOptions};

use crate::client::Server;
use crate::life::until;

const PATH: &str = "/v1/chat/completions";
const SOON: Duration = Duration::from_millis(100);

async fn server(engine: EchoEngine, options: ServeOptions) -> Server {
    Server::start(Arc::new(engine), options).await
}

fn impatient() -> ServeOptions {
    ServeOptions {
        read_timeout: SOON,
        ..ServeOptions::default()
    }
}

/// What the server says to these bytes until it closes the connection, as it must.
async fn closed(server: &Server, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.addr).await.expect("it listens");
    stream.write_all(bytes).await.expect("sent");
    let mut answer = Vec::new();
    let end = stream.read_to_end(&mut answer);
    let end = tokio::time::timeout(Duration::from_secs(5), end).await;
    // A reset is an end too.
    let _ = end.expect("the connection is not kept");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_head_that_never_ends_is_not_waited_for() {
    let server = server(EchoEngine::new(["echo"]), impatient()).await;
    for head in [
        "",
        "P",
        "PRI * HTTP/2.0\r\n",
        "GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    ] {
        let start = Instant::now();
        let answer = closed(&server, head.as_bytes()).await;
        assert!(!answer.contains("200 OK"), "{answer}");
        assert!(start.elapsed() >= SOON / 2, "it was given its time");
    }
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn a_body_that_never_ends_is_a_408() {
    let server = server(EchoEngine::new(["echo"]), impatient()).await;
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000\r\n\
         Content-Type: application/json\r\n\r\n{{\"messages\""
    );
    let answer = closed(&server, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[tokio::test]
async fn a_head_beyond_the_limit_is_a_431() {
    let options = ServeOptions {
        max_header_bytes: 16 << 10,
        ..ServeOptions::default()
    };
    let server = server(EchoEngine::new(["echo"]), options).await;
    let long = format!(
        "GET /health HTTP/1.1\r\nHost: x\r\nX-Long: {}",
        "x".repeat(20_000)
    );
    let answer = closed(&server, long.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let many = (0..200).fold("GET /health HTTP/1.1\r\n".to_owned(), |head, index| {
        format!("{head}X-{index}: y\r\n")
    });
    let answer = closed(&server, format!("{many}\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

/// A client that asks for much and reads nothing loses its connection, and its request ends.
#[tokio::test]
async fn a_reader_that_stalls_is_gone() {
    let engine = EchoEngine::new(["echo"]);
    let options = ServeOptions {
        write_timeout: SOON,
        ..ServeOptions::default()
    };
    let server = server(engine.clone(), options).await;
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "stream": true, "ignore_eos": true,
        "max_tokens": 4000, "n": 64, "logprobs": true, "top_logprobs": 5,
    });
    let headers = "Content-Type: application/json\r\n";
    let stalled = server
        .send("POST", PATH, headers, Some(&body.to_string()))
        .await;
    until("it runs", || engine.running() > 0).await;
    until("it is ended", || engine.running() == 0).await;
    drop(stalled);
    let metrics = server.get("/metrics").await.body;
    let aborted = "vllm:request_success_total{model_name=\"echo\",engine=\"0\",finished_reason=\"abort\"} 0\n";
    assert!(!metrics.contains(aborted), "it did not just run to its end");
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_ended() {
    let engine = EchoEngine::new(["echo"]).with_pace(Duration::from_millis(5));
    let options = ServeOptions {
        request_timeout: Some(Duration::from_millis(500)),
        ..ServeOptions::default()
    };
    let server = server(engine.clone(), options).await;
    let mut body = json!({"messages": [{"role": "user", "content": "x".repeat(1000)}]});
    let answer = server.post(PATH, &body).await;
    answer.error(504, Some("timeout"));
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    body["stream"] = json!(true);
    let chunks = server.post(PATH, &body).await.chunks();
    let last = chunks.last().expect("some");
    assert_eq!(last["error"]["code"], "timeout", "{last}");
    until("it is ended", || engine.running() == 0).await;
    body["messages"][0]["content"] = json!("x");
    body["stream"] = json!(false);
    assert_eq!(server.post(PATH, &body).await.status, 200);
}

/// Over HTTP/2 a client stalls one stream by closing its window, and answers every ping of the
/// connection: the request ends all the same, and other streams of that connection go on.
#[tokio::test]
async fn a_window_that_never_opens_ends_its_request() {
    for (options, what) in [
        (
            ServeOptions {
                write_timeout: SOON,
                ..ServeOptions::default()
            },
            "the client takes nothing for too long",
        ),
        (
            ServeOptions {
                request_timeout: Some(SOON),
                ..ServeOptions::default()
            },
            "the request takes too long, which nobody asks for",
        ),
    ] {
        let engine = EchoEngine::new(["echo"]).with_pace(Duration::from_millis(1));
        let server = server(engine.clone(), options).await;
        let (mut client, open, connection) = closed_window(&server).await;
        let body = json!({
            "messages": [{"role": "user", "content": "x"}], "stream": true, "ignore_eos": true,
            "max_tokens": 4000,
        });
        let request = axum::http::Request::post(format!("http://{}{PATH}", server.addr))
            .header("content-type", "application/json")
            .body(())
            .expect("a request");
        let (answer, mut sending) = client.send_request(request, false).expect("room");
        let body = body.to_string().into();
        sending.send_data(body, true).expect("it is sent");
        let mut answer = answer.await.expect("a head").into_body();
        until("it runs", || engine.running() == 1).await;
        until(what, || engine.running() == 0).await;

        // The connection is none the worse, and the stalled stream no whole answer.
        let request = axum::http::Request::get(format!("http://{}/health", server.addr));
        let request = request.body(()).expect("a request");
        let (other, _) = client.send_request(request, true).expect("room");
        assert_eq!(other.await.expect("an answer").status(), 200);
        open.send(()).expect("the connection lives");
        let mut last = answer.data().await;
        while let Some(Ok(_)) = last {
            last = answer.data().await;
        }
        assert!(matches!(last, Some(Err(_))), "{what}: {last:?}");
        connection.abort();
    }
}

/// A client of HTTP/2 that takes nothing until it is told to.
pub(crate) async fn closed_window(
    server: &Server,
) -> (
    h2::client::SendRequest<bytes::Bytes>,
    tokio::sync::oneshot::Sender<()>,
    tokio::task::JoinHandle<()>,
) {
    let stream = TcpStream::connect(server.addr).await.expect("it listens");
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(0);
    let (client, mut connection) = builder.handshake(stream).await.expect("it speaks HTTP/2");
    let (open, opened) = tokio::sync::oneshot::channel::<()>();
    let connection = tokio::spawn(async move {
        tokio::select! {
            _ = &mut connection => return,
            Ok(()) = opened => {}
        }
        connection.set_initial_window_size(1 << 20).expect("sent");
        let _ = connection.await;
    });
    (client, open, connection)
}

/// A client that sent a byte more than its request, to which HTTP/1 listens only after the answer,
/// and went: it is noticed while the answer is still being made.
#[tokio::test]
async fn a_client_that_goes_after_a_byte_too_many_is_noticed() {
    let engine = EchoEngine::new(["echo"]).with_pace(Duration::from_millis(20));
    let server = server(engine.clone(), ServeOptions::default()).await;
    let body = json!({"messages": [{"role": "user", "content": "x".repeat(1000)}]});
    let headers = "Content-Type: application/json\r\n";
    let mut client = server
        .send("POST", PATH, headers, Some(&body.to_string()))
        .await;
    until("it runs", || engine.running() == 1).await;
    client.write_all(b"\n").await.expect("it is still read");
    // Now, or the server would see byte and end at once.
    tokio::time::sleep(SOON).await;
    drop(client);
    until("it is cancelled", || engine.running() == 0).await;
}
