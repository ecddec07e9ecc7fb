//! The server's life: listen, serve, drain, stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

use crate::app::{App, Phase, ServeOptions};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::router::routes;

/// How long connections get to send their last bytes once everything is told to end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Opens a listener; port 0 takes any free port.
///
/// # Errors
/// [`Error::PortInUse`] or [`Error::Listen`].
pub async fn listen(addr: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(addr)
        .await
        .map_err(|source| match source.kind() {
            std::io::ErrorKind::AddrInUse => Error::PortInUse { addr },
            _ => Error::Listen { addr, source },
        })
}

/// Serves an engine until `shutdown` ends, then gracefully stops.
///
/// From then on `/health` and new requests get a 503, requests under way have
/// [`drain_timeout`](ServeOptions::drain_timeout) to end, and what is left then ends with an
/// error. Returns when every connection is closed.
///
/// # Errors
/// [`Error::Listen`] if the listener fails.
pub async fn serve(
    listener: TcpListener,
    engine: Arc<dyn Engine>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let addr = listener
        .local_addr()
        .unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
    let drain_timeout = options.drain_timeout;
    let app = App::new(engine, options);
    let draining = app.clone();
    let server = axum::serve(listener, routes(app.clone())).with_graceful_shutdown(async move {
        shutdown.await;
        tracing::info!("shutting down: requests under way may end");
        draining.enter(Phase::Draining);
    });
    let deadline = async {
        app.entered(Phase::Draining).await;
        tokio::time::sleep(drain_timeout).await;
        tracing::warn!("requests under way are ended");
        app.enter(Phase::Stopping);
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        served = server => served.map_err(|source| Error::Listen { addr, source }),
        () = deadline => Ok(()),
    }
}
