//! A file that grows by whole records and survives a disk that fails for a while.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

/// What a failing disk may leave waiting in memory.
const MOST_WAITING_BYTES: usize = 16 << 20;

/// Where the bytes go.
pub(super) trait Target: Debug + Send {
    /// Writes all of `bytes` behind the first `len` bytes and drops what else was there.
    fn write_at(&mut self, len: u64, bytes: &[u8]) -> io::Result<()>;
}

impl Target for File {
    fn write_at(&mut self, len: u64, bytes: &[u8]) -> io::Result<()> {
        // A write that failed half-way may have left the beginning of a record.
        if self.seek(SeekFrom::End(0))? != len {
            self.set_len(len)?;
            self.seek(SeekFrom::Start(len))?;
        }
        self.write_all(bytes)
    }
}

/// Appends records. What cannot be written waits in memory, up to 16 MiB, and goes out with the
/// next record that can.
#[derive(Debug)]
pub(super) struct AppendFile {
    target: Box<dyn Target>,
    name: String,
    /// Bytes that are surely there.
    len: u64,
    waiting: Vec<u8>,
    lost_records: u64,
}

impl AppendFile {
    /// Continues a file behind its first `len` bytes, or begins one, folder and all.
    pub(super) fn open(path: &Path, len: u64) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.set_len(len)?;
        Ok(Self::new(file, &path.display().to_string(), len))
    }

    fn new(target: impl Target + 'static, name: &str, len: u64) -> Self {
        Self {
            target: Box::new(target),
            name: name.to_owned(),
            len,
            waiting: Vec::new(),
            lost_records: 0,
        }
    }

    /// Bytes in the file.
    #[cfg(any(test, feature = "mlflow", feature = "wandb"))]
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends one record. Never fails: at worst it is said once that records are lost.
    pub(super) fn append(&mut self, record: &[u8]) {
        let was_well = self.waiting.is_empty() && self.lost_records == 0;
        if self.waiting.len() + record.len() > MOST_WAITING_BYTES {
            self.lost_records += 1;
        } else {
            self.waiting.extend_from_slice(record);
        }
        match self.write() {
            Err(error) if was_well => {
                tracing::warn!(file = self.name, %error, "cannot write metrics, keeping them in memory");
            }
            Ok(()) if self.lost_records > 0 => {
                let records = self.lost_records;
                tracing::warn!(
                    file = self.name,
                    records,
                    "metrics were lost while nothing could be written"
                );
                self.lost_records = 0;
            }
            _ => {}
        }
    }

    /// Drops everything behind the first `len` bytes.
    pub(super) fn cut(&mut self, len: u64) {
        self.waiting.clear();
        self.len = len;
    }

    fn write(&mut self) -> io::Result<()> {
        self.target.write_at(self.len, &self.waiting)?;
        self.len += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }
}

impl Drop for AppendFile {
    fn drop(&mut self) {
        if !self.waiting.is_empty() && self.write().is_err() {
            let (file, bytes) = (&self.name, self.waiting.len());
            tracing::warn!(file, bytes, "metrics could not be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// A disk that is full while `room` is too small, and tears what does not fit.
    #[derive(Debug, Clone)]
    struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Target for Disk {
        fn write_at(&mut self, len: u64, bytes: &[u8]) -> io::Result<()> {
            let mut disk = self.0.lock().expect("no panic");
            let (content, room) = &mut *disk;
            content.truncate(len as usize);
            let fits = bytes.len().min(room.saturating_sub(content.len()));
            content.extend_from_slice(&bytes[..fits]);
            if fits == bytes.len() {
                Ok(())
            } else {
                Err(io::ErrorKind::StorageFull.into())
            }
        }
    }

    #[test]
    fn what_a_full_disk_refused_arrives_whole_and_once_when_there_is_room() {
        let disk = Disk(Arc::new(Mutex::new((Vec::new(), 10))));
        let mut file = AppendFile::new(disk.clone(), "log", 0);
        for record in ["first\n", "second\n", "third\n"] {
            file.append(record.as_bytes());
        }
        assert_eq!(disk.0.lock().expect("no panic").0, b"first\nseco");
        disk.0.lock().expect("no panic").1 = 1000;
        file.append(b"fourth\n");
        let content = disk.0.lock().expect("no panic").0.clone();
        assert_eq!(content, b"first\nsecond\nthird\nfourth\n");
        assert_eq!(file.len(), 26);
    }

    #[test]
    fn what_waits_is_bounded_and_whole() {
        let disk = Disk(Arc::new(Mutex::new((Vec::new(), 0))));
        let mut file = AppendFile::new(disk.clone(), "log", 0);
        let record = vec![b'x'; 1 << 20];
        for _ in 0..20 {
            file.append(&record);
        }
        disk.0.lock().expect("no panic").1 = usize::MAX;
        drop(file);
        assert_eq!(disk.0.lock().expect("no panic").0.len(), MOST_WAITING_BYTES);
    }

    #[test]
    fn a_file_is_continued_behind_its_whole_records() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a/b.log");
        AppendFile::open(&path, 0)
            .expect("made")
            .append(b"one\ntor");
        let mut file = AppendFile::open(&path, 4).expect("there");
        file.append(b"two\n");
        file.cut(4);
        file.append(b"2\n");
        assert_eq!(std::fs::read(&path).expect("there"), b"one\n2\n");
    }
}
