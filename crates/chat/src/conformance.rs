//! What every [`Tokenizer`] promises, as tests.
//!
//! [`tokenizer_conformance_tests!`](crate::tokenizer_conformance_tests) makes
//! one test of each promise, so that a failure names the promise that broke.

use std::sync::Arc;

use crate::detokenize::Detokenizer;
use crate::tokenizer::{EncodePolicy, Tokenizer, TokenizerExt as _};

/// Texts that break tokenizers.
const TEXTS: [&str; 14] = [
    "",
    "a",
    " ",
    "Hello, world! How many r's are in 'strawberry'?",
    " leading and trailing ",
    "two\nlines\n\n\tand a tab\r\n",
    "1234567890 12 345.5",
    "don't DON'T we'll",
    "日本語のテキスト、мир, ελληνικά",
    "👨‍👩‍👧 🏴‍☠️ 😀",
    "nul \0 and del \u{7f}",
    "\u{a0}\u{3000}\u{200d}\u{feff}",
    "    four spaces    ",
    "def f(x):\n    return {'a': [x, 1.5]}\n",
];

/// The same text has the same ids, whatever came before and on any thread.
///
/// # Panics
/// If the promise is broken; so do all functions here.
pub fn encoding_is_deterministic(tokenizer: &dyn Tokenizer) {
    let first: Vec<Vec<u32>> = TEXTS.iter().map(|text| encode(tokenizer, text)).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for (text, ids) in TEXTS.iter().zip(&first).rev() {
                    assert_eq!(&encode(tokenizer, text), ids, "{text:?}");
                }
            });
        }
    });
}

/// What the buffer held stays.
pub fn encoding_appends(tokenizer: &dyn Tokenizer) {
    let mut ids = vec![7, 8];
    tokenizer
        .encode_into("Hello", EncodePolicy::Parity, &mut ids)
        .expect("ids");
    assert_eq!(ids[..2], [7, 8]);
    assert_eq!(ids[2..], encode(tokenizer, "Hello"));
}

/// Nothing comes of an empty text: no token is added that no text spells.
pub fn nothing_comes_of_nothing(tokenizer: &dyn Tokenizer) {
    assert_eq!(encode(tokenizer, ""), Vec::<u32>::new());
}

/// Every id has bytes.
pub fn ids_are_in_the_vocabulary(tokenizer: &dyn Tokenizer) {
    for text in TEXTS {
        for id in encode(tokenizer, text) {
            assert!((id as usize) < tokenizer.vocab_size(), "{id} of {text:?}");
            assert!(tokenizer.token_bytes(id).is_some(), "{id} of {text:?}");
        }
    }
    assert_eq!(tokenizer.token_bytes(u32::MAX), None);
}

/// Text comes back. A vocabulary with a prefix takes one off, as in
/// transformers.
pub fn decoding_undoes_encoding(tokenizer: &dyn Tokenizer) {
    let prefix = tokenizer.vocabulary().prefix();
    for text in TEXTS {
        let found = tokenizer.decode(&encode(tokenizer, text));
        let bare = text.strip_prefix(prefix).unwrap_or(text);
        assert!(found == text || found == bare, "{text:?}: {found:?}");
    }
}

/// Each token ends after the one before it, on from the start to the end of
/// the text.
pub fn ends_ascend_to_the_end(tokenizer: &dyn Tokenizer) {
    for text in TEXTS {
        let ids = encode(tokenizer, text);
        let ends = tokenizer.token_ends(text, &ids);
        assert_eq!(ends.len(), ids.len(), "{text:?}");
        assert!(ends.is_sorted(), "{text:?}: {ends:?}");
        assert_eq!(ends.last().copied().unwrap_or(0), text.len(), "{text:?}");
    }
}

/// Special tokens are found by name, encode to themselves wherever they
/// stand, and are plain text when the text is sanitized.
pub fn special_tokens_are_themselves(tokenizer: &dyn Tokenizer) {
    let special: Vec<(u32, &str)> = tokenizer.vocabulary().special_tokens().take(8).collect();
    for (id, token) in special {
        assert_eq!(tokenizer.token_to_id(token), Some(id));
        assert!(tokenizer.is_special(id));
        let text = format!("Hello{token}Hello");
        let ids = encode(tokenizer, &text);
        assert_eq!(ids.iter().filter(|&&found| found == id).count(), 1);
        let at = ids.iter().position(|&found| found == id).expect("counted");
        let ends = tokenizer.token_ends(&text, &ids);
        assert_eq!(ends[at], 5 + token.len(), "the end of {token:?}");

        let mut plain = Vec::new();
        tokenizer
            .encode_into(&text, EncodePolicy::Sanitized, &mut plain)
            .expect("ids");
        assert!(!plain.iter().any(|&id| tokenizer.is_special(id)));
        assert_eq!(tokenizer.decode(&plain), text);
    }
}

/// One id at a time gives the text that all of them give.
pub fn streaming_is_decoding(tokenizer: &Arc<dyn Tokenizer>) {
    for text in TEXTS {
        let ids = encode(tokenizer, text);
        let mut stream = Detokenizer::new(Arc::clone(tokenizer));
        let mut streamed = String::new();
        for &id in &ids {
            streamed += stream.push(id);
        }
        streamed += stream.finish();
        let prefix = tokenizer.vocabulary().prefix();
        let bare = streamed.strip_prefix(prefix).unwrap_or(&streamed);
        assert!(streamed == text || bare == text, "{text:?}: {streamed:?}");
    }
}

fn encode(tokenizer: &dyn Tokenizer, text: &str) -> Vec<u32> {
    tokenizer
        .encode(text)
        .unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

/// Makes a test of each promise, for a tokenizer that an expression builds:
/// an `Option<Arc<dyn Tokenizer>>`, where `None` skips.
///
/// ```
/// mod bytes {
///     use std::sync::Arc;
///     use updraft_chat::{ByteTokenizer, Tokenizer};
///
///     fn tokenizer() -> Option<Arc<dyn Tokenizer>> {
///         Some(Arc::new(ByteTokenizer::new(["<|end|>"])))
///     }
///
///     updraft_chat::tokenizer_conformance_tests!(tokenizer());
/// }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! tokenizer_conformance_tests {
    ($tokenizer:expr) => {
        $crate::tokenizer_conformance_tests!(@each $tokenizer;
            encoding_is_deterministic
            encoding_appends
            nothing_comes_of_nothing
            ids_are_in_the_vocabulary
            decoding_undoes_encoding
            ends_ascend_to_the_end
            special_tokens_are_themselves
            streaming_is_decoding
        );
    };
    (@each $tokenizer:expr; $($promise:ident)*) => {
        $(
            #[test]
            fn $promise() {
                let tokenizer: Option<::std::sync::Arc<dyn $crate::Tokenizer>> = $tokenizer;
                if let Some(tokenizer) = tokenizer {
                    $crate::conformance::$promise(&tokenizer);
                }
            }
        )*
    };
}
