//! The tokenizer suite on every engine and every genuine tokenizer.

use std::sync::Arc;

use updraft_chat::{ByteTokenizer, FastTokenizer, StableTokenizer, Tokenizer};

use crate::fixtures;

type Load = fn(&[u8]) -> Arc<dyn Tokenizer>;

const FAST: Load = |json| Arc::new(FastTokenizer::from_json(json).expect("fast"));
const STABLE: Load = |json| Arc::new(StableTokenizer::from_json(json).expect("stable"));

fn genuine(model: &str, load: Load) -> Option<Arc<dyn Tokenizer>> {
    let root = fixtures::root(model)?;
    let path = root.join("tokenizers").join(model).join("tokenizer.json");
    Some(load(&std::fs::read(path).expect("a tokenizer")))
}

mod bytes {
    use super::*;
    updraft_chat::tokenizer_conformance_tests!(Some(Arc::new(ByteTokenizer::new([
        "<|im_start|>",
        "<|im_end|>",
    ]))));
}

mod fast {
    use super::{FAST, genuine};
    mod qwen2_5 {
        updraft_chat::tokenizer_conformance_tests!(super::genuine("qwen2.5", super::FAST));
    }
    mod gpt2 {
        updraft_chat::tokenizer_conformance_tests!(super::genuine("gpt2", super::FAST));
    }
    mod mistral {
        updraft_chat::tokenizer_conformance_tests!(super::genuine("mistral-v0.3", super::FAST));
    }
}

mod stable {
    use super::{STABLE, genuine};
    mod qwen2_5 {
        updraft_chat::tokenizer_conformance_tests!(super::genuine("qwen2.5", super::STABLE));
    }
    mod mistral {
        updraft_chat::tokenizer_conformance_tests!(super::genuine("mistral-v0.3", super::STABLE));
    }
}
