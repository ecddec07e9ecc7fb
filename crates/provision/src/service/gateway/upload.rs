//! A request's body on its way: passed on as it comes, and kept for as long as it may be sent again.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::time::Instant;

use crate::error::BoxError;

/// Bodies up to this size are kept, so that the request can be sent to another replica; of a longer one
/// nothing is kept, and it is sent once.
pub(super) const REPLAY_BYTES: usize = 1024 * 1024;

/// A client's body, which one replica after the other may be sent.
#[derive(Clone, Debug)]
pub(super) struct Upload(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    source: Incoming,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    /// The attempt that is passed on; a replica that was given up gets no more.
    attempt: u32,
    /// Whether it can no longer be sent from its beginning.
    is_spilled: bool,
    /// Whether the client has broken off.
    is_broken: bool,
    is_over: bool,
    /// Whether the replica waits for the client, and not the other way round.
    waits_for_client: bool,
    /// When the body last went on.
    moved: Instant,
}

impl Upload {
    pub(super) fn new(source: Incoming) -> Self {
        Self(Arc::new(Mutex::new(State {
            is_over: source.is_end_stream(),
            source,
            kept: Vec::new(),
            kept_bytes: 0,
            attempt: 0,
            is_spilled: false,
            is_broken: false,
            waits_for_client: false,
            moved: Instant::now(),
        })))
    }

    /// The body from its beginning, for the next replica; the one before gets no more of it.
    pub(super) fn attempt(&self) -> Attempt {
        let mut state = self.state();
        state.attempt += 1;
        state.moved = Instant::now();
        state.waits_for_client = false;
        let kept = state.kept_bytes as u64;
        let length = state.source.size_hint().exact().map(|rest| rest + kept);
        Attempt {
            upload: self.clone(),
            number: state.attempt,
            next: 0,
            left: length,
        }
    }

    /// Whether it can be sent again.
    pub(super) fn can_be_repeated(&self) -> bool {
        let state = self.state();
        !state.is_spilled && !state.is_broken
    }

    /// Whether the client has broken off.
    pub(super) fn is_broken(&self) -> bool {
        self.state().is_broken
    }

    /// Waits until the replica has been owing something for so long: an answer, or to take the next piece
    /// of the body. A client that is slow is not its fault.
    pub(super) async fn owed_for(&self, limit: Duration) {
        loop {
            let due = {
                let mut state = self.state();
                if state.waits_for_client {
                    state.moved = Instant::now();
                }
                state.moved + limit
            };
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The next piece from the client.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>> {
        loop {
            let frame = Pin::new(&mut self.source).poll_frame(context);
            self.waits_for_client = frame.is_pending();
            let frame = ready!(frame);
            self.moved = Instant::now();
            let data = match frame {
                None => {
                    self.is_over = true;
                    return Poll::Ready(None);
                }
                Some(Err(error)) => {
                    self.is_broken = true;
                    return Poll::Ready(Some(Err(error.into())));
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => data,
                    Err(_) => continue, // trailers are of this connection
                },
            };
            if !self.is_spilled && self.kept_bytes + data.len() <= REPLAY_BYTES {
                self.kept_bytes += data.len();
                self.kept.push(data.clone());
            } else {
                self.is_spilled = true;
                self.kept = Vec::new();
            }
            return Poll::Ready(Some(Ok(data)));
        }
    }
}

/// The body as one replica gets it.
#[derive(Debug)]
pub(super) struct Attempt {
    upload: Upload,
    number: u32,
    /// The next of the kept pieces.
    next: usize,
    /// What is still to come, where the client has said how much there is.
    left: Option<u64>,
}

impl Body for Attempt {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let mut state = this.upload.state();
        if state.attempt != this.number {
            return Poll::Ready(Some(Err("another replica is asked".into())));
        }
        let piece = match state.kept.get(this.next).cloned() {
            Some(kept) => {
                state.moved = Instant::now();
                Some(Ok(kept))
            }
            None if state.is_over => None,
            None => ready!(state.poll(context)),
        };
        this.next += 1;
        if let (Some(left), Some(Ok(piece))) = (&mut this.left, &piece) {
            *left = left.saturating_sub(piece.len() as u64);
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        let state = self.upload.state();
        state.attempt == self.number && state.is_over && self.next >= state.kept.len()
    }

    fn size_hint(&self) -> SizeHint {
        self.left
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
