//! Accepting connections and bounding what each may do: how large a head it sends, how slowly, and
//! how long it reads nothing.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, Sleep};

use crate::app::{App, Background, Phase, ServeOptions};
use crate::peer::Peer;

/// Connections open at once; further ones wait in the operating system's queue.
const MAX_CONNECTIONS: usize = 4096;
/// How long a connection without a request may still send one once the server drains.
const FIRST_WORDS: Duration = Duration::from_millis(500);
/// How long to wait when the operating system has no more files to give.
const OUT_OF_FILES: Duration = Duration::from_millis(100);

/// Serves connections until the server drains. From then on what was open before ends as soon as
/// it can, while new connections are told that the server drains; the last one of before, and the
/// last response made in the background, are the end.
pub(crate) async fn accept(listener: TcpListener, app: App, routes: Router) {
    let server = Server {
        builder: Arc::new(builder(&app)),
        places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        listener,
        routes,
        app: app.clone(),
    };
    let (before, since) = (Background::default(), Background::default());
    tokio::select! {
        () = server.take(&before) => {}
        () = app.entered(Phase::Draining) => {}
    }
    let drained = async {
        before.ended().await;
        app.background.ended().await;
    };
    tokio::select! {
        () = server.take(&since) => {}
        () = drained => {}
    }
    drop(server);
    app.enter(Phase::Stopping);
    since.ended().await;
}

struct Server {
    listener: TcpListener,
    builder: Arc<Builder<TokioExecutor>>,
    places: Arc<Semaphore>,
    routes: Router,
    app: App,
}

impl Server {
    /// Takes connections for ever.
    async fn take(&self, taken: &Background) {
        loop {
            let place = self.places.clone().acquire_owned().await;
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    // Tokens are small and wanted at once.
                    let _ = stream.set_nodelay(true);
                    let connection = self.connection(stream);
                    let held = (place, taken.begin());
                    tokio::spawn(async move {
                        let _held_until_done = held;
                        connection.await;
                    });
                }
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "no connection");
                    tokio::time::sleep(OUT_OF_FILES).await;
                }
            }
        }
    }

    fn connection(&self, stream: TcpStream) -> impl Future<Output = ()> + Send + 'static {
        let routes = TowerToHyperService::new(self.routes.clone());
        let (app, builder) = (self.app.clone(), self.builder.clone());
        async move {
            let peer = Peer::new(stream);
            let watch = peer.watch();
            let Some(stream) = opened(peer, &app).await else {
                return;
            };
            let (begin, mut begun) = watch::channel(false);
            let service = service_fn(move |request| {
                begin.send_replace(true);
                let (answer, gone) = (routes.call(request), watch.clone().gone());
                async move {
                    tokio::select! {
                        answer = answer => Ok(answer.unwrap_or_else(|never| match never {})),
                        // Dropping the answer ends what is made for it.
                        () = gone => Err(io::Error::from(io::ErrorKind::ConnectionAborted)),
                    }
                }
            });
            let io = TokioIo::new(Patient::new(stream, &app.options));
            let mut connection = pin!(builder.serve_connection(io, service));
            // Whoever came before the server drains, or comes to ask whether it does, is answered
            // once; a connection that is told to end before its first request ends without a word.
            let told = async {
                app.entered(Phase::Draining).await;
                tokio::select! {
                    _ = begun.wait_for(|begun| *begun) => {}
                    () = tokio::time::sleep(FIRST_WORDS) => {}
                    () = app.entered(Phase::Stopping) => {}
                }
            };
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = told => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(error, "a connection ended early");
            }
        }
    }
}

fn builder(app: &App) -> Builder<TokioExecutor> {
    let max_header_bytes = app.options.max_header_bytes.max(8 << 10); // hyper's own least.
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(app.options.read_timeout)
        .max_buf_size(max_header_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(max_header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(app.options.write_timeout)
        .keep_alive_timeout(app.options.read_timeout);
    builder
}

/// The connection as HTTP sees it: itself.
#[cfg(not(feature = "tls"))]
async fn opened(stream: Peer, _app: &App) -> Option<Peer> {
    Some(stream)
}

/// The connection as HTTP sees it: itself, or what is inside of its TLS. Nobody waits for a
/// handshake that was begun before the server drains, or stops.
#[cfg(feature = "tls")]
async fn opened(stream: Peer, app: &App) -> Option<Box<dyn Stream>> {
    let Some(tls) = &app.options.tls else {
        return Some(Box::new(stream));
    };
    let too_late = match app.phase() {
        Phase::Ready => Phase::Draining,
        Phase::Draining | Phase::Stopping => Phase::Stopping,
    };
    let accepted = tokio::select! {
        accepted = tls.accept(stream, app.options.read_timeout) => accepted,
        () = app.entered(too_late) => return None,
    };
    match accepted {
        Ok(stream) => Some(Box::new(stream)),
        Err(error) => {
            tracing::debug!(error = &error as &dyn std::error::Error, "no handshake");
            None
        }
    }
}

/// Bytes in both directions.
#[cfg(feature = "tls")]
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

#[cfg(feature = "tls")]
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// How a client begins that speaks HTTP/2.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection that ends when its peer takes nothing for too long, or does not even say which
/// protocol it speaks; what comes after that, hyper times itself.
#[derive(Debug)]
struct Patient<S> {
    stream: S,
    timeout: Duration,
    /// Counts while a write is waiting.
    waiting: Option<Pin<Box<Sleep>>>,
    /// Counts until the protocol is known.
    opening: Option<Pin<Box<Sleep>>>,
    /// Bytes so far that may still become [`HTTP2`].
    opened_bytes: usize,
}

impl<S> Patient<S> {
    fn new(stream: S, options: &ServeOptions) -> Self {
        Self {
            stream,
            timeout: options.write_timeout,
            waiting: None,
            opening: Some(Box::pin(tokio::time::sleep(options.read_timeout))),
            opened_bytes: 0,
        }
    }

    /// Stops the clock once the bytes tell the protocol.
    fn note_opening(&mut self, bytes: &[u8]) {
        let expected = &HTTP2[self.opened_bytes..];
        let is_open = bytes.len() >= expected.len() || !expected.starts_with(bytes);
        self.opened_bytes += bytes.len();
        if is_open {
            self.opening = None;
        }
    }

    /// What a write came to, or an error once it has waited too long.
    fn bound<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waiting = None;
            return written;
        }
        let timeout = self.timeout;
        let sleep = || Box::pin(tokio::time::sleep_until(Instant::now() + timeout));
        ready!(self.waiting.get_or_insert_with(sleep).as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Some(opening) = &mut self.opening else {
            return read;
        };
        if read.is_pending() {
            ready!(opening.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.note_opening(&buf.filled()[before..]);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bound(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.bound(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // TLS has last words, and its peer may not take them.
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.bound(cx, shut)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bound(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
