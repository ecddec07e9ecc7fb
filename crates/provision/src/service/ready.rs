//! Waiting for a replica's readiness probe over HTTP.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::{ProbeOutcome, ProbeState, ProbeVerdict, ReadinessProbe};
use crate::error::{BoxError, Error, Result};

/// The longest pause between two probes of a replica that has never been ready: a fast starter
/// should not wait for a slow probe interval.
const STARTING_INTERVAL: Duration = Duration::from_millis(100);

/// Probes `address` until it is ready, and says how long that took.
///
/// `ended` is a future that resolves, with a reason, when the replica's process ends: a replica
/// that has died is not waited for.
///
/// # Errors
/// [`Error::NotReady`] when `ended` resolves first or the initial delay is over.
pub async fn wait_ready(
    address: SocketAddr,
    probe: &ReadinessProbe,
    ended: impl Future<Output = String>,
) -> Result<Duration> {
    let started = Instant::now();
    let mut state = ProbeState::default();
    let probing = async {
        loop {
            let outcome = ask(address, probe).await;
            match state.observe(probe, started.elapsed(), outcome) {
                ProbeVerdict::Ready => return Ok(started.elapsed()),
                ProbeVerdict::Failed(reason) => return Err(Error::NotReady { reason }),
                ProbeVerdict::Starting | ProbeVerdict::NotReady => {
                    tokio::time::sleep(probe.interval.min(STARTING_INTERVAL)).await;
                }
            }
        }
    };
    tokio::select! {
        result = probing => result,
        reason = ended => Err(Error::NotReady { reason }),
    }
}

/// Asks a replica once.
pub(crate) async fn ask(address: SocketAddr, probe: &ReadinessProbe) -> ProbeOutcome {
    let verb = if probe.post_data.is_some() {
        "POST"
    } else {
        "GET"
    };
    let path = probe.public_path();
    match tokio::time::timeout(probe.timeout, send(address, probe)).await {
        Ok(Ok(StatusCode::OK)) => ProbeOutcome::Ready,
        Ok(Ok(status)) => ProbeOutcome::Failed(format!("{verb} {path} answered {status}")),
        Ok(Err(error)) => ProbeOutcome::Failed(format!("{verb} {path} failed: {error}")),
        Err(_) => ProbeOutcome::Failed(format!(
            "{verb} {path} took longer than {:?}",
            probe.timeout
        )),
    }
}

/// The status of one request on its own connection.
async fn send(address: SocketAddr, probe: &ReadinessProbe) -> Result<StatusCode, BoxError> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request = match &probe.post_data {
        Some(_) => {
            Request::post(&probe.path).header(hyper::header::CONTENT_TYPE, "application/json")
        }
        None => Request::get(&probe.path),
    };
    request = request
        .header(hyper::header::HOST, address.to_string())
        .header(hyper::header::CONNECTION, "close");
    for (name, value) in &probe.headers {
        request = request.header(name, value);
    }
    let body = Bytes::from(probe.post_data.clone().unwrap_or_default());
    let exchange = sender.send_request(request.body(Full::new(body))?);
    tokio::pin!(exchange, connection);
    let response = tokio::select! {
        response = &mut exchange => response,
        // The server has closed: what it answered, if anything, is there already.
        closed = &mut connection => {
            closed?;
            exchange.await
        }
    };
    Ok(response?.status())
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// A server that gives each connection the next answer and closes it.
    async fn server(answers: &'static [&'static str]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let mut request = [0; 1024];
                let read = stream.read(&mut request).await.expect("a request");
                let text = String::from_utf8_lossy(&request[..read]);
                let posted = text.starts_with("POST /ready") && text.ends_with("{\"a\":1}");
                assert!(
                    text.starts_with("GET /ready HTTP/1.1\r\n") || posted,
                    "{text}"
                );
                stream
                    .write_all(answer.as_bytes())
                    .await
                    .expect("an answer");
            }
        });
        address
    }

    fn probe() -> ReadinessProbe {
        ReadinessProbe {
            path: "/ready".into(),
            ..ReadinessProbe::default()
        }
    }

    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi";
    const BUSY: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";

    #[tokio::test]
    async fn a_busy_then_a_closed_then_a_ready_server() {
        let address = server(&[BUSY, "", OK]).await;
        wait_ready(address, &probe(), pending())
            .await
            .expect("ready at the third probe");
    }

    #[tokio::test]
    async fn post_data_and_headers_are_sent() {
        let address = server(&[OK]).await;
        let probe = ReadinessProbe {
            post_data: Some("{\"a\":1}".into()),
            headers: [("x-key".to_owned(), "k".to_owned())].into(),
            ..probe()
        };
        wait_ready(address, &probe, pending()).await.expect("ready");
    }

    #[tokio::test]
    async fn the_initial_delay_ends_with_what_was_seen() {
        let address = server(&[BUSY]).await;
        let probe = ReadinessProbe {
            initial_delay: Duration::ZERO,
            ..probe()
        };
        let error = wait_ready(address, &probe, pending())
            .await
            .expect_err("busy");
        assert_eq!(
            error.to_string(),
            "service did not become ready: GET /ready answered 503 Service Unavailable"
        );
    }

    #[tokio::test]
    async fn a_service_that_ended_is_not_waited_for() {
        let address = server(&[]).await;
        let ended = async { "exit code 1: no model".to_owned() };
        let error = wait_ready(address, &probe(), ended)
            .await
            .expect_err("ended");
        assert_eq!(
            error.to_string(),
            "service did not become ready: exit code 1: no model"
        );
    }
}
