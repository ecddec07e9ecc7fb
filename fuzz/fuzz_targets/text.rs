//! Any text through both engines.

#![no_main]

#[path = "../../crates/chat/tests/it/disputed.rs"]
mod disputed;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use updraft_chat::{EncodePolicy, FastTokenizer, StableTokenizer, Tokenizer as _, TokenizerExt as _};

const TINY: &[u8] = include_bytes!("../../examples/assets/tiny/tokenizer.json");

static ENGINES: LazyLock<(FastTokenizer, StableTokenizer)> = LazyLock::new(|| {
    (
        FastTokenizer::from_json(TINY).unwrap(),
        StableTokenizer::from_json(TINY).unwrap(),
    )
});

fuzz_target!(|text: &str| {
    if text.chars().any(disputed::is_disputed) {
        return;
    }
    let (fast, stable) = &*ENGINES;
    for policy in [EncodePolicy::Parity, EncodePolicy::Sanitized] {
        let (mut ids, mut expected) = (Vec::new(), Vec::new());
        fast.encode_into(text, policy, &mut ids).unwrap();
        stable.encode_into(text, policy, &mut expected).unwrap();
        assert_eq!(ids, expected);
        let ends = fast.token_ends(text, &ids);
        assert_eq!(ends.last().copied().unwrap_or(0), text.len());
    }
});
