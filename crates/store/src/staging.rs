//! The hidden files `name#1` in which a local store gathers an object before it gets its name.
//!
//! A killed process leaves them, and `object_store` neither lists nor deletes what is called so.

use std::path::{Path, PathBuf};

use crate::{Error, ObjectInfo, Result, Store};

impl Store {
    /// The file of a hidden path in a local store; `None` for every other path.
    pub(crate) fn staged_file(&self, path: &str) -> Option<PathBuf> {
        is_staged(path).then(|| self.local_path(path)).flatten()
    }

    /// The hidden files under a folder of a local store, at any depth; none in other stores.
    pub(crate) async fn staged_files(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let Some(root) = self.local_path(prefix) else {
            return Ok(Vec::new());
        };
        let (prefix, url) = (prefix.to_owned(), self.url_of(prefix));
        let walk = move || {
            let mut found = Vec::new();
            walk(&root, &prefix, &mut found).map(|()| found)
        };
        match tokio::task::spawn_blocking(walk).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => Err(failed(url, error)),
            Err(error) => Err(failed(url, error)),
        }
    }
}

/// Deletes a hidden file; one that is not there is as good as deleted.
pub(crate) async fn remove(file: &Path) -> Result<()> {
    match tokio::fs::remove_file(file).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(failed(format!("file://{}", file.display()), error))
        }
        _ => Ok(()),
    }
}

fn failed(url: String, source: impl Into<crate::BoxError>) -> Error {
    Error::Store {
        url,
        source: source.into(),
    }
}

/// Whether a path's last part is `name#` and digits.
fn is_staged(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.rsplit_once('#').is_some_and(|(_, number)| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn walk(folder: &Path, prefix: &str, found: &mut Vec<ObjectInfo>) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = format!("{prefix}/{name}");
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&entry.path(), &path, found)?;
        } else if kind.is_file() && is_staged(&name) {
            found.push(ObjectInfo {
                path,
                bytes: entry.metadata()?.len(),
                etag: None,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_names_end_in_a_number() {
        for (path, expected) in [
            ("a/shard.parquet#1", true),
            ("a#12", true),
            ("a#", false),
            ("a#b", false),
            ("a#1/b", false),
            ("a1", false),
        ] {
            assert_eq!(is_staged(path), expected, "{path}");
        }
    }
}
