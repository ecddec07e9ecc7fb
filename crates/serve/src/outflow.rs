//! Answers over HTTP/2 whose client takes no more of them.
//!
//! Over HTTP/1 a client that reads nothing stops the connection, which [`connections`] times.
//! Over HTTP/2 it only closes the window of one stream: the connection lives, nothing asks the
//! answer for more, and so nothing in it would ever notice the time.
//!
//! [`connections`]: crate::connections

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::Version;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;

use crate::app::App;
use crate::error::BoxError;

/// What is handed on at once. What is not handed on yet is dropped when the client stalls.
const PIECE_BYTES: usize = 16 << 10;

type Piece = Result<Bytes, BoxError>;

/// Gives every stream of an HTTP/2 connection the patience that an HTTP/1 connection gets.
pub(crate) async fn outflow(State(app): State<App>, request: Request, next: Next) -> Response {
    let is_http2 = request.version() == Version::HTTP_2;
    let response = next.run(request).await;
    if !is_http2 {
        return response;
    }
    let (write, request) = (app.options.write_timeout, app.options.request_timeout);
    let patience = request.map_or(write, |request| request.min(write));
    response.map(|body| supervised(body, patience))
}

/// The same body, made by a task of its own, which gives up when nobody takes what it made.
fn supervised(body: Body, patience: Duration) -> Body {
    let is_small = |bytes: u64| bytes <= PIECE_BYTES as u64;
    if body.size_hint().exact().is_some_and(is_small) {
        return body;
    }
    let (taken, pieces) = mpsc::channel(1);
    let has_stalled = Arc::new(AtomicBool::new(false));
    tokio::spawn(hand_on(body, taken, patience, has_stalled.clone()));
    let rest = (pieces, has_stalled);
    Body::from_stream(stream::unfold(rest, |(mut pieces, has_stalled)| async {
        let piece: Piece = match pieces.recv().await {
            Some(piece) => piece,
            // Or a part would look like the whole.
            None if has_stalled.swap(false, Ordering::SeqCst) => {
                Err("the client took nothing for too long".into())
            }
            None => return None,
        };
        Some((piece, (pieces, has_stalled)))
    }))
}

/// Until the body ends, the client goes, or it takes nothing for too long. The body is dropped
/// then, and with it everything it holds.
async fn hand_on(
    body: Body,
    taken: mpsc::Sender<Piece>,
    patience: Duration,
    has_stalled: Arc<AtomicBool>,
) {
    let mut frames = body.into_data_stream();
    loop {
        let frame = tokio::select! {
            frame = frames.next() => frame,
            () = taken.closed() => return,
        };
        let pieces: Vec<Piece> = match frame {
            None => return,
            Some(Ok(bytes)) => split(bytes).map(Ok).collect(),
            Some(Err(error)) => vec![Err(error.into())],
        };
        for piece in pieces {
            match tokio::time::timeout(patience, taken.send(piece)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => {
                    tracing::info!("an answer is dropped: its client takes nothing of it");
                    has_stalled.store(true, Ordering::SeqCst);
                    return;
                }
            }
        }
    }
}

fn split(mut bytes: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_comes_through_whole_or_ends_in_an_error() {
        let long: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
        let patience = Duration::from_secs(60);
        let body = || supervised(Body::from(long.clone()), patience);
        let whole = axum::body::to_bytes(body(), usize::MAX).await;
        assert_eq!(whole.expect("it is taken"), long);

        let mut stalled = body().into_data_stream();
        let first = stalled.next().await.expect("a piece").expect("no error");
        assert_eq!(first.len(), PIECE_BYTES);
        tokio::time::sleep(2 * patience).await;
        let rest: Vec<_> = stalled.collect().await;
        assert!(rest.len() < 4 && rest.last().expect("an end").is_err());
    }
}
