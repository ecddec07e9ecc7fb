//! The engines behind [`Tokenizer`](super::Tokenizer).

#[cfg(feature = "fast")]
mod canonical;
#[cfg(feature = "fast")]
pub(super) mod fast;
#[cfg(feature = "stable")]
pub(super) mod stable;

/// `tokenizer.json` as text.
fn as_text(tokenizer_json: &[u8]) -> crate::error::Result<&str> {
    std::str::from_utf8(tokenizer_json).map_err(super::tokenizer_json::tokenizer_error)
}
