//! The SHA-256 of local files, remembered between runs as long as the files stay untouched.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::stage_key::{hex, sha256_hex};

/// Smaller files are hashed anew each time: reading them costs no more than remembering.
const WORTH_REMEMBERING: u64 = 4 << 20;
/// A file changed so recently may change again within the clock's tick, unseen.
const SETTLED: Duration = Duration::from_secs(2);

/// Hashes files and remembers the result in a folder, one small file for each.
///
/// What is remembered counts as long as the file's size, inode and times are the same, as git's
/// index has it.
#[derive(Clone, Debug, Default)]
pub struct FileHashes {
    folder: Option<PathBuf>,
}

/// A file's content at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHash {
    /// Its size.
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
    stamp: Stamp,
}

/// What changes when a file does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    modified: Option<Duration>,
    /// Inode and the time of its last change, where there are such.
    inode: Option<(u64, i64, i64)>,
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    path: PathBuf,
    stamp: Stamp,
    sha256: String,
}

impl FileHashes {
    /// Remembers in `$XDG_CACHE_HOME/updraft/sha256` or `~/.cache/updraft/sha256`; nowhere if
    /// neither variable is set.
    pub fn from_env() -> Self {
        let var = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let cache = var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
        Self {
            folder: cache.map(|cache| cache.join("updraft/sha256")),
        }
    }

    /// Remembers in this folder, which is made when there is something to remember.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: Some(folder.into()),
        }
    }

    /// Hashes a file, or remembers its hash. Blocks.
    ///
    /// # Errors
    /// Those of reading the file; a memory that cannot be read or written is no error.
    pub fn hash(&self, path: &Path) -> io::Result<FileHash> {
        self.hash_with(path, |_| Ok(()))
    }

    /// [`hash`](Self::hash) that tells `on_bytes` of every piece, and stops with its error. A hash
    /// that is remembered is one piece.
    ///
    /// # Errors
    /// As [`hash`](Self::hash), and those of `on_bytes`.
    pub fn hash_with(
        &self,
        path: &Path,
        mut on_bytes: impl FnMut(u64) -> io::Result<()>,
    ) -> io::Result<FileHash> {
        let mut file = File::open(path)?;
        let before = Stamp::of(&file.metadata()?);
        let place = self
            .place(path)
            .filter(|_| before.bytes >= WORTH_REMEMBERING);
        if let Some(sha256) = place
            .as_ref()
            .and_then(|(place, path)| recall(place, path, &before))
        {
            on_bytes(before.bytes)?;
            return Ok(FileHash {
                bytes: before.bytes,
                sha256,
                stamp: before,
            });
        }
        let (bytes, sha256) = read(&mut file, on_bytes)?;
        if let Some((place, path)) = place
            && before.is_settled()
            && before == Stamp::of(&file.metadata()?)
        {
            let (stamp, sha256) = (before.clone(), sha256.clone());
            remember(
                &place,
                &Remembered {
                    path,
                    stamp,
                    sha256,
                },
            );
        }
        Ok(FileHash {
            bytes,
            sha256,
            stamp: before,
        })
    }

    /// Where the hash of a file is remembered, and under which name.
    fn place(&self, path: &Path) -> Option<(PathBuf, PathBuf)> {
        let path = path.canonicalize().ok()?;
        let name = sha256_hex(path.as_os_str().as_encoded_bytes());
        Some((self.folder.as_ref()?.join(format!("{name}.json")), path))
    }
}

impl FileHash {
    /// Whether a file is still the one that was hashed, going by its size, inode and times.
    pub fn is_of(&self, metadata: &Metadata) -> bool {
        self.stamp == Stamp::of(metadata)
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok();
        #[cfg(unix)]
        let inode = {
            use std::os::unix::fs::MetadataExt as _;
            Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
        };
        #[cfg(not(unix))]
        let inode = None;
        Self {
            bytes: metadata.len(),
            modified: modified.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()),
            inode,
        }
    }

    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        match (now, self.modified) {
            (Ok(now), Some(modified)) => modified + SETTLED < now,
            _ => false,
        }
    }
}

