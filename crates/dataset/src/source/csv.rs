//! CSV and TSV with a header line; every column is a string.

use std::collections::HashMap;
use std::io::Read as _;
use std::sync::Arc;

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::bytes::{self, Forward};
use super::files::{BatchReader, DataFile, Io};
use super::json_lines::is_damage;
use super::row::{Batch, Cursor, MAX_ROW_BYTES, Origin, Row, too_long};
use crate::{Error, Result};

/// Bytes asked of the file at a time.
const BLOCK_BYTES: usize = 128 << 10;
/// A batch is handed out when its records have this many bytes.
const BATCH_BYTES: usize = 512 << 10;
/// What a field takes beside its text.
const FIELD_BYTES: usize = 64;
/// More fields than any table has columns: the rest of such a record is not kept.
const MAX_FIELDS: usize = 1 << 20;

pub(super) fn open(
    file: &DataFile,
    start: Cursor,
    io: &Io,
    delimiter: u8,
) -> Result<Box<dyn BatchReader>> {
    let mut records = Records::new(file, 0, io, delimiter)?;
    let columns = match records.next()? {
        Record::Fields => header(&file.name, records.fields())?,
        Record::TooLong => {
            let problem = format!("its header is {}", too_long());
            return Err(Error::corrupt(&*file.name, problem));
        }
        Record::None => Arc::default(),
    };
    if start.byte > 0 {
        records = Records::new(file, start.byte, io, delimiter)?;
    }
    records.number = start.row;
    Ok(Box::new(CsvReader {
        file: start.file,
        columns,
        records,
    }))
}

/// The columns' names. Of equal ones the later get a number.
fn header<'a>(file: &str, fields: impl Iterator<Item = &'a [u8]>) -> Result<Arc<[String]>> {
    let mut names = Vec::new();
    // The number to try next for a name that is taken.
    let mut taken: HashMap<String, u32> = HashMap::new();
    for field in fields {
        let field = field.strip_prefix(b"\xef\xbb\xbf").unwrap_or(field);
        let name = std::str::from_utf8(field)
            .map_err(|err| Error::corrupt(file, format!("a column name is not UTF-8: {err}")))?;
        let mut free = name.to_owned();
        while taken.contains_key(&free) {
            let number = taken.entry(name.to_owned()).or_default();
            *number += 1;
            free = format!("{name}.{number}");
        }
        taken.insert(free.clone(), 0);
        names.push(free);
    }
    Ok(names.into())
}

struct CsvReader {
    file: u32,
    columns: Arc<[String]>,
    records: Records,
}

impl BatchReader for CsvReader {
    fn next_batch(&mut self) -> Result<Option<Batch>> {
        let (mut rows, mut size) = (Vec::new(), 0);
        while size < BATCH_BYTES {
            let before = self.records.byte;
            let value = match self.records.next()? {
                Record::None => break,
                Record::TooLong => Err(too_long()),
                Record::Fields => self.value(),
            };
            // An empty field takes memory too.
            let read = usize::try_from(self.records.byte - before).unwrap_or(usize::MAX);
            size += read.min(MAX_ROW_BYTES) + self.records.num_fields * FIELD_BYTES;
            rows.push(self.row(value));
        }
        Ok((!rows.is_empty()).then(|| Batch::new(rows).with_bytes(size)))
    }
}

impl CsvReader {
    fn row(&self, value: Result<Map<String, Value>, String>) -> Row {
        let next = Cursor {
            file: self.file,
            byte: self.records.byte,
            row: self.records.number,
        };
        let origin = Origin {
            file: self.records.name.clone(),
            position: next.row,
        };
        Row {
            origin,
            next,
            value,
        }
    }

    fn value(&self) -> Result<Map<String, Value>, String> {
        let (fields, columns) = (self.records.num_fields, self.columns.len());
        if fields != columns {
            return Err(format!("{fields} fields where the header has {columns}"));
        }
        let field = |(name, field): (&String, &[u8])| {
            let text = std::str::from_utf8(field)
                .map_err(|err| format!("column {name} is not UTF-8: {err}"))?;
            Ok((name.clone(), Value::from(text)))
        };
        self.columns
            .iter()
            .zip(self.records.fields())
            .map(field)
            .collect()
    }
}

