//! Any bytes as a `tokenizer.json`.

#![no_main]

use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use updraft_chat::{EncodePolicy, FastTokenizer, Tokenizer as _, TokenizerExt as _, Vocabulary};

static QUIET: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    // A panic of the engine that we contain is no find; one that leaves us is.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| ())));
    let vocabulary = Vocabulary::from_json(bytes);
    let Ok(tokenizer) = FastTokenizer::from_json(bytes) else {
        return;
    };
    assert_eq!(vocabulary.unwrap().len(), tokenizer.vocab_size());
    for text in ["", "Hello, <|im_end|> world 123\n", "é日本\u{1F600}e\u{301}"] {
        for policy in [EncodePolicy::Parity, EncodePolicy::Sanitized] {
            let mut ids = Vec::new();
            if tokenizer.encode_into(text, policy, &mut ids).is_ok() {
                let ends = tokenizer.token_ends(text, &ids);
                assert_eq!(ends.len(), ids.len());
                assert!(ends.is_sorted() && ends.last().is_none_or(|&end| end <= text.len()));
                let _ = tokenizer.decode(&ids);
            }
        }
    }
});