fn recall(place: &Path, path: &Path, stamp: &Stamp) -> Option<String> {
    let found: Remembered = serde_json::from_slice(&fs::read(place).ok()?).ok()?;
    (found.path == path && found.stamp == *stamp).then_some(found.sha256)
}

/// Writes beside and renames, so that a reader sees all or nothing.
fn remember(place: &Path, what: &Remembered) {
    let write = || -> io::Result<()> {
        if let Some(folder) = place.parent() {
            fs::create_dir_all(folder)?;
        }
        let beside = place.with_extension(format!("{}.tmp", std::process::id()));
        fs::write(&beside, serde_json::to_vec(what)?)?;
        fs::rename(&beside, place)
    };
    if let Err(error) = write() {
        tracing::debug!(place = %place.display(), %error, "a file's hash is not remembered");
    }
}

fn read(
    file: &mut File,
    mut on_bytes: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<(u64, String)> {
    let mut hasher = Sha256::new();
    let mut block = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut block)? {
            0 => return Ok((bytes, hex(&hasher.finalize()))),
            read => {
                hasher.update(&block[..read]);
                bytes += read as u64;
                on_bytes(read as u64)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, byte: u8, age: Duration) {
        fs::write(path, vec![byte; WORTH_REMEMBERING as usize]).expect("written");
        let file = File::options().write(true).open(path).expect("opened");
        file.set_modified(SystemTime::now() - age).expect("set");
    }

    /// Makes what is remembered tell its use.
    fn mark(memory: &Path) -> usize {
        let Ok(entries) = fs::read_dir(memory) else {
            return 0;
        };
        let mark = |entry: io::Result<fs::DirEntry>| {
            let path = entry.expect("an entry").path();
            let mut found: Remembered =
                serde_json::from_slice(&fs::read(&path).expect("read")).expect("ours");
            "marked".clone_into(&mut found.sha256);
            fs::write(&path, serde_json::to_vec(&found).expect("json")).expect("written");
        };
        entries.map(mark).count()
    }

    #[test]
    fn an_untouched_file_is_not_read_again_and_a_touched_one_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, memory) = (folder.path().join("a"), folder.path().join("memory"));
        let hashes = FileHashes::in_folder(&memory);
        let truth = |byte| sha256_hex(&vec![byte; WORTH_REMEMBERING as usize]);
        let hash = || hashes.hash(&path).expect("readable").sha256;
        let hour = Duration::from_secs(3600);

        write(&path, 1, Duration::ZERO);
        assert_eq!(hash(), truth(1));
        assert_eq!(
            mark(&memory),
            0,
            "a file written just now is not remembered"
        );

        write(&path, 1, hour);
        assert_eq!(hash(), truth(1));
        assert_eq!(mark(&memory), 1);
        assert_eq!(hash(), "marked");

        write(&path, 2, hour);
        assert_eq!(hash(), truth(2));
        fs::write(
            memory.join(
                fs::read_dir(&memory)
                    .expect("folder")
                    .next()
                    .expect("one")
                    .expect("entry")
                    .file_name(),
            ),
            "{",
        )
        .expect("written");
        assert_eq!(hash(), truth(2), "what cannot be read is forgotten");
    }

    #[test]
    fn a_hash_knows_its_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        fs::write(&path, "one").expect("written");
        let hash = FileHashes::default().hash(&path).expect("readable");
        assert_eq!(
            (hash.bytes, hash.sha256.as_str()),
            (3, sha256_hex(b"one").as_str())
        );
        assert!(hash.is_of(&fs::metadata(&path).expect("there")));
        fs::write(&path, "other").expect("written");
        assert!(!hash.is_of(&fs::metadata(&path).expect("there")));
    }
}
