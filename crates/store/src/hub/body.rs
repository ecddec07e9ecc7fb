//! The body of a range's answer: whether it is the range, where in it that begins, when it is lost.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use reqwest::Response;
use reqwest::header::CONTENT_RANGE;

use super::repo::RepoFile;
use super::request::header;
use crate::{BoxError, Result};

/// Checks that a partial answer begins where asked and speaks of a file of the size listed.
pub(super) fn check_content_range(
    answer: &Response,
    range: &Range<u64>,
    file: &RepoFile,
) -> Result<(), String> {
    let found = header(answer.headers(), CONTENT_RANGE.as_str()).unwrap_or("nothing");
    let parsed = found.strip_prefix("bytes ").and_then(|rest| {
        let (span, total) = rest.split_once('/')?;
        let start: u64 = span.split_once('-')?.0.parse().ok()?;
        Some((start, total.parse::<u64>().ok()))
    });
    match parsed {
        Some((start, total))
            if start == range.start && total.is_none_or(|total| total == file.size) =>
        {
            Ok(())
        }
        _ => Err(format!(
            "the range '{found}' instead of bytes {}-{} of {}",
            range.start,
            range.end - 1,
            file.size
        )),
    }
}

/// Leaves out the first bytes of a body.
pub(super) fn skip_bytes(
    body: BoxStream<'static, Result<Bytes, BoxError>>,
    skip: u64,
) -> BoxStream<'static, Result<Bytes, BoxError>> {
    if skip == 0 {
        return body;
    }
    body.scan(skip, |left, chunk| {
        let chunk = chunk.map(|mut bytes| {
            let skipped = bytes
                .len()
                .min(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= skipped as u64;
            bytes.split_off(skipped)
        });
        futures::future::ready(Some(chunk))
    })
    .boxed()
}

/// Ends a body with an error when nothing of it comes for so long.
pub(super) fn unless_silent(
    body: BoxStream<'static, Result<Bytes, BoxError>>,
    stall: Duration,
) -> BoxStream<'static, Result<Bytes, BoxError>> {
    stream::unfold(Some(body), move |body| async move {
        let mut body = body?;
        match tokio::time::timeout(stall, body.next()).await {
            Ok(next) => next.map(|chunk| (chunk, Some(body))),
            Err(_) => Some((
                Err(format!("nothing came for {} s", stall.as_secs_f32()).into()),
                None,
            )),
        }
    })
    .boxed()
}
