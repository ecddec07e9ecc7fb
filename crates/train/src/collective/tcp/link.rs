//! A TCP connection between two workers: read at all times, and never silent for long.
//!
//! Each end reads on a thread of its own, so that nobody who sends waits for a worker that is busy; and says a word every
//! now and then, so that a worker that evaluates or writes a checkpoint is not taken for one that is gone.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::collective::inbox::{Inbox, gone};
use crate::collective::mesh::Link;

/// Bytes of a frame, at most.
const MAX_FRAME: usize = 1 << 20;
/// Words that are said while the other side would wait for one.
const WORDS_IN_SILENCE: u32 = 6;

/// One end of a connection.
#[derive(Debug)]
pub(super) struct TcpLink {
    wire: Arc<Wire>,
    inbox: Inbox,
    /// The words end when this is dropped.
    _words: Sender<()>,
}

/// What goes over it: a length in four bytes, and as many bytes. A word is a frame of none.
#[derive(Debug)]
struct Wire {
    stream: TcpStream,
    /// Held while a frame is sent, so that no word comes between its bytes.
    sending: Mutex<()>,
    /// Words that came from the other side.
    #[cfg(test)]
    words: std::sync::atomic::AtomicUsize,
}

impl TcpLink {
    /// Takes over a connection, whose other side is taken for dead when nothing comes from it for so long.
    pub(super) fn new(stream: TcpStream, silence: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(silence))?;
        // Whoever lives reads, so a frame that does not get away in this time never will.
        stream.set_write_timeout(Some(silence))?;
        let wire = Arc::new(Wire {
            stream,
            sending: Mutex::default(),
            #[cfg(test)]
            words: Default::default(),
        });
        let (to_inbox, incoming) = channel();
        let reading = Arc::clone(&wire);
        let name = || thread::Builder::new().name("updraft-worker".to_owned());
        name().spawn(move || reading.read_all(silence, &to_inbox))?;
        let (words, ended) = channel::<()>();
        let talking = Arc::clone(&wire);
        name().spawn(move || {
            let pause = silence / WORDS_IN_SILENCE;
            while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                talking.say_word();
            }
        })?;
        Ok(Self {
            wire,
            inbox: Inbox::new(incoming),
            _words: words,
        })
    }

    #[cfg(test)]
    pub(super) fn words(&self) -> impl Fn() -> usize + use<> {
        let wire = Arc::clone(&self.wire);
        move || wire.words.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl Link for TcpLink {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        bytes
            .chunks(MAX_FRAME)
            .try_for_each(|frame| self.wire.send_frame(frame))
    }

    fn receive(&self, bytes: &mut [u8]) -> io::Result<()> {
        self.inbox.take(bytes)
    }

    fn close(&self) {
        // It fails only where the other side has closed it already.
        let _ = self.wire.stream.shutdown(Shutdown::Both);
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        // What was sent still arrives, and the other side hears that no more will come. The reading thread ends when the
        // other side does the same: a connection closed with bytes unread would take back what is on its way.
        let _ = self.wire.stream.shutdown(Shutdown::Write);
    }
}

impl Wire {
    fn send_frame(&self, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).expect("a frame is short");
        let mut frame = Vec::with_capacity(4 + bytes.len());
        frame.extend_from_slice(&len.to_le_bytes());
        frame.extend_from_slice(bytes);
        let _one_by_one = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        (&self.stream).write_all(&frame)
    }

    /// Says that this side lives, unless a frame that is under way says as much.
    fn say_word(&self) {
        if let Ok(_one_by_one) = self.sending.try_lock() {
            // A failure shows where something is sent or received.
            let _ = (&self.stream).write_all(&0_u32.to_le_bytes());
        }
    }

    /// Hands on all that comes, to the end.
    fn read_all(&self, silence: Duration, to_inbox: &Sender<io::Result<Vec<u8>>>) {
        loop {
            let frame = match self.read_frame() {
                Ok(frame) if frame.is_empty() => {
                    #[cfg(test)]
                    self.words
                        .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    continue;
                }
                Ok(frame) => Ok(frame),
                Err(error) => Err(explained(error, silence)),
            };
            let is_over = frame.is_err();
            // A link that was dropped has nobody who would take it.
            let _ = to_inbox.send(frame);
            if is_over {
                return;
            }
        }
    }

    fn read_frame(&self) -> io::Result<Vec<u8>> {
        let mut len = [0; 4];
        (&self.stream).read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > MAX_FRAME {
            let what = format!("a frame of {len} bytes: it is no worker of this version");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let mut frame = vec![0; len];
        (&self.stream).read_exact(&mut frame)?;
        Ok(frame)
    }
}

fn explained(error: io::Error, silence: Duration) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => gone(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            let what = format!(
                "no word for {silence:?}: its process stands still, its machine is gone, or the network between is"
            );
            io::Error::new(io::ErrorKind::TimedOut, what)
        }
        _ => error,
    }
}
