//! What the other side has sent and nobody has asked for yet.

use std::io;
use std::sync::Mutex;
use std::sync::mpsc::Receiver;

/// Bytes in the order they came, taken in pieces of any size.
#[derive(Debug)]
pub(super) struct Inbox(Mutex<Incoming>);

#[derive(Debug)]
struct Incoming {
    receiver: Receiver<io::Result<Vec<u8>>>,
    left: Vec<u8>,
}

impl Inbox {
    pub(super) fn new(receiver: Receiver<io::Result<Vec<u8>>>) -> Self {
        let left = Vec::new();
        Self(Mutex::new(Incoming { receiver, left }))
    }

    /// Waits for the next `bytes.len()` bytes.
    pub(super) fn take(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut incoming = self.0.lock().map_err(|_| gone())?;
        while incoming.left.len() < bytes.len() {
            let more = incoming.receiver.recv().map_err(|_| gone())??;
            incoming.left.extend(more);
        }
        bytes.copy_from_slice(&incoming.left[..bytes.len()]);
        incoming.left.drain(..bytes.len());
        Ok(())
    }
}

pub(super) fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the worker has ended")
}
