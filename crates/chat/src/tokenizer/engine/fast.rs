//! `tokenizers` 1.0, release candidate: SIMD splitting, no offsets, many
//! times the stable engine's speed.

use std::fmt;

use tokenizers_fast::pipeline::{EncodeOptions, Override, PipelineToken, PipelineTokenizer};

use super::as_text;
use crate::error::{Error, Result};
use crate::tokenizer::vocabulary::tokenizer_error;
use crate::tokenizer::{EncodePolicy, Tokenizer, Vocabulary};

/// A `tokenizer.json` on `tokenizers` 1.0.
pub struct FastTokenizer {
    inner: PipelineTokenizer,
    vocabulary: Vocabulary,
}

impl FastTokenizer {
    /// Loads a `tokenizer.json`, of whichever version.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the engine cannot read it.
    pub fn from_json(tokenizer_json: &[u8]) -> Result<FastTokenizer> {
        let vocabulary = Vocabulary::from_json(tokenizer_json)?;
        let canonical =
            tokenizers_fast::canonicalize_str(as_text(tokenizer_json)?).map_err(tokenizer_error)?;
        let inner = tokenizers_fast::from_json(&canonical).map_err(tokenizer_error)?;
        Ok(FastTokenizer { inner, vocabulary })
    }
}

impl Tokenizer for FastTokenizer {
    fn encode_into(&self, text: &str, policy: EncodePolicy, ids: &mut Vec<u32>) -> Result<()> {
        let options = EncodeOptions {
            add_special_tokens: false,
            encode_special_tokens: policy == EncodePolicy::Sanitized,
            padding: Override::Off,
            truncation: Override::Off,
        };
        let mut tokens = Vec::with_capacity(text.len() / 3);
        self.inner
            .encode_into(text, &options, &mut tokens)
            .map_err(|source| Error::Encode {
                bytes: text.len(),
                source,
            })?;
        ids.extend_from_slice(PipelineToken::cast_slice(&tokens));
        Ok(())
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
}

impl fmt::Debug for FastTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FastTokenizer")
            .field("vocabulary", &self.vocabulary)
            .finish_non_exhaustive()
    }
}
