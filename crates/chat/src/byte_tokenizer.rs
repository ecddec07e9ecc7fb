//! A tokenizer of one token per byte, for tests that need no model.

use crate::error::Result;
use crate::tokenizer::{EncodePolicy, Tokenizer, Vocabulary};

/// One token per byte (ids 0 to 255), then the special tokens it was made with.
#[derive(Debug)]
pub struct ByteTokenizer {
    vocabulary: Vocabulary,
}

impl ByteTokenizer {
    /// A byte tokenizer with these special tokens, numbered from 256 on.
    ///
    /// ```
    /// use updraft_chat::{ByteTokenizer, TokenizerExt as _};
    ///
    /// let tokenizer = ByteTokenizer::new(["<|end|>"]);
    /// assert_eq!(tokenizer.encode("hi<|end|>").unwrap(), [104, 105, 256]);
    /// ```
    pub fn new<'a>(special: impl IntoIterator<Item = &'a str>) -> ByteTokenizer {
        let bytes: Vec<[u8; 1]> = (0..=u8::MAX).map(|byte| [byte]).collect();
        ByteTokenizer {
            vocabulary: Vocabulary::new(bytes.iter().map(<[u8; 1]>::as_slice), special),
        }
    }

    /// The special token a text starts with; the longest, if several do.
    fn special_at(&self, text: &[u8]) -> Option<(u32, usize)> {
        self.vocabulary
            .special_tokens()
            .filter(|(_, token)| text.starts_with(token.as_bytes()))
            .map(|(id, token)| (id, token.len()))
            .max_by_key(|&(_, len)| len)
    }
}

impl Tokenizer for ByteTokenizer {
    fn encode_into(&self, text: &str, policy: EncodePolicy, ids: &mut Vec<u32>) -> Result<()> {
        let mut rest = text.as_bytes();
        while let Some(&byte) = rest.first() {
            let special = match policy {
                EncodePolicy::Parity => self.special_at(rest),
                EncodePolicy::Sanitized => None,
            };
            let (id, len) = special.unwrap_or((u32::from(byte), 1));
            ids.push(id);
            rest = &rest[len..];
        }
        Ok(())
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
}
