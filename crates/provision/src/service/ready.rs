//! Waiting for a replica's readiness probe over HTTP.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Empty;
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

async fn ask(address: SocketAddr, probe: &ReadinessProbe) -> ProbeOutcome {
    match tokio::time::timeout(probe.timeout, get(address, &probe.path)).await {
        Ok(Ok(StatusCode::OK)) => ProbeOutcome::Ready,
        Ok(Ok(status)) => ProbeOutcome::Failed(format!("GET {} answered {status}", probe.path)),
        Ok(Err(error)) => ProbeOutcome::Failed(format!("GET {} failed: {error}", probe.path)),
        Err(_) => ProbeOutcome::Failed(format!(
            "GET {} took longer than {:?}",
            probe.path, probe.timeout
        )),
    }
}

/// The status of one `GET` on its own connection.
async fn get(address: SocketAddr, path: &str) -> Result<StatusCode, BoxError> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path)
        .header(hyper::header::HOST, address.to_string())
        .header(hyper::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let exchange = async { sender.send_request(request).await };
    tokio::select! {
        response = exchange => Ok(response?.status()),
        closed = connection => Err(closed.err().map_or("connection closed".into(), BoxError::from)),
    }
}
