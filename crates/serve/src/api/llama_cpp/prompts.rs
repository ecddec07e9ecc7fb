//! Prompts and biases as llama.cpp takes them: texts, token ids, and mixtures of both.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use updraft_chat::{Chat, EncodePolicy};

use crate::error::{Error, Result, one_line};

/// A list that holds a token id outside of any list is one prompt, of ids and texts.
pub(super) fn is_one_prompt(parts: &[Value]) -> bool {
    parts.iter().any(Value::is_number)
}

/// The tokens of a text, of `{"prompt_string": …}`, or of a list of ids and texts.
pub(super) fn ids_of(chat: &Chat, prompt: &Value, prefix: &[u32]) -> Result<Vec<u32>> {
    let refuse = |message: &str| Error::invalid("prompt", message);
    let mut ids = Vec::new();
    let push = |ids: &mut Vec<u32>, text: &str| {
        if ids.is_empty() {
            ids.extend_from_slice(prefix);
        }
        let encoded = chat
            .tokenizer()
            .encode_into(text, EncodePolicy::Parity, ids);
        encoded.map_err(|error| refuse(&one_line(&error)))
    };
    match prompt {
        Value::String(text) => push(&mut ids, text)?,
        Value::Object(fields) if fields.contains_key("multimodal_data") => {
            return Err(refuse("only text can be prompted"));
        }
        Value::Object(fields) => match fields.get("prompt_string").and_then(Value::as_str) {
            Some(text) => push(&mut ids, text)?,
            None => return Err(refuse("the prompt has no prompt_string")),
        },
        Value::Array(parts) => {
            for part in parts {
                match (part, part.as_u64().map(u32::try_from)) {
                    (_, Some(Ok(id))) => ids.push(id),
                    (Value::String(text), _) => push(&mut ids, text)?,
                    _ => return Err(refuse("a prompt's list holds token ids and texts")),
                }
            }
        }
        _ => {
            return Err(refuse(
                "the prompt is a text, token ids, or a list of those",
            ));
        }
    }
    match ids.is_empty() {
        true => Err(refuse("the prompt is empty")),
        false => Ok(ids),
    }
}

/// The bias of each token, named by its id or by a text it is part of.
pub(super) fn biases(chat: &Chat, field: Option<&Value>) -> Result<Vec<(u32, f32)>> {
    let refuse = || {
        Error::invalid(
            "logit_bias",
            "a bias is [token id or text, number or false]",
        )
    };
    let pairs: Vec<(Value, Value)> = match field {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(fields)) => {
            let key = |key: &String| {
                key.parse::<u32>()
                    .map_or_else(|_| json!(key), |id| json!(id))
            };
            fields
                .iter()
                .map(|(token, bias)| (key(token), bias.clone()))
                .collect()
        }
        Some(Value::Array(pairs)) => {
            let pair = |pair: &Value| match pair.as_array().map(Vec::as_slice) {
                Some([token, bias]) => Ok((token.clone(), bias.clone())),
                _ => Err(refuse()),
            };
            pairs.iter().map(pair).collect::<Result<_>>()?
        }
        Some(_) => return Err(refuse()),
    };
    let mut biases = BTreeMap::new();
    for (token, bias) in pairs {
        let bias = match bias {
            Value::Bool(false) => -100.0,
            bias => bias.as_f64().ok_or_else(refuse)?.clamp(-100.0, 100.0) as f32,
        };
        let mut ids = Vec::new();
        match (&token, token.as_u64().map(u32::try_from)) {
            (_, Some(Ok(id))) => ids.push(id),
            (Value::String(text), _) => {
                let encoded = chat
                    .tokenizer()
                    .encode_into(text, EncodePolicy::Parity, &mut ids);
                encoded.map_err(|_| refuse())?;
            }
            _ => return Err(refuse()),
        }
        biases.extend(ids.into_iter().map(|id| (id, bias)));
    }
    Ok(biases.into_iter().collect())
}
