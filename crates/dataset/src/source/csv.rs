//! CSV and TSV with a header line; every column is a string.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use csv::{ByteRecord, ReaderBuilder};
use serde_json::{Map, Value};

use super::bytes::{self, Forward};
use super::files::{BatchReader, DataFile, Io};
use super::row::{Batch, Cursor, MAX_ROW_BYTES, Origin, Row, too_long};
use crate::{Error, Result};

/// A batch is handed out when its records have this many bytes.
const BATCH_BYTES: usize = 512 << 10;

pub(super) fn open(
    file: &DataFile,
    start: Cursor,
    io: &Io,
    delimiter: u8,
) -> Result<Box<dyn BatchReader>> {
    let mut reader = CsvReader::new(file, Cursor { byte: 0, ..start }, io, delimiter)?;
    let mut record = ByteRecord::new();
    if !reader.read(&mut record)? {
        reader.columns = Arc::default();
    } else {
        reader.columns = header(&file.name, &record)?;
    }
    if start.byte > 0 {
        let columns = reader.columns;
        reader = CsvReader {
            columns,
            ..CsvReader::new(file, start, io, delimiter)?
        };
    }
    Ok(Box::new(reader))
}

fn header(file: &str, record: &ByteRecord) -> Result<Arc<[String]>> {
    let name = |field: &[u8]| {
        let field = field.strip_prefix(b"\xef\xbb\xbf").unwrap_or(field);
        String::from_utf8(field.to_vec())
            .map_err(|err| Error::corrupt(file, format!("a column name is not UTF-8: {err}")))
    };
    record.iter().map(name).collect()
}

struct CsvReader {
    name: Arc<str>,
    inner: csv::Reader<Limited>,
    columns: Arc<[String]>,
    start: Cursor,
    /// Bytes that may still be read before the record at hand counts as endless.
    budget: Arc<AtomicU64>,
    records: u64,
}

impl CsvReader {
    fn new(file: &DataFile, start: Cursor, io: &Io, delimiter: u8) -> Result<Self> {
        let budget = Arc::new(AtomicU64::new(0));
        let bytes = Limited {
            bytes: bytes::open(file, start.byte, io)?,
            budget: Arc::clone(&budget),
        };
        let inner = ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(delimiter)
            .from_reader(bytes);
        Ok(Self {
            name: file.name.clone(),
            inner,
            columns: Arc::default(),
            start,
            budget,
            records: 0,
        })
    }

    fn read(&mut self, record: &mut ByteRecord) -> Result<bool> {
        // What csv has buffered already does not count, so twice the limit is surely too long.
        self.budget
            .store(2 * MAX_ROW_BYTES as u64, Ordering::Relaxed);
        self.inner.read_byte_record(record).map_err(|err| {
            let line = self.inner.position().line();
            match err.into_kind() {
                csv::ErrorKind::Io(err) if err.kind() == std::io::ErrorKind::FileTooLarge => {
                    Error::corrupt(&*self.name, format!("the record after line {line} of this stretch has no end: look for an unclosed quote"))
                }
                csv::ErrorKind::Io(err) => Error::read(&*self.name, err),
                kind => Error::corrupt(&*self.name, format!("{kind:?}")),
            }
        })
    }

    fn row(&mut self, record: &ByteRecord) -> Row {
        self.records += 1;
        // The header is not a row, but it was the first record of a reader that began at byte 0.
        let next = Cursor {
            byte: self.start.byte + self.inner.position().byte(),
            row: self.start.row + self.records,
            ..self.start
        };
        let origin = Origin {
            file: self.name.clone(),
            position: next.row,
        };
        Row {
            origin,
            next,
            value: self.value(record),
        }
    }

    fn value(&self, record: &ByteRecord) -> Result<Map<String, Value>, String> {
        if record.as_slice().len() > MAX_ROW_BYTES {
            return Err(too_long());
        }
        if record.len() != self.columns.len() {
            return Err(format!(
                "{} fields where the header has {}",
                record.len(),
                self.columns.len()
            ));
        }
        let field = |(name, field): (&String, &[u8])| {
            let text = std::str::from_utf8(field)
                .map_err(|err| format!("column {name} is not UTF-8: {err}"))?;
            Ok((name.clone(), Value::from(text)))
        };
        self.columns.iter().zip(record.iter()).map(field).collect()
    }
}

impl BatchReader for CsvReader {
    fn next_batch(&mut self) -> Result<Option<Batch>> {
        let (mut rows, mut size) = (Vec::new(), 0);
        let mut record = ByteRecord::new();
        while size < BATCH_BYTES && self.read(&mut record)? {
            size += record.as_slice().len();
            rows.push(self.row(&record));
        }
        Ok((!rows.is_empty()).then(|| Batch::new(rows)))
    }
}

/// Stops a record that never ends before it fills the memory.
struct Limited {
    bytes: Box<dyn Forward>,
    budget: Arc<AtomicU64>,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let budget = self.budget.load(Ordering::Relaxed);
        let read = self.bytes.read(buffer)?;
        match budget.checked_sub(read as u64) {
            Some(left) => self.budget.store(left, Ordering::Relaxed),
            None => return Err(std::io::ErrorKind::FileTooLarge.into()),
        }
        Ok(read)
    }
}
