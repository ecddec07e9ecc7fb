//! `tokenizers` 1.0, release candidate: SIMD splitting, no offsets, many
//! times the stable engine's speed.

use std::fmt;

use tokenizers_fast::pipeline::{EncodeOptions, Override, PipelineToken, PipelineTokenizer};

use super::{as_text, canonical};
use crate::contain::contain;
use crate::error::{BoxError, Error, Result};
use crate::tokenizer::tokenizer_json::tokenizer_error;
use crate::tokenizer::{EncodePolicy, Tokenizer, Vocabulary};

/// A `tokenizer.json` on `tokenizers` 1.0.
///
/// # COMPATIBILITY
///
/// Ids are those of `tokenizers` 0.23, but for Unicode tables: 0.23 normalizes
/// (NFC and its kind) by Unicode 9, this engine by Unicode 17. Combining marks
/// added in between, 154 of them, are put in another order where one stands
/// beside another mark, and vowels of five scripts (Dives Akuru, Todhri,
/// Tulu-Tigalari, Gurung Khema, Kirat Rai) are composed. A vocabulary without
/// normalizer (GPT-2, Mistral) sees no difference at all.
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
        let text = as_text(tokenizer_json)?;
        let (vocabulary, inner) = std::thread::scope(|scope| {
            let vocabulary = scope.spawn(|| Vocabulary::from_json(tokenizer_json));
            let inner = contain(|| engine(text));
            (vocabulary.join(), inner)
        });
        let vocabulary = vocabulary.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let inner = inner.map_err(tokenizer_error)??;
        Ok(FastTokenizer { inner, vocabulary })
    }
}

fn engine(text: &str) -> Result<PipelineTokenizer> {
    let quick = canonical::quickly(text).and_then(|text| tokenizers_fast::from_json(&text).ok());
    match quick {
        Some(engine) => Ok(engine),
        None => {
            let canonical = tokenizers_fast::canonicalize_str(text).map_err(tokenizer_error)?;
            tokenizers_fast::from_json(&canonical).map_err(tokenizer_error)
        }
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
        let failed = |source: BoxError| Error::Encode {
            bytes: text.len(),
            source,
        };
        contain(|| self.inner.encode_into(text, &options, &mut tokens))
            .map_err(|panicked| failed(panicked.into()))?
            .map_err(failed)?;
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
