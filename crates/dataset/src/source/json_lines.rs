//! Line formats: JSON Lines and plain text.
//!
//! The reading thread only finds line ends; parsing waits in the batch.

use std::io::{ErrorKind, Read};
use std::sync::Arc;

use memchr::{memchr, memchr_iter, memrchr};
use serde_json::{Map, Value};

use super::bytes::{self, Forward};
use super::files::{BatchReader, DataFile, Io};
use super::row::{Batch, Cursor, MAX_ROW_BYTES, Origin, Row, parse_record, too_long};
use crate::{Error, Result};

/// Bytes asked of the file at a time; a batch has at least one line and about this many bytes.
const BLOCK_BYTES: usize = 512 << 10;

/// What a line is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Line {
    Json,
    Text,
}

pub(super) fn open(
    file: &DataFile,
    start: Cursor,
    io: &Io,
    line: Line,
) -> Result<Box<dyn BatchReader>> {
    let bytes = bytes::open(file, start.byte, io)?;
    Ok(Box::new(LineReader {
        name: file.name.clone(),
        bytes,
        line,
        at: start,
        rest: Vec::new(),
        ended: false,
    }))
}

struct LineReader {
    name: Arc<str>,
    bytes: Box<dyn Forward>,
    line: Line,
    /// The place of the first byte of `rest`.
    at: Cursor,
    /// Bytes read after the last line end.
    rest: Vec<u8>,
    ended: bool,
}

impl BatchReader for LineReader {
    fn next_batch(&mut self) -> Result<Option<Batch>> {
        let mut block = std::mem::take(&mut self.rest);
        let mut searched = 0;
        loop {
            self.read_block(&mut block)?;
            let known = std::mem::replace(&mut searched, block.len());
            let end = match memrchr(b'\n', &block[known..]) {
                Some(last) => known + last + 1,
                None if self.ended => block.len(),
                None if block.len() > MAX_ROW_BYTES => {
                    return self.skip_long_line(block.len() as u64).map(Some);
                }
                None => continue,
            };
            if end == 0 {
                return Ok(None);
            }
            self.rest = block.split_off(end);
            return Ok(Some(self.batch(block)));
        }
    }
}

impl LineReader {
    /// Appends up to a block to `block`; sets `ended` at the end of the file.
    fn read_block(&mut self, block: &mut Vec<u8>) -> Result<()> {
        let wanted = block.len() + BLOCK_BYTES;
        let mut limited = (&mut self.bytes).take(BLOCK_BYTES as u64);
        match limited.read_to_end(block) {
            Ok(_) => self.ended = block.len() < wanted,
            Err(err) if is_damage(err.kind()) => {
                return Err(Error::corrupt(&*self.name, err.to_string()));
            }
            Err(err) => return Err(Error::read(&*self.name, err)),
        }
        Ok(())
    }

    /// Hands out a block of whole lines.
    fn batch(&mut self, block: Vec<u8>) -> Batch {
        let (name, line, start) = (self.name.clone(), self.line, self.at);
        self.at.byte += block.len() as u64;
        // A last line without line end counts as a line.
        self.at.row +=
            memchr_iter(b'\n', &block).count() as u64 + u64::from(!block.ends_with(b"\n"));
        let bytes = block.len();
        Batch::deferred(move || parse_lines(&name, start, &block, line)).with_bytes(bytes)
    }

    /// Drops a line over the limit of which `seen` bytes were read, keeping nothing of it.
    fn skip_long_line(&mut self, seen: u64) -> Result<Batch> {
        let mut long = seen;
        loop {
            let mut block = Vec::new();
            self.read_block(&mut block)?;
            let end = memchr(b'\n', &block).map(|at| at + 1);
            long += end.unwrap_or(block.len()) as u64;
            if end.is_some() || self.ended {
                self.rest = block.split_off(end.unwrap_or(block.len()));
                break;
            }
        }
        self.at.byte += long;
        self.at.row += 1;
        let origin = Origin {
            file: self.name.clone(),
            position: self.at.row,
        };
        Ok(Batch::new(vec![Row {
            origin,
            next: self.at,
            value: Err(too_long()),
        }]))
    }
}

/// Whether an error means that the compressed bytes are wrong, not that reading failed.
pub(super) fn is_damage(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof
    )
}

fn parse_lines(file: &Arc<str>, start: Cursor, block: &[u8], kind: Line) -> Vec<Row> {
    let mut next = start;
    let mut rows = Vec::new();
    for line in lines(block) {
        let first = next.byte == 0;
        next.byte += line.len() as u64;
        next.row += 1;
        let line = if first {
            line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line)
        } else {
            line
        };
        let text = line.trim_ascii_end();
        if text.trim_ascii_start().is_empty() {
            continue;
        }
        let value = match kind {
            _ if line.len() > MAX_ROW_BYTES => Err(too_long()),
            Line::Json => parse_record(text),
            Line::Text => parse_text(line),
        };
        rows.push(Row {
            origin: Origin {
                file: file.clone(),
                position: next.row,
            },
            next,
            value,
        });
    }
    rows
}

/// The lines of a block, each with its end.
fn lines(block: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = memchr_iter(b'\n', block).map(|at| at + 1);
    let tail = (!block.ends_with(b"\n")).then_some(block.len());
    ends.chain(tail).scan(0, |start, end| {
        let line = &block[*start..end];
        *start = end;
        Some(line)
    })
}

fn parse_text(line: &[u8]) -> Result<Map<String, Value>, String> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let text = std::str::from_utf8(line).map_err(|err| format!("not UTF-8: {err}"))?;
    Ok(Map::from_iter([("text".to_owned(), Value::from(text))]))
}
