//! Log-probabilities in the forms of the two completion APIs.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};
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

/// A token and its alternatives in llama.cpp's form.
pub(crate) fn llama_cpp_token(chat: &Chat, token: &Token) -> Value {
    let told = |id: u32, logprob: f32| {
        let bytes = chat.tokenizer().token_bytes(id).unwrap_or_default();
        json!({
            "id": id, "token": token_text(chat, id), "logprob": logprob.max(LEAST), "bytes": bytes,
        })
    };
    let logprobs = token.logprobs.as_ref();
    let mut value = told(token.id, logprobs.map_or(0.0, |logprobs| logprobs.logprob));
    let top = logprobs.iter().flat_map(|logprobs| &logprobs.top);
    value["top_logprobs"] = top.map(|&(id, logprob)| told(id, logprob)).collect();
    value
}

/// Of a prompt's tokens, in vLLM's form: by token id, null for the first, which follows nothing.
#[derive(Debug, Serialize)]
pub(crate) struct PromptLogprobs(Vec<Option<BTreeMap<u32, PromptToken>>>);

#[derive(Debug, Serialize)]
struct PromptToken {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl PromptLogprobs {
    /// `None` if they were not asked for.
    pub(crate) fn of(chat: &Chat, ids: &[u32], told: &[Option<TokenLogprobs>]) -> Option<Self> {
        let token = |id: u32, logprob: f32, rank: u32| PromptToken {
            logprob: logprob.max(LEAST),
            rank,
            decoded_token: token_text(chat, id),
        };
        let position = |(&id, told): (&u32, &Option<TokenLogprobs>)| {
            let told = told.as_ref()?;
            let top = told.top.iter().zip(1..);
            let mut by_id: BTreeMap<u32, PromptToken> = top
                .map(|(&(id, logprob), rank)| (id, token(id, logprob, rank)))
                .collect();
            by_id.insert(id, token(id, told.logprob, told.rank));
            Some(by_id)
        };
        let positions = ids.iter().zip(told).map(position).collect();
        (!told.is_empty()).then_some(Self(positions))
    }
}

/// Of a text completion; the four lists run in parallel.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<f32>,
    tokens: Vec<String>,
    top_logprobs: Vec<Map<String, Value>>,
}

impl TextLogprobs {
    /// Appends one token; `offset` is where its text starts, in characters, and moves on.
    ///
    /// A prompt's first token follows nothing and has no log-probability. Typed clients take no
    /// null there, so it gets 0, which changes no sum.
    pub(crate) fn push(
        &mut self,
        chat: &Chat,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
        offset: &mut usize,
    ) {
        let text = token_text(chat, id);
        self.text_offset.push(*offset);
        // A character of several tokens is one, where its first byte is.
        let bytes = chat.tokenizer().token_bytes(id).unwrap_or_default();
        *offset += bytes.iter().filter(|byte| (**byte & 0xC0) != 0x80).count();
        let mut top = Map::new();
        if let Some(logprobs) = logprobs {
            let likeliest = logprobs
                .top
                .iter()
                .map(|&(id, lp)| (token_text(chat, id), lp));
            // The token itself is always there, even when it is not among the likeliest.
            for (text, logprob) in likeliest.chain([(text.clone(), logprobs.logprob)]) {
                top.entry(text).or_insert_with(|| logprob.max(LEAST).into());
            }
        }
        self.token_logprobs
            .push(logprobs.map_or(0.0, |logprobs| logprobs.logprob.max(LEAST)));
        self.top_logprobs.push(top);
        self.tokens.push(text);
    }
}

/// A token's text; bytes that are no text on their own become U+FFFD.
pub(crate) fn token_text(chat: &Chat, id: u32) -> String {
    String::from_utf8_lossy(chat.tokenizer().token_bytes(id).unwrap_or_default()).into_owned()
}
