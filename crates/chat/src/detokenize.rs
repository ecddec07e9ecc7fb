//! Token ids to text, one at a time.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;

/// Turns a stream of ids into text that is never taken back.
///
/// A token may hold part of a character: its bytes wait until the character
/// is whole. Bytes that cannot become a character come out as U+FFFD, so the
/// stream never stalls.
///
/// ```
/// use std::sync::Arc;
/// use updraft_chat::{ByteTokenizer, Detokenizer};
///
/// let mut text = Detokenizer::new(Arc::new(ByteTokenizer::new([])));
/// assert_eq!(text.push(0xC3), "");
/// assert_eq!(text.push(0xA9), "é");
/// ```
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<dyn Tokenizer>,
    keeps_special: bool,
    /// The begun character, at most three bytes, then this push's text.
    pending: Vec<u8>,
    out: String,
}

impl Detokenizer {
    /// Starts a stream that leaves out special tokens.
    pub fn new(tokenizer: Arc<dyn Tokenizer>) -> Detokenizer {
        Detokenizer {
            tokenizer,
            keeps_special: false,
            pending: Vec::new(),
            out: String::new(),
        }
    }

    /// Writes special tokens as their text.
    #[must_use]
    pub fn with_special_tokens(mut self) -> Detokenizer {
        self.keeps_special = true;
        self
    }

    /// The text that this id completes, often one token's, sometimes none.
    pub fn push(&mut self, id: u32) -> &str {
        self.out.clear();
        let vocabulary = self.tokenizer.vocabulary();
        if self.keeps_special || !vocabulary.is_special(id) {
            self.pending
                .extend_from_slice(vocabulary.bytes(id).unwrap_or_default());
            take_whole(&mut self.pending, &mut self.out);
        }
        &self.out
    }

    /// The bytes an id adds, for token-level output such as logprobs.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.vocabulary().bytes(id).unwrap_or_default()
    }

    /// What is left at the end: U+FFFD for a character that was never
    /// completed, else nothing.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        if !self.pending.is_empty() {
            self.out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
        &self.out
    }
}

/// Moves all but a begun last character.
fn take_whole(pending: &mut Vec<u8>, out: &mut String) {
    let mut taken = 0;
    for chunk in pending.utf8_chunks() {
        out.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let is_begun = taken + invalid.len() == pending.len() && is_begun(invalid);
        if !invalid.is_empty() && !is_begun {
            out.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
    }
    pending.drain(..taken);
}

/// Whether these bytes, which are no character, could become one.
fn is_begun(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::byte_tokenizer::ByteTokenizer;

    fn detokenizer() -> Detokenizer {
        Detokenizer::new(Arc::new(ByteTokenizer::new(["<|end|>"])))
    }

    #[track_caller]
    fn check(bytes: &[u8], expected: &[&str], rest: &str) {
        let mut detokenizer = detokenizer();
        let found: Vec<String> = bytes
            .iter()
            .map(|&byte| detokenizer.push(u32::from(byte)).to_owned())
            .collect();
        assert_eq!(found, expected);
        assert_eq!(detokenizer.finish(), rest);
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn a_character_comes_out_whole() {
        check(
            "é€😀".as_bytes(),
            &["", "é", "", "", "€", "", "", "", "😀"],
            "",
        );
    }

    #[test]
    fn what_can_be_no_character_does_not_wait() {
        check(b"a\xFFb", &["a", "\u{FFFD}", "b"], "");
        check(b"\xE2\x82a", &["", "", "\u{FFFD}a"], "");
        check(b"\xC3\xC3\xA9", &["", "\u{FFFD}", "é"], "");
        check(b"\xE2\x82", &["", ""], "\u{FFFD}");
    }

    #[test]
    fn all_pushes_together_are_the_lossy_text() {
        let mut state = 7u64;
        for _ in 0..2_000 {
            let bytes: Vec<u8> = (0..12)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    [b'a', 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF]
                        [(state >> 33) as usize % 9]
                })
                .collect();
            let mut detokenizer = detokenizer();
            let mut text = String::new();
            for &byte in &bytes {
                text += detokenizer.push(u32::from(byte));
            }
            text += detokenizer.finish();
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{bytes:x?}");
        }
    }

    #[test]
    fn special_tokens_are_left_out_unless_asked_for() {
        assert_eq!(detokenizer().push(256), "");
        assert_eq!(detokenizer().with_special_tokens().push(256), "<|end|>");
        assert_eq!(detokenizer().push(100_000), "");
    }
}
