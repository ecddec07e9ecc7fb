//! `tokenizers` 0.23: slow, and the reference for token ids.

use std::fmt;

use super::as_text;
use crate::contain::contain;
use crate::error::{BoxError, Error, Result};
use crate::tokenizer::tokenizer_json::tokenizer_error;
use crate::tokenizer::{EncodePolicy, Tokenizer, Vocabulary};

/// A `tokenizer.json` on `tokenizers` 0.23.
pub struct StableTokenizer {
    parity: tokenizers_stable::Tokenizer,
    sanitized: tokenizers_stable::Tokenizer,
    vocabulary: Vocabulary,
}

impl StableTokenizer {
    /// Loads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the engine cannot read it.
    pub fn from_json(tokenizer_json: &[u8]) -> Result<StableTokenizer> {
        let vocabulary = Vocabulary::from_json(tokenizer_json)?;
        let text = as_text(tokenizer_json)?;
        let mut parity: tokenizers_stable::Tokenizer = contain(|| text.parse())
            .map_err(tokenizer_error)?
            .map_err(tokenizer_error)?;
        parity.with_padding(None);
        parity.with_truncation(None).map_err(tokenizer_error)?;
        let mut sanitized = parity.clone();
        sanitized.set_encode_special_tokens(true);
        Ok(StableTokenizer {
            parity,
            sanitized,
            vocabulary,
        })
    }
}

impl Tokenizer for StableTokenizer {
    fn encode_into(&self, text: &str, policy: EncodePolicy, ids: &mut Vec<u32>) -> Result<()> {
        let engine = match policy {
            EncodePolicy::Parity => &self.parity,
            EncodePolicy::Sanitized => &self.sanitized,
        };
        let failed = |source: BoxError| Error::Encode {
            bytes: text.len(),
            source,
        };
        let encoding = contain(|| engine.encode_fast(text, false))
            .map_err(|panicked| failed(panicked.into()))?
            .map_err(failed)?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
}

impl fmt::Debug for StableTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StableTokenizer")
            .field("vocabulary", &self.vocabulary)
            .finish_non_exhaustive()
    }
}
