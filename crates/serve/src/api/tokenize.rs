//! `POST /tokenize` and `/detokenize`, in vLLM's and llama.cpp's words.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use updraft_chat::{Chat, EncodePolicy, TokenizerExt};

use super::capped::Capped;
use super::chat::{self, ChatFields, Excess};
use super::error::ApiError;
use super::json::JsonBody;
use super::logprobs::token_text;
use crate::app::App;
use crate::error::{Error, one_line};

/// Tokens whose texts are told at once at most; one may be hundreds of bytes.
const MAX_SHOWN_TOKENS: usize = 1 << 18;

#[derive(Debug, Deserialize)]
struct TokenizeFields {
    #[serde(default)]
    model: Option<String>,
    /// vLLM's name.
    #[serde(default)]
    prompt: Option<String>,
    /// llama.cpp's.
    #[serde(default)]
    content: Option<String>,
    /// llama.cpp's is `add_special`.
    #[serde(default, alias = "add_special")]
    add_special_tokens: Option<bool>,
    #[serde(default)]
    return_token_strs: Option<bool>,
    /// llama.cpp's: each token with its text.
    #[serde(default)]
    with_pieces: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Tokens,
    token_strs: Option<Vec<String>>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Tokens {
    Ids(Vec<u32>),
    Pieces(Vec<Piece>),
}

#[derive(Debug, Serialize)]
struct Piece {
    id: u32,
    piece: PieceText,
}

/// A text, or the bytes of what is none on its own.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum PieceText {
    Text(String),
    Bytes(Vec<u8>),
}

impl Piece {
    fn new(chat: &Chat, id: u32) -> Self {
        let bytes = chat.tokenizer().token_bytes(id).unwrap_or_default();
        let piece = String::from_utf8(bytes.to_vec());
        let piece = piece.map_or_else(|no| PieceText::Bytes(no.into_bytes()), PieceText::Text);
        Self { id, piece }
    }
}

/// The token ids of a text, or of a conversation as the model would see it.
pub(crate) async fn tokenize(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Json<Tokenized>, ApiError> {
    let fields: TokenizeFields = body.read()?;
    let model = app.model_or_default(fields.model)?;
    let chat = app.chat(&model)?;
    let info = app.info(&model)?;
    // vLLM adds what a prompt begins with unless told otherwise, llama.cpp only when told.
    let adds = fields
        .add_special_tokens
        .unwrap_or(fields.content.is_none());
    let tokens = match fields.prompt.or(fields.content) {
        Some(text) => {
            info.check_work("prompt", text.len())?;
            let chat = chat.clone();
            let mut ids = if adds { info.text_prefix } else { Vec::new() };
            app.encode(move || {
                let encoded = chat
                    .tokenizer()
                    .encode_into(&text, EncodePolicy::Parity, &mut ids);
                match encoded {
                    Ok(()) => Ok(ids),
                    Err(error) => Err(Error::invalid("prompt", one_line(&error))),
                }
            })
            .await?
        }
        None => {
            let fields = body.read::<ChatFields>()?;
            chat::prompt(&app, &chat, fields, &info, Excess::Tokenized).await?
        }
    };
    let (strings, pieces) = (fields.return_token_strs, fields.with_pieces);
    let (has_strings, has_pieces) = (strings.unwrap_or(false), pieces.unwrap_or(false));
    if (has_strings || has_pieces) && tokens.len() > MAX_SHOWN_TOKENS {
        let param = if has_strings {
            "return_token_strs"
        } else {
            "with_pieces"
        };
        let message = format!("the texts of at most {MAX_SHOWN_TOKENS} tokens are told at once");
        return Err(Error::invalid(param, message).into());
    }
    let strings = || tokens.iter().map(|&id| token_text(&chat, id)).collect();
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: info.max_model_len,
        token_strs: has_strings.then(strings),
        tokens: match has_pieces {
            true => Tokens::Pieces(tokens.iter().map(|&id| Piece::new(&chat, id)).collect()),
            false => Tokens::Ids(tokens),
        },
    }))
}

#[derive(Debug, Deserialize)]
struct DetokenizeFields {
    #[serde(default)]
    model: Option<String>,
    tokens: Capped<Vec<u32>, MAX_SHOWN_TOKENS>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Detokenized {
    /// vLLM's name.
    prompt: String,
    /// llama.cpp's.
    content: String,
}

/// The text of token ids.
pub(crate) async fn detokenize(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Json<Detokenized>, ApiError> {
    let fields: DetokenizeFields = body.read()?;
    let chat = app.chat(&app.model_or_default(fields.model)?)?;
    let Capped(tokens) = fields.tokens;
    let vocab_size = chat.tokenizer().vocab_size();
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
        let message = format!("token id {id} is outside the vocabulary of {vocab_size}");
        return Err(Error::invalid("tokens", message).into());
    }
    let content = app.encode(move || Ok(chat.tokenizer().decode(&tokens)));
    let content = content.await?;
    Ok(Json(Detokenized {
        prompt: content.clone(),
        content,
    }))
}
