//! Log-probabilities in the forms of the two completion APIs.

use serde::Serialize;
use serde_json::{Map, Value};
use updraft_chat::{Chat, TokenizerExt};

use crate::engine::TokenLogprobs;
use crate::generate::Token;

/// JSON has no negative infinity; this is what OpenAI sends instead.
const LEAST: f32 = -9999.0;

/// Of a chat choice.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: ChatTop,
    top_logprobs: Vec<ChatTop>,
}

#[derive(Debug, Serialize)]
struct ChatTop {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(crate) fn of(chat: &Chat, tokens: &[Token]) -> Self {
        let tokens = tokens
            .iter()
            .filter_map(|token| Some((token.id, token.logprobs.as_ref()?)));
        let content = tokens.map(|(id, logprobs)| ChatToken {
            token: ChatTop::new(chat, id, logprobs.logprob),
            top_logprobs: logprobs
                .top
                .iter()
                .map(|&(id, lp)| ChatTop::new(chat, id, lp))
                .collect(),
        });
        Self {
            content: content.collect(),
            refusal: None,
        }
    }
}

impl ChatTop {
    fn new(chat: &Chat, id: u32, logprob: f32) -> Self {
        let bytes = chat
            .tokenizer()
            .token_bytes(id)
            .unwrap_or_default()
            .to_vec();
        let token = String::from_utf8_lossy(&bytes).into_owned();
        Self {
            token,
            logprob: logprob.max(LEAST),
            bytes,
        }
    }
}

/// Of a text completion; the four lists run in parallel.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl TextLogprobs {
    /// Appends one token; `offset` is where its text starts, in characters, and moves on.
    pub(crate) fn push(
        &mut self,
        chat: &Chat,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
        offset: &mut usize,
    ) {
        let text = token_text(chat, id);
        self.text_offset.push(*offset);
        *offset += text.chars().count();
        self.token_logprobs
            .push(logprobs.map(|logprobs| logprobs.logprob.max(LEAST)));
        self.top_logprobs.push(logprobs.map(|logprobs| {
            let mut top: Map<String, Value> = logprobs
                .top
                .iter()
                .map(|&(id, lp)| (token_text(chat, id), Value::from(lp.max(LEAST))))
                .collect();
            // The chosen token is always there, even when it is not among the likeliest.
            top.entry(text.clone())
                .or_insert_with(|| Value::from(logprobs.logprob.max(LEAST)));
            top
        }));
        self.tokens.push(text);
    }
}

/// A token's text; bytes that are no text on their own become U+FFFD.
pub(crate) fn token_text(chat: &Chat, id: u32) -> String {
    String::from_utf8_lossy(chat.tokenizer().token_bytes(id).unwrap_or_default()).into_owned()
}
