//! Whole files held to what the Hub's listing says of their content.

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::repo::RepoFile;
use crate::stage_key::hex;
use crate::{Error, Result};

/// A hash on its way to what was promised.
enum Sum {
    /// Of a file in large-file storage: its content's.
    Sha256(Sha256),
    /// Git's name of a blob: of its kind and length, and its content.
    Sha1(Sha1),
}

/// What the listing promises, and the hash that will tell.
struct Promise {
    sum: Sum,
    expected: String,
}

impl Promise {
    /// `None` where the listing has no hash of a known kind.
    fn of(file: &RepoFile) -> Option<Self> {
        let (sum, expected) = match &file.lfs_sha256 {
            Some(sha256) => (Sum::Sha256(Sha256::new()), sha256),
            None if file.oid.len() == 40 => {
                let sum = Sha1::new_with_prefix(format!("blob {}\0", file.size));
                (Sum::Sha1(sum), &file.oid)
            }
            None => return None,
        };
        let expected = expected.to_ascii_lowercase();
        Some(Self { sum, expected })
    }

    fn update(&mut self, bytes: &[u8]) {
        match &mut self.sum {
            Sum::Sha256(sum) => sum.update(bytes),
            Sum::Sha1(sum) => sum.update(bytes),
        }
    }

    fn check(self, url: String) -> Result<()> {
        let (kind, found) = match self.sum {
            Sum::Sha256(sum) => ("SHA-256", hex(&sum.finalize())),
            Sum::Sha1(sum) => ("Git blob hash", hex(&sum.finalize())),
        };
        if found == self.expected {
            return Ok(());
        }
        let reason = format!("its {kind} is {found} instead of {}", self.expected);
        Err(Error::Corrupt { url, reason })
    }
}

/// Passes a whole file's bytes on, and after the last of them the error, if they are not those
/// that the listing means.
pub(super) fn checked(
    url: String,
    file: &RepoFile,
    body: BoxStream<'static, Result<Bytes>>,
) -> BoxStream<'static, Result<Bytes>> {
    let Some(promise) = Promise::of(file) else {
        return body;
    };
    let state = (body, promise, url);
    stream::try_unfold(state, |(mut body, mut promise, url)| async move {
        let next: Option<Bytes> = body.try_next().await?;
        match next {
            Some(bytes) => {
                promise.update(&bytes);
                Ok(Some((bytes, (body, promise, url))))
            }
            None => promise.check(url).map(|()| None),
        }
    })
    .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(oid: &str, lfs_sha256: Option<&str>) -> RepoFile {
        RepoFile {
            path: "a".to_owned(),
            size: 6,
            oid: oid.to_owned(),
            lfs_sha256: lfs_sha256.map(str::to_owned),
        }
    }

    async fn read(file: &RepoFile, body: &'static str) -> Result<Vec<u8>> {
        let (first, rest) = body.split_at(2);
        let body = stream::iter([first, rest].map(|part| Ok(Bytes::from(part)))).boxed();
        let bytes: Vec<Bytes> = checked("x".to_owned(), file, body).try_collect().await?;
        Ok(bytes.concat())
    }

    #[tokio::test]
    async fn content_is_known_by_gits_name_or_its_hash() {
        // `printf 'hello\n' | git hash-object --stdin`, and `… | sha256sum`.
        let git = file("ce013625030ba8dba906f756967f9e9ca394464a", None);
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let large = file(&git.oid.replace('c', "0"), Some(&sha256.to_uppercase()));
        for file in [&git, &large, &file("0", None)] {
            assert_eq!(read(file, "hello\n").await.expect("sound"), b"hello\n");
        }
        for (file, kind) in [(&git, "Git blob hash"), (&large, "SHA-256")] {
            let error = read(file, "hullo\n").await.expect_err("another");
            assert!(error.to_string().contains(kind), "{error}");
        }
        assert!(read(&git, "hello").await.is_err(), "cut short");
    }
}
