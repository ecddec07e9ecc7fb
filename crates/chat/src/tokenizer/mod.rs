//! Text to token ids and back.

#[cfg(any(feature = "fast", feature = "stable"))]
mod engine;
mod offsets;
mod spelling;
mod tokenizer_json;
mod vocabulary;

use std::fmt::Debug;
use std::sync::Arc;

pub use vocabulary::Vocabulary;

use crate::error::Result;

#[cfg(feature = "fast")]
pub use engine::fast::FastTokenizer;
#[cfg(feature = "stable")]
pub use engine::stable::StableTokenizer;

/// Turns text into a model's token ids; its [`Vocabulary`] turns them back.
///
/// # Contract
///
/// - `encode_into` appends and never touches what is there already. It adds
///   no token that the text does not spell: no beginning-of-sequence, no
///   template of the tokenizer's own. Equal texts give equal ids, on any
///   thread.
/// - Every id it appends is in the vocabulary, and unless a normalizer
///   changed the text, the bytes of the ids are the bytes of the text (after
///   [`Vocabulary::prefix`]).
/// - Under [`EncodePolicy::Sanitized`] no special token is appended.
///
/// The suite in [`conformance`](crate::conformance) checks each promise.
pub trait Tokenizer: Debug + Send + Sync {
    /// Appends the ids of `text` to `ids`.
    ///
    /// # Errors
    /// [`Error::Encode`](crate::Error::Encode) if the engine cannot encode the text.
    fn encode_into(&self, text: &str, policy: EncodePolicy, ids: &mut Vec<u32>) -> Result<()>;

    /// The tokens there are.
    fn vocabulary(&self) -> &Vocabulary;
}

/// What becomes of control tokens, such as `<|im_end|>`, spelled in a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EncodePolicy {
    /// They become the control tokens, as in transformers.
    #[default]
    Parity,
    /// They stay plain text, so nobody can end a turn by typing.
    Sanitized,
}

/// What every [`Tokenizer`] can do besides.
pub trait TokenizerExt: Tokenizer {
    /// The ids of a text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_into`].
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, EncodePolicy::Parity, &mut ids)?;
        Ok(ids)
    }

    /// Where in `text` each of its `ids` ends, in bytes.
    fn token_ends(&self, text: &str, ids: &[u32]) -> Vec<usize> {
        offsets::token_ends(self.vocabulary(), text, ids)
    }

    /// The text of ids, special tokens included; bytes that are not UTF-8
    /// become U+FFFD.
    fn decode(&self, ids: &[u32]) -> String {
        self.vocabulary().decode(ids)
    }

    /// The bytes an id stands for.
    fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocabulary().bytes(id)
    }

    /// The id of a token, by its text.
    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.vocabulary().id(token)
    }

    /// One more than the highest id.
    fn vocab_size(&self) -> usize {
        self.vocabulary().len()
    }

    /// Whether an id is a special (control) token.
    fn is_special(&self, id: u32) -> bool {
        self.vocabulary().is_special(id)
    }
}

impl<T: Tokenizer + ?Sized> TokenizerExt for T {}

impl<T: Tokenizer + ?Sized> Tokenizer for Arc<T> {
    fn encode_into(&self, text: &str, policy: EncodePolicy, ids: &mut Vec<u32>) -> Result<()> {
        (**self).encode_into(text, policy, ids)
    }

    fn vocabulary(&self) -> &Vocabulary {
        (**self).vocabulary()
    }
}

/// Loads a `tokenizer.json` with the engine this build has: the fast one
/// where the feature `fast` is on, else the stable one.
///
/// # Errors
/// [`Error::Tokenizer`](crate::Error::Tokenizer) if the engine cannot read it.
#[cfg(any(feature = "fast", feature = "stable"))]
pub fn load_tokenizer(tokenizer_json: &[u8]) -> Result<Arc<dyn Tokenizer>> {
    #[cfg(feature = "fast")]
    return Ok(Arc::new(FastTokenizer::from_json(tokenizer_json)?));
    #[cfg(not(feature = "fast"))]
    return Ok(Arc::new(StableTokenizer::from_json(tokenizer_json)?));
}
