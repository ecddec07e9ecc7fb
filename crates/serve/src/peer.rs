//! The other end of a connection: its bytes, and whether it is still there.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// How often to look for a peer's end behind bytes that nobody reads yet.
const LOOK: Duration = Duration::from_millis(100);

/// A connection that can be watched while somebody reads and writes.
#[derive(Debug)]
pub(crate) struct Peer {
    reads: Arc<OwnedReadHalf>,
    writes: OwnedWriteHalf,
}

/// Sees whether a [`Peer`] is still there.
#[derive(Debug, Clone)]
pub(crate) struct Watch(Arc<OwnedReadHalf>);

impl Peer {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let (reads, writes) = stream.into_split();
        let reads = Arc::new(reads);
        Self { reads, writes }
    }

    pub(crate) fn watch(&self) -> Watch {
        Watch(self.reads.clone())
    }
}

impl Watch {
    /// Ends once the peer has closed its side. HTTP finds that out by reading, which it does not
    /// do while it answers and the peer has sent more than the request.
    pub(crate) async fn gone(self) {
        loop {
            match self.0.ready(Interest::READABLE).await {
                Ok(ready) if !ready.is_read_closed() => tokio::time::sleep(LOOK).await,
                _ => return,
            }
        }
    }
}

impl AsyncRead for Peer {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream: &TcpStream = (*self.reads).as_ref();
        loop {
            ready!(stream.poll_read_ready(cx))?;
            match stream.try_read(buf.initialize_unfilled()) {
                Ok(bytes) => {
                    buf.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Peer {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writes).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writes).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.writes.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writes).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writes).poll_shutdown(cx)
    }
}
