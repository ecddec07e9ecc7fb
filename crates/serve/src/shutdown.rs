//! The server's life: listen, serve, drain, stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

use crate::app::{App, Phase, ServeOptions};
use crate::connections::accept;
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
/// From then on `/health` and new requests get a 503, on new connections too; requests under way
/// and responses made in the background have [`drain_timeout`](ServeOptions::drain_timeout) to
/// end, and what is left then ends with an error. Returns when every connection is closed.
pub async fn serve(
    listener: TcpListener,
    engine: Arc<dyn Engine>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let drain_timeout = options.drain_timeout;
    let app = App::new(engine, options);
    let server = accept(listener, app.clone(), routes(app.clone()));
    let end = async {
        shutdown.await;
        tracing::info!("shutting down: requests under way may end");
        app.enter(Phase::Draining);
        tokio::time::sleep(drain_timeout).await;
        tracing::warn!("requests under way are ended");
        app.enter(Phase::Stopping);
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        () = server => {}
        () = end => {}
    }
}
