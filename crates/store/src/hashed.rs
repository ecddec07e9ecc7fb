//! Bytes and their SHA-256, computed once.

use bytes::Bytes;

use crate::sha256_hex;

/// Bytes whose hash is known, because it was computed from them. Hashing takes a core some time;
/// with this the caller decides which, and that it happens once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashed {
    bytes: Bytes,
    sha256: String,
}

impl Hashed {
    /// Hashes `bytes`.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let sha256 = sha256_hex(&bytes);
        Self { bytes, sha256 }
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Their hash in lower-case hex.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}
