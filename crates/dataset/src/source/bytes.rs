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

/// The decompressed bytes of `file` from `from` on.
pub(super) fn open(file: &DataFile, from: u64, io: &Io) -> Result<Box<dyn Read + Send>> {
    let failed = |err: io::Error| Error::read(&*file.name, err);
    match file.compression {
        Compression::None => raw(file, from, io).map_err(failed),
        Compression::Gzip => skip(
            flate2::read::MultiGzDecoder::new(raw(file, 0, io).map_err(failed)?),
            from,
        )
        .map_err(failed),
        Compression::Zstd => {
            let decoder = zstd::Decoder::new(raw(file, 0, io).map_err(failed)?).map_err(failed)?;
            skip(decoder, from).map_err(failed)
        }
    }
}

/// Reads on, dropping the first `bytes`: compressed streams cannot seek.
fn skip(mut reader: impl Read + Send + 'static, bytes: u64) -> io::Result<Box<dyn Read + Send>> {
    io::copy(&mut (&mut reader).take(bytes), &mut io::sink())?;
    Ok(Box::new(reader))
}

fn raw(file: &DataFile, from: u64, io: &Io) -> io::Result<Box<dyn Read + Send>> {
    match &file.location {
        Location::Local(path, hash) => {
            let mut opened = open_local(path, hash)?;
            opened.seek(SeekFrom::Start(from))?;
            Ok(Box::new(opened))
        }
        Location::Remote(remote) => {
            let mut reader = RemoteReader {
                remote: remote.clone(),
                io: io.clone(),
                next: from,
                size: file.size,
                block: Bytes::new(),
                ahead: None,
            };
            reader.request();
            Ok(Box::new(reader))
        }
    }
}

/// Reads a remote file block by block, one block ahead.
struct RemoteReader {
    remote: Remote,
    io: Io,
    next: u64,
    size: u64,
    block: Bytes,
    ahead: Option<JoinHandle<Result<Bytes, BoxError>>>,
}

impl RemoteReader {
    fn request(&mut self) {
        let end = self.size.min(self.next + BLOCK_BYTES);
        if self.next < end {
            let (remote, range) = (self.remote.clone(), self.next..end);
            self.ahead = Some(
                self.io
                    .runtime
                    .spawn(async move { remote.range(range).await }),
            );
            self.next = end;
        }
    }
}

impl Read for RemoteReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.block.is_empty() {
            let Some(ahead) = self.ahead.take() else {
                return Ok(0);
            };
            let abort = ahead.abort_handle();
            let Some(block) = self.io.block_on(ahead) else {
                abort.abort();
                return Err(io::ErrorKind::BrokenPipe.into());
            };
            self.block = block?.map_err(io::Error::other)?;
            self.request();
        }
        let read = self.block.len().min(buffer.len());
        self.block.copy_to_slice(&mut buffer[..read]);
        Ok(read)
    }
}

impl Drop for RemoteReader {
    fn drop(&mut self) {
        if let Some(ahead) = &self.ahead {
            ahead.abort();
        }
    }
}
