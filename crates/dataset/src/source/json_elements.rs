//! JSON files: an array of objects, or objects one after the other, found by a scanner that
//! keeps one record in memory.

use std::io::Read;
use std::sync::Arc;

use memchr::memchr2;

use super::bytes::{self, Forward};
use super::files::{BatchReader, DataFile, Io};
use super::json_lines::is_damage;
use super::row::{Batch, Cursor, MAX_ROW_BYTES, Origin, Row, parse_record, too_long};
use crate::{Error, Result};

/// Bytes asked of the file at a time.
const BLOCK_BYTES: usize = 256 << 10;
/// A batch is handed out when its records have this many bytes.
const BATCH_BYTES: usize = 512 << 10;

pub(super) fn open(file: &DataFile, start: Cursor, io: &Io) -> Result<Box<dyn BatchReader>> {
    let mut reader = ElementReader {
        name: file.name.clone(),
        bytes: bytes::open(file, start.byte, io)?,
        at: start,
        block: Vec::new(),
        used: 0,
        ended: false,
        inside: false,
    };
    // Between two records the commas of an array are skipped anyway, so only its bracket tells
    // whether the end of the file may come without one.
    reader.inside = if start.byte == 0 {
        reader.enter_array()?
    } else {
        starts_with_bracket(file, io)?
    };
    Ok(Box::new(reader))
}

fn starts_with_bracket(file: &DataFile, io: &Io) -> Result<bool> {
    let mut first = ElementReader {
        name: file.name.clone(),
        bytes: bytes::open(file, 0, io)?,
        at: Cursor::default(),
        block: Vec::new(),
        used: 0,
        ended: false,
        inside: false,
    };
    first.enter_array()
}

struct ElementReader {
    name: Arc<str>,
    bytes: Box<dyn Forward>,
    /// The place of `block[used]`; `row` counts records.
    at: Cursor,
    block: Vec<u8>,
    used: usize,
    ended: bool,
    /// Inside an array's brackets.
    inside: bool,
}

/// A record's bytes, or why they were dropped, and the place after it.
struct Element {
    bytes: Result<Vec<u8>, String>,
    next: Cursor,
}

impl BatchReader for ElementReader {
    fn next_batch(&mut self) -> Result<Option<Batch>> {
        let mut elements = Vec::new();
        let mut size = 0;
        while size < BATCH_BYTES {
            let Some(element) = self.element()? else {
                break;
            };
            size += element.bytes.as_ref().map_or(0, Vec::len);
            elements.push(element);
        }
        if elements.is_empty() {
            return Ok(None);
        }
        let name = self.name.clone();
        let parse = move || {
            let rows = elements.into_iter().map(|element| element.row(&name));
            rows.collect()
        };
        Ok(Some(Batch::deferred(parse).with_bytes(size)))
    }
}

impl Element {
    fn row(self, file: &Arc<str>) -> Row {
        Row {
            origin: Origin {
                file: file.clone(),
                position: self.next.row,
            },
            next: self.next,
            value: self.bytes.and_then(|bytes| parse_record(&bytes)),
        }
    }
}

impl ElementReader {
    /// Skips a byte-order mark and the opening bracket, if there is one.
    fn enter_array(&mut self) -> Result<bool> {
        self.peek()?;
        if self.block.starts_with(b"\xef\xbb\xbf") {
            self.advance(3);
        }
        self.skip_while(|b| b.is_ascii_whitespace())?;
        let array = self.peek()? == Some(b'[');
        if array {
            self.advance(1);
        }
        Ok(array)
    }

    /// The next record: from its first byte to the one before the comma, bracket or record that
    /// follows at the same depth.
    fn element(&mut self) -> Result<Option<Element>> {
        self.skip_while(|b| b.is_ascii_whitespace() || b == b',')?;
        match self.peek()? {
            None if self.inside => {
                return Err(Error::corrupt(
                    &*self.name,
                    format!(
                        "the array has no end after record {}: fetch the file again",
                        self.at.row
                    ),
                ));
            }
            None => return Ok(None),
            Some(b']') if self.inside => return Ok(None),
            Some(_) => {}
        }
        let mut scan = Scan::default();
        let mut bytes = Vec::new();
        let mut long = false;
        while self.peek()?.is_some() {
            let rest = &self.block[self.used..];
            let (taken, done) = scan.take(rest);
            if !long {
                bytes.extend_from_slice(&rest[..taken]);
            }
            if bytes.len() > MAX_ROW_BYTES {
                (long, bytes) = (true, Vec::new());
            }
            self.advance(taken);
            if done {
                break;
            }
        }
        self.at.row += 1;
        let bytes = if long { Err(too_long()) } else { Ok(bytes) };
        Ok(Some(Element {
            bytes,
            next: self.at,
        }))
    }

    fn skip_while(&mut self, skip: impl Fn(u8) -> bool) -> Result<()> {
        while let Some(byte) = self.peek()? {
            if !skip(byte) {
                break;
            }
            self.advance(1);
        }
        Ok(())
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        if self.used == self.block.len() && !self.ended {
            self.block.clear();
            self.used = 0;
            let read = (&mut self.bytes)
                .take(BLOCK_BYTES as u64)
                .read_to_end(&mut self.block);
            match read {
                Ok(_) => self.ended = self.block.len() < BLOCK_BYTES,
                Err(err) if is_damage(err.kind()) => {
                    return Err(Error::corrupt(&*self.name, err.to_string()));
                }
                Err(err) => return Err(Error::read(&*self.name, err)),
            }
        }
        Ok(self.block.get(self.used).copied())
    }

    fn advance(&mut self, bytes: usize) {
        self.used += bytes;
        self.at.byte += bytes as u64;
    }
}

/// Follows strings and brackets to the end of one JSON value.
#[derive(Default)]
struct Scan {
    depth: u32,
    in_string: bool,
    escaped: bool,
    started: bool,
}

impl Scan {
    /// How many of `bytes` belong to the value, and whether it ends there.
    fn take(&mut self, bytes: &[u8]) -> (usize, bool) {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.in_string {
                at += self.string(&bytes[at..]);
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                // A bare value ends where its array does.
                b']' | b'}' if self.depth == 0 => return (at + usize::from(!self.started), true),
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                b',' | b'\n' if self.depth == 0 => return (at, true),
                _ => {}
            }
            self.started = true;
            at += 1;
        }
        (bytes.len(), false)
    }

    /// How many of `bytes`, which begin inside a string, to skip: up to its end or an escape.
    fn string(&mut self, bytes: &[u8]) -> usize {
        if std::mem::take(&mut self.escaped) {
            return 1;
        }
        let Some(at) = memchr2(b'"', b'\\', bytes) else {
            return bytes.len();
        };
        self.escaped = bytes[at] == b'\\';
        self.in_string = self.escaped;
        at + 1
    }
}
