//! The files of a folder that is to be uploaded.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::{BoxError, Error, FileHashes, Result};

/// Bytes of a file by which the Hub tells text from binary.
const SAMPLE_BYTES: u64 = 512;

/// A file of the folder.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) path: String,
    pub(super) file: PathBuf,
    pub(super) bytes: u64,
    pub(super) sha256: String,
    pub(super) sample: Vec<u8>,
}

/// The files of a folder, hashed, sorted by path.
pub(super) async fn read_folder(folder: &Path) -> Result<Vec<Local>> {
    let (root, shown) = (folder.to_owned(), folder.to_owned());
    let walked = tokio::task::spawn_blocking(move || {
        let mut files = Vec::new();
        walk(&root, "", &FileHashes::from_env(), &mut files).map(|()| files)
    });
    let walked = walked.await.map_err(|error| unreadable(&shown, error))?;
    let mut files = walked.map_err(|error| unreadable(&shown, error))?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn walk(
    folder: &Path,
    prefix: &str,
    hashes: &FileHashes,
    files: &mut Vec<Local>,
) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let file = entry?.path();
        let Some(name) = file
            .file_name()
            .and_then(|name| name.to_str())
            .filter(|name| !name.starts_with('.'))
        else {
            continue;
        };
        let path = format!("{prefix}{name}");
        if file.is_dir() {
            walk(&file, &format!("{path}/"), hashes, files)?;
            continue;
        }
        let hash = hashes.hash(&file)?;
        let mut sample = Vec::new();
        std::fs::File::open(&file)?
            .take(SAMPLE_BYTES)
            .read_to_end(&mut sample)?;
        files.push(Local {
            path,
            bytes: hash.bytes,
            sha256: hash.sha256,
            sample,
            file,
        });
    }
    Ok(())
}

pub(super) fn unreadable(path: &Path, source: impl Into<BoxError>) -> Error {
    Error::Store {
        url: path.display().to_string(),
        source: source.into(),
    }
}
