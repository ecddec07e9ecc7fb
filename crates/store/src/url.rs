//! Where a store is: one URL argument, opened.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::memory::InMemory;

use crate::{Error, Result};

/// An object store and the prefix under which the pipeline keeps its areas.
///
/// Cloning is cheap and clones share the same store. `Debug` and [`url`](Self::url)
/// never show a credential: they are taken from the environment and URLs that carry
/// one are refused.
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<dyn ObjectStore>,
    url: Arc<str>,
    root: Option<Arc<Path>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the store that a URL names, with the process's environment for credentials.
    ///
    /// - `some/folder`, `/some/folder`, `file:///some/folder`: a local folder, made if absent.
    ///   Writes survive a power cut: file and folder are flushed before a write returns.
    /// - `memory://`: a new empty store in this process.
    /// - `s3://bucket/prefix`: any S3 endpoint. `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
    ///   `AWS_SESSION_TOKEN`, `AWS_REGION`, and `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for
    ///   Tigris, MinIO and others. Plain HTTP is allowed for loopback endpoints only,
    ///   elsewhere with `AWS_ALLOW_HTTP=true`.
    /// - `gs://bucket/prefix` and `az://container/prefix`, with the features of these names:
    ///   `GOOGLE_*` (`GOOGLE_APPLICATION_CREDENTIALS`) and `AZURE_*`
    ///   (`AZURE_STORAGE_ACCOUNT_NAME`, `AZURE_STORAGE_ACCOUNT_KEY`).
    ///
    /// Opening a remote store makes no request; the first call does.
    ///
    /// # Errors
    /// [`Error::InvalidUrl`] if the URL cannot be understood, holds credentials or needs a
    /// feature this build lacks; [`Error::Denied`] or [`Error::Full`] if the folder cannot be made.
    pub fn open(url: &str) -> Result<Self> {
        Self::open_with(
            url,
            std::env::vars_os().filter_map(|(key, value)| {
                Some((key.into_string().ok()?, value.into_string().ok()?))
            }),
        )
    }

    /// [`open`](Self::open) with the given variables in place of the process's environment.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(url: &str, env: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return open_folder(url, Path::new(url));
        };
        match scheme {
            "file" => open_folder(url, &file_path(url)?),
            "memory" if rest.trim_matches('/').is_empty() => Ok(Self::memory()),
            "memory" => Err(invalid(url, "a memory store has no path; write memory://")),
            #[cfg(feature = "s3")]
            "s3" | "s3a" => crate::s3::open(url, rest, env),
            #[cfg(feature = "gs")]
            "gs" => crate::gs::open(url, rest, env),
            #[cfg(feature = "az")]
            "az" => crate::az::open(url, rest, env),
            #[cfg(not(feature = "s3"))]
            "s3" | "s3a" => Err(lacks(url, "s3", env)),
            #[cfg(not(feature = "gs"))]
            "gs" => Err(lacks(url, "gs", env)),
            #[cfg(not(feature = "az"))]
            "az" => Err(lacks(url, "az", env)),
            _ => Err(invalid(
                url,
                "write a folder, file:///folder, memory://, s3://bucket/prefix, gs:// or az://",
            )),
        }
    }

    /// Wraps a store made elsewhere; `url` is what messages call it.
    pub fn from_object_store(inner: Arc<dyn ObjectStore>, url: impl Into<String>) -> Self {
        Self {
            inner,
            url: url.into().into(),
            root: None,
        }
    }

    /// A new empty store in this process's memory.
    pub fn memory() -> Self {
        Self::from_object_store(Arc::new(InMemory::new()), "memory://")
    }

    /// The same store seen through another implementation, such as a wrapper that counts
    /// calls; the URL stays.
    #[must_use]
    pub fn map_object_store(
        &self,
        wrap: impl FnOnce(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore>,
    ) -> Self {
        Self {
            inner: wrap(Arc::clone(&self.inner)),
            url: Arc::clone(&self.url),
            root: self.root.clone(),
        }
    }

    /// What messages call this store; for local folders an absolute `file://` URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The store itself, already under its prefix.
    pub fn object_store(&self) -> &Arc<dyn ObjectStore> {
        &self.inner
    }

    /// The file that holds `path`, if this is a local folder and the path stays in it; for mapping
    /// files into memory. The empty path is the folder itself.
    pub fn local_path(&self, path: &str) -> Option<PathBuf> {
        let root = self.root.as_ref().filter(|_| self.path(path).is_ok())?;
        Some(root.join(path))
    }

    /// The URL of an object in this store, for messages.
    pub fn url_of(&self, path: &str) -> String {
        format!("{}/{path}", self.url.trim_end_matches('/'))
    }
}

#[cfg(not(all(feature = "s3", feature = "gs", feature = "az")))]
fn lacks<Env>(url: &str, feature: &str, _env: Env) -> Error {
    let reason = format!("this build has no such stores; enable the feature `{feature}`");
    invalid(url, reason)
}

pub(crate) fn invalid(url: &str, reason: impl Into<String>) -> Error {
    Error::InvalidUrl {
        url: redact(url),
        reason: reason.into(),
    }
}

/// The URL without what stands before an `@` in its host part.
fn redact(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    match host.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://***@{host}{path}"),
        // A secret key may hold slashes, which end the host part early.
        None if path.contains('@') => {
            format!("{scheme}://***@{}", path.rsplit('@').next().unwrap_or(""))
        }
        None => url.to_owned(),
    }
}

fn file_path(url: &str) -> Result<PathBuf> {
    ::url::Url::parse(url)
        .ok()
        .and_then(|parsed| parsed.to_file_path().ok())
        .ok_or_else(|| {
            invalid(
                url,
                "write file:///folder with three slashes, or the plain folder",
            )
        })
}

#[cfg(feature = "fs")]
fn open_folder(url: &str, folder: &Path) -> Result<Store> {
    use std::io::ErrorKind;

    use object_store::local::LocalFileSystem;

    if folder.as_os_str().is_empty() {
        return Err(invalid(url, "the folder has no name; write ./folder"));
    }
    let shown = folder.display().to_string();
    make_folder(folder).map_err(|error| match error.kind() {
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            invalid(url, "a file is in the way; choose another folder")
        }
        _ => Error::from_io(shown.clone(), error),
    })?;
    let root = folder
        .canonicalize()
        .map_err(|error| Error::from_io(shown.clone(), error))?;
    let inner = LocalFileSystem::new_with_prefix(&root)
        .map_err(|error| Error::from_store(shown, error))?
        .with_fsync(true);
    Ok(Store {
        inner: Arc::new(inner),
        url: format!("file://{}", root.display()).into(),
        root: Some(root.into()),
    })
}

/// Makes a folder and flushes its entry, so that the store's own folder survives a power cut too.
#[cfg(feature = "fs")]
fn make_folder(folder: &Path) -> std::io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(folder)?;
    #[cfg(unix)]
    if let Some(parent) = folder.canonicalize()?.parent() {
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

#[cfg(not(feature = "fs"))]
fn open_folder(url: &str, _folder: &Path) -> Result<Store> {
    Err(invalid(
        url,
        "this build has no local stores; enable the feature `fs`",
    ))
}
