//! Accepting connections and bounding what each may do: how large a head it sends, how slowly, and
//! how long it reads nothing.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};

use crate::app::{App, Phase, ServeOptions};

/// Connections open at once; further ones wait in the operating system's queue.
const MAX_CONNECTIONS: usize = 4096;
/// How long to wait when the operating system has no more files to give.
const OUT_OF_FILES: Duration = Duration::from_millis(100);

/// Serves connections until the server drains, then until the last one has ended.
pub(crate) async fn accept(listener: TcpListener, app: App, routes: Router) {
    let builder = Arc::new(builder(&app));
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let draining = app.entered(Phase::Draining);
    tokio::pin!(draining);
    loop {
        let place = places.clone().acquire_owned();
        let accepted = async { (place.await, listener.accept().await) };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut draining => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "no connection");
                tokio::time::sleep(OUT_OF_FILES).await;
                continue;
            }
        };
        // Tokens are small and wanted at once.
        let _ = stream.set_nodelay(true);
        let io = TokioIo::new(Patient::new(stream, &app.options));
        let service = TowerToHyperService::new(routes.clone());
        let watcher = graceful.watcher();
        let builder = builder.clone();
        tokio::spawn(async move {
            let _held_until_done = place;
            let connection = builder.serve_connection(io, service);
            if let Err(error) = watcher.watch(connection).await {
                tracing::debug!(error, "a connection ended early");
            }
        });
    }
    drop(listener);
    graceful.shutdown().await;
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

/// How a client begins that speaks HTTP/2.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection that ends when its peer takes nothing for too long, or does not even say which
/// protocol it speaks; what comes after that, hyper times itself.
#[derive(Debug)]
struct Patient {
    stream: TcpStream,
    timeout: Duration,
    /// Counts while a write is waiting.
    waiting: Option<Pin<Box<Sleep>>>,
    /// Counts until the protocol is known.
    opening: Option<Pin<Box<Sleep>>>,
    /// Bytes so far that may still become [`HTTP2`].
    opened_bytes: usize,
}

impl Patient {
    fn new(stream: TcpStream, options: &ServeOptions) -> Self {
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

impl AsyncRead for Patient {
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

impl AsyncWrite for Patient {
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
        Pin::new(&mut self.stream).poll_shutdown(cx)
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