/// A file's records, one at a time.
struct Records {
    name: Arc<str>,
    bytes: Box<dyn Forward>,
    core: Reader,
    /// What was read and how much of it is parsed.
    block: Vec<u8>,
    parsed: usize,
    ended: bool,
    /// The place after the record at hand, and its number, from 1.
    byte: u64,
    number: u64,
    /// The record's unquoted bytes, and where each field ends in them.
    text: Vec<u8>,
    len: usize,
    ends: Vec<usize>,
    num_fields: usize,
}

enum Record {
    Fields,
    /// Over the limit; nothing of it is kept.
    TooLong,
    /// The file has ended.
    None,
}

impl Records {
    fn new(file: &DataFile, start: u64, io: &Io, delimiter: u8) -> Result<Self> {
        let mut core = ReaderBuilder::new().delimiter(delimiter).build();
        if start > 0 {
            // Only a file's own first bytes are a byte-order mark; an empty line is nothing.
            core.read_record(b"\n", &mut [0; 8], &mut [0; 1]);
        }
        Ok(Self {
            name: file.name.clone(),
            bytes: bytes::open(file, start, io)?,
            core,
            block: Vec::new(),
            parsed: 0,
            ended: false,
            byte: start,
            number: 0,
            text: vec![0; BLOCK_BYTES],
            len: 0,
            ends: vec![0; 64],
            num_fields: 0,
        })
    }

    /// The fields of the record at hand.
    fn fields(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.ends[..self.num_fields].iter().map(move |&end| {
            let field = &self.text[start..end];
            start = end;
            field
        })
    }

    fn next(&mut self) -> Result<Record> {
        (self.len, self.num_fields) = (0, 0);
        let mut too_long = false;
        loop {
            if self.parsed == self.block.len() && !self.ended {
                self.read_block()?;
            }
            if self.ended {
                return Ok(match self.has_last()? {
                    true => self.whole(too_long),
                    false => Record::None,
                });
            }
            let (result, read, written, fields) = self.core.read_record(
                &self.block[self.parsed..],
                &mut self.text[self.len..],
                &mut self.ends[self.num_fields..],
            );
            self.parsed += read;
            self.byte += read as u64;
            self.len += written;
            self.num_fields += fields;
            // Room for one more byte and field at least, or none of the record is kept.
            if self.len == self.text.len() {
                match self.len > MAX_ROW_BYTES {
                    true => (too_long, self.len) = (true, 0),
                    false => self.text.resize(2 * self.len, 0),
                }
            }
            if self.num_fields == self.ends.len() {
                match self.num_fields > MAX_FIELDS {
                    true => (too_long, self.num_fields) = (true, 0),
                    false => self.ends.resize(2 * self.num_fields, 0),
                }
            }
            if result == ReadRecordResult::Record {
                return Ok(self.whole(too_long));
            }
        }
    }

    /// What a record is that has come to its end.
    fn whole(&mut self, too_long: bool) -> Record {
        self.number += 1;
        if !too_long && self.len <= MAX_ROW_BYTES {
            return Record::Fields;
        }
        self.text = vec![0; BLOCK_BYTES];
        self.ends = vec![0; 64];
        (self.len, self.num_fields) = (0, 0);
        Record::TooLong
    }

    fn read_block(&mut self) -> Result<()> {
        self.block.resize(BLOCK_BYTES, 0);
        let read = self
            .bytes
            .read(&mut self.block)
            .map_err(|err| match err.kind() {
                kind if is_damage(kind) => Error::corrupt(&*self.name, err.to_string()),
                _ => Error::read(&*self.name, err),
            })?;
        self.block.truncate(read);
        self.parsed = 0;
        self.ended = read == 0;
        Ok(())
    }

    /// Whether the file ends in a record that lacks its line end, by giving it one. A quote that is
    /// still open swallows that, as it has swallowed all rows since.
    fn has_last(&mut self) -> Result<bool> {
        let ends = &mut self.ends[self.num_fields..];
        let (result, _, swallowed, fields) = self.core.read_record(b"\n", &mut [0; 8], ends);
        self.num_fields += fields;
        match result {
            ReadRecordResult::Record => Ok(true),
            _ if swallowed == 0 => Ok(false),
            _ => {
                let number = self.number + 1;
                let problem = format!(
                    "a quote in record {number} is never closed: close it, or double it if it is text"
                );
                Err(Error::corrupt(&*self.name, problem))
            }
        }
    }
}
