//! A file's bytes in order, for a thread that may block.

use std::io::{self, Read, Seek as _, SeekFrom};

use bytes::{Buf as _, Bytes};
use tokio::task::JoinHandle;

use super::files::{Compression, DataFile, Io};
use crate::error::BoxError;
use crate::location::{Location, Remote, open_local};
use crate::{Error, Result};

/// Bytes one request asks of a remote file; the next block is on its way while one is parsed.
const BLOCK_BYTES: u64 = 4 << 20;

/// Bytes in order, of which some may be passed over.
pub(super) trait Forward: Read + Send {
    /// Goes on `bytes` further on, or at the end.
    fn forward(&mut self, bytes: u64) -> io::Result<()>;
}

/// The decompressed bytes of `file` from `from` on.
pub(super) fn open(file: &DataFile, from: u64, io: &Io) -> Result<Box<dyn Forward>> {
    let open = || -> io::Result<Box<dyn Forward>> {
        let raw = raw(file, io)?;
        let mut bytes: Box<dyn Forward> = match file.compression {
            Compression::None => raw,
            Compression::Gzip => Box::new(Decoder(flate2::read::MultiGzDecoder::new(raw))),
            Compression::Zstd => Box::new(Decoder(zstd::Decoder::new(raw)?)),
        };
        bytes.forward(from)?;
        Ok(bytes)
    };
    open().map_err(|err| Error::read(&*file.name, err))
}

fn raw(file: &DataFile, io: &Io) -> io::Result<Box<dyn Forward>> {
    match &file.location {
        Location::Local(path, hash) => Ok(Box::new(open_local(path, hash)?)),
        Location::Remote(remote) => Ok(Box::new(RemoteReader {
            remote: remote.clone(),
            io: io.clone(),
            size: file.size,
            block: Bytes::new(),
            end: 0,
            ahead: None,
        })),
    }
}

impl Forward for std::fs::File {
    fn forward(&mut self, bytes: u64) -> io::Result<()> {
        let bytes = i64::try_from(bytes).map_err(io::Error::other)?;
        self.seek(SeekFrom::Current(bytes)).map(drop)
    }
}

/// Compressed streams cannot seek: what is passed over is read and dropped.
struct Decoder<R>(R);

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read + Send> Forward for Decoder<R> {
    fn forward(&mut self, bytes: u64) -> io::Result<()> {
        io::copy(&mut (&mut self.0).take(bytes), &mut io::sink()).map(drop)
    }
}

/// Reads a remote file block by block, one block ahead.
struct RemoteReader {
    remote: Remote,
    io: Io,
    size: u64,
    /// What has come and is not read yet.
    block: Bytes,
    /// The place after `block`.
    end: u64,
    ahead: Option<Ahead>,
}

/// The block after the one at hand, on its way.
struct Ahead {
    end: u64,
    task: JoinHandle<Result<Bytes, BoxError>>,
}

impl RemoteReader {
    fn request(&mut self) {
        let end = self.size.min(self.end + BLOCK_BYTES);
        if self.end < end && self.ahead.is_none() {
            let (remote, range) = (self.remote.clone(), self.end..end);
            let task = async move { remote.range(range).await };
            let task = self.io.runtime.spawn(task);
            self.ahead = Some(Ahead { end, task });
        }
    }

    /// Waits for the next block, empty at the end.
    fn next_block(&mut self) -> io::Result<()> {
        self.request();
        self.block = Bytes::new();
        let Some(Ahead { end, task }) = self.ahead.take() else {
            return Ok(());
        };
        let abort = task.abort_handle();
        let Some(block) = self.io.block_on(task) else {
            abort.abort();
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        self.block = block?.map_err(io::Error::other)?;
        self.end = end;
        self.request();
        Ok(())
    }
}

impl Read for RemoteReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.block.is_empty() {
            self.next_block()?;
        }
        let read = self.block.len().min(buffer.len());
        self.block.copy_to_slice(&mut buffer[..read]);
        Ok(read)
    }
}

impl Forward for RemoteReader {
    fn forward(&mut self, bytes: u64) -> io::Result<()> {
        let target = self.end - self.block.len() as u64 + bytes;
        if self
            .ahead
            .as_ref()
            .is_some_and(|ahead| target > self.end && target < ahead.end)
        {
            self.next_block()?;
        }
        if target > self.end {
            if let Some(ahead) = self.ahead.take() {
                ahead.task.abort();
            }
            self.block = Bytes::new();
            self.end = self.size.min(target);
        }
        let left = self.end.saturating_sub(target) as usize;
        self.block.advance(self.block.len().saturating_sub(left));
        Ok(())
    }
}

impl Drop for RemoteReader {
    fn drop(&mut self) {
        if let Some(ahead) = &self.ahead {
            ahead.task.abort();
        }
    }
}
