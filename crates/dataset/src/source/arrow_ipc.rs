//! Arrow files, as `datasets` saves them: the stream format, or the file format, whose inside is a
//! stream too. Read in order; a resumed read passes over the batches before, undecoded.

use std::io::{self, Read};
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_ipc::{MetadataVersion, root_as_message};
use arrow_schema::ArrowError;

use super::arrow_rows::{ArrowRows, Leaves, has_supported};
use super::bytes::{self, Forward};
use super::files::{BatchReader, DataFile, Io};
use super::json_lines::is_damage;
use super::row::{Batch, Cursor};
use crate::{Error, Result};

/// What the file format begins with: a name, and zeros up to the first message.
const MAGIC: &[u8; 8] = b"ARROW1\0\0";
/// The widest alignment of that message.
const MAX_PADDING: usize = 512;
/// What stands before each message's length.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// The longest description of a message.
const MAX_METADATA: u32 = 16 << 20;
/// The largest batch: memory holds one.
const MAX_BODY: u64 = 256 << 20;
/// Rows handed on at a time.
const BATCH_ROWS: usize = 1024;

pub(super) fn open(file: &DataFile, start: Cursor, io: &Io) -> Result<Box<dyn BatchReader>> {
    let name = file.name.clone();
    let bytes = bytes::open(file, 0, io)?;
    let bytes = Framed::new(bytes, start.row).map_err(|err| read_error(&name, err))?;
    let reader = StreamReader::try_new(bytes, None).map_err(|err| damaged(&name, err))?;
    let fields = reader.schema();
    Leaves::of(&fields).warn(&name);
    let columns = (0..fields.fields().len())
        .filter(|&i| has_supported(fields.field(i).data_type()))
        .collect();
    let first = Cursor { row: 0, ..start };
    Ok(Box::new(ArrowReader {
        name,
        reader,
        columns,
        at: first,
        from: start.row,
        rest: None,
    }))
}

fn read_error(file: &str, err: io::Error) -> Error {
    if is_damage(err.kind()) {
        Error::corrupt(file, err.to_string())
    } else {
        Error::read(file, err)
    }
}

fn damaged(file: &str, err: ArrowError) -> Error {
    match err {
        ArrowError::IoError(_, err) => read_error(file, err),
        other => Error::corrupt(file, other.to_string()),
    }
}

struct ArrowReader {
    name: Arc<str>,
    reader: StreamReader<Framed>,
    /// The columns of which something can become JSON.
    columns: Vec<usize>,
    /// The place before `rest`.
    at: Cursor,
    /// Rows to drop.
    from: u64,
    /// Rows of a batch that are not handed on yet.
    rest: Option<RecordBatch>,
}

impl BatchReader for ArrowReader {
    fn next_batch(&mut self) -> Result<Option<Batch>> {
        loop {
            let batch = match self.rest.take() {
                Some(batch) => batch,
                None => match self.reader.next() {
                    Some(batch) => batch.map_err(|err| damaged(&self.name, err))?,
                    None => return Ok(None),
                },
            };
            self.at.row += std::mem::take(&mut self.reader.get_mut().passed_over);
            let skip = batch
                .num_rows()
                .min((self.from.saturating_sub(self.at.row)) as usize);
            let take = (batch.num_rows() - skip).min(BATCH_ROWS);
            self.at.row += skip as u64;
            let wanted = batch.slice(skip, take);
            let left = batch.num_rows() - skip - take;
            self.rest = (left > 0).then(|| batch.slice(skip + take, left));
            if take > 0 {
                return self.hand_on(&wanted).map(Some);
            }
        }
    }
}

impl ArrowReader {
    fn hand_on(&mut self, batch: &RecordBatch) -> Result<Batch> {
        let batch = batch
            .project(&self.columns)
            .map_err(|err| damaged(&self.name, err))?;
        let (file, first) = (self.name.clone(), self.at);
        self.at.row += batch.num_rows() as u64;
        Ok(Batch::arrow(ArrowRows { file, first, batch }))
    }
}

/// Passes a stream's bytes on, message by message. It leaves out the batches before the first row
/// wanted, and refuses a message whose own description asks for more memory than a batch may have:
/// the reader behind would believe it.
struct Framed {
    bytes: Box<dyn Forward>,
    /// Bytes that were read to see what they are.
    start: io::Cursor<Vec<u8>>,
    /// Bytes to hand out before anything more is read.
    ready: io::Cursor<Vec<u8>>,
    /// Bytes of the message's body that may pass unseen.
    body: u64,
    /// Rows before the first one wanted, less those of the batches left out.
    unwanted: u64,
    /// Rows left out that the reader has not been told of.
    passed_over: u64,
    ended: bool,
}

impl Framed {
    fn new(bytes: Box<dyn Forward>, unwanted: u64) -> io::Result<Self> {
        let mut framed = Self {
            bytes,
            start: io::Cursor::default(),
            ready: io::Cursor::default(),
            body: 0,
            unwanted,
            passed_over: 0,
            ended: false,
        };
        let mut start = framed.some(MAGIC.len() as u64)?;
        if start == MAGIC {
            start = framed.some(4)?;
            let mut padding = MAGIC.len();
            while start == [0; 4] && padding < MAX_PADDING {
                start = framed.some(4)?;
                padding += 4;
            }
        }
        framed.start = io::Cursor::new(start);
        Ok(framed)
    }

    /// Up to so many bytes, fewer only at the end.
    fn some(&mut self, bytes: u64) -> io::Result<Vec<u8>> {
        let mut some = Vec::new();
        let mut both = (&mut self.start).chain(&mut self.bytes);
        (&mut both).take(bytes).read_to_end(&mut some)?;
        Ok(some)
    }

    /// Reads and checks the description of the next message.
    fn message(&mut self) -> io::Result<()> {
        let mut head = self.some(4)?;
        if head.is_empty() {
            self.ended = true; // A stream may end without its mark.
            return Ok(());
        }
        if head == CONTINUATION {
            head.extend(self.some(4)?);
        }
        let length = head.last_chunk().copied().map(u32::from_le_bytes);
        let length = length.ok_or(io::ErrorKind::UnexpectedEof)?;
        if length > MAX_METADATA {
            return Err(invalid(format!(
                "a message's description has {length} bytes"
            )));
        }
        self.ended = length == 0;
        let description = self.some(u64::from(length))?;
        if description.len() < length as usize {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !self.ended {
            let Description {
                body,
                rows,
                compressed,
            } = Description::parse(&description)?;
            match rows {
                Some(rows) if rows <= self.unwanted => {
                    self.unwanted -= rows;
                    self.passed_over += rows;
                    return self.bytes.forward(body);
                }
                Some(_) => self.unwanted = 0, // The first row wanted is in this batch.
                None => {}
            }
            head.extend(description);
            if compressed.is_empty() {
                self.body = body;
            } else {
                let bytes = self.some(body)?;
                check_lengths(&bytes, &compressed)?;
                head.extend(bytes);
            }
        }
        self.ready = io::Cursor::new(head);
        Ok(())
    }
}

/// What a message says of itself.
struct Description {
    /// Bytes of its body.
    body: u64,
    /// Its rows, if it is a batch of them.
    rows: Option<u64>,
    /// Where in the body each buffer begins, if they are compressed.
    compressed: Vec<usize>,
}

impl Description {
    fn parse(bytes: &[u8]) -> io::Result<Self> {
        let message = root_as_message(bytes).map_err(|err| invalid(err.to_string()))?;
        let body = u64::try_from(message.bodyLength()).unwrap_or(u64::MAX);
        if body > MAX_BODY {
            return Err(too_large(body));
        }
        if message.version() < MetadataVersion::V4 {
            return Err(invalid("it was written by an Arrow before 0.8".to_owned()));
        }
        let rows = message.header_as_record_batch();
        let dictionary = message.header_as_dictionary_batch();
        let batch = rows.or_else(|| dictionary?.data());
        let buffers = batch
            .filter(|batch| batch.compression().is_some())
            .and_then(|batch| batch.buffers());
        let begins = |buffer: &arrow_ipc::Buffer| {
            let is_filled = buffer.length() > 0;
            is_filled.then(|| usize::try_from(buffer.offset()).unwrap_or(usize::MAX))
        };
        let rows = rows.and_then(|batch| u64::try_from(batch.length()).ok());
        let compressed = buffers.map(|buffers| buffers.iter().filter_map(begins).collect());
        Ok(Self {
            body,
            rows,
            compressed: compressed.unwrap_or_default(),
        })
    }
}

/// A compressed buffer begins with the length that it will have, and memory is taken for it.
fn check_lengths(body: &[u8], begins: &[usize]) -> io::Result<()> {
    let mut sum: u64 = 0;
    for &begin in begins {
        let length = body.get(begin..).and_then(<[u8]>::first_chunk);
        match length.copied().map(i64::from_le_bytes) {
            Some(-1) => {} // it is not compressed after all
            Some(length) => sum = sum.saturating_add(u64::try_from(length).unwrap_or(u64::MAX)),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
    if sum > MAX_BODY {
        return Err(too_large(sum));
    }
    Ok(())
}

fn too_large(bytes: u64) -> io::Error {
    let limit = MAX_BODY >> 20;
    invalid(format!(
        "a batch of {bytes} bytes is over the limit of {limit} MB"
    ))
}

fn invalid(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

impl Read for Framed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.ready.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            if self.body > 0 {
                let most = buffer
                    .len()
                    .min(usize::try_from(self.body).unwrap_or(usize::MAX));
                let read = self.bytes.read(&mut buffer[..most])?;
                self.body -= read as u64;
                if read == 0 {
                    self.ended = true;
                    self.body = 0;
                }
                return Ok(read);
            }
            if self.ended {
                return Ok(0);
            }
            self.message()?;
        }
    }
}
