//! Prompts and biases as llama.cpp takes them: texts, token ids, and mixtures of both.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use updraft_chat::{Chat, EncodePolicy};

use crate::api::capped;
use crate::api::weighed::Weighed;
use crate::engine::ModelInfo;
use crate::error::{Error, Result, one_line};
use crate::limits::{MAX_BAD_WORD_BYTES, MAX_LOGIT_BIASES};

/// Entries of all prompts at most: more tokens than any context has.
const MAX_PARTS: usize = 1 << 20;

/// A prompt of which nothing is taken yet: its parts take many times as much as their JSON.
#[derive(Debug, Deserialize)]
pub(super) struct PromptField {
    #[serde(rename = "prompt")]
    _prompt: Weighed<MAX_PARTS>,
}

/// A prompt, a part of one, or a list of either.
#[derive(Debug)]
pub(super) enum Part {
    Id(u32),
    Text(String),
    /// An object's `prompt_string`.
    Named(Option<String>),
    /// An object with something else than text in it.
    Media,
    List(Vec<Part>),
}

/// A list that holds a token id outside of any list is one prompt, of ids and texts.
pub(super) fn is_one_prompt(parts: &[Part]) -> bool {
    parts.iter().any(|part| matches!(part, Part::Id(_)))
}

impl Part {
    /// Refuses what cannot fit the context, before anybody tokenizes it.
    pub(super) fn check_size(&self, info: &ModelInfo) -> Result<()> {
        match self {
            Self::Text(text) | Self::Named(Some(text)) => {
                info.check_text(text.len())?;
                info.check_work("prompt", text.len())
            }
            Self::List(parts) => parts.iter().try_for_each(|part| part.check_size(info)),
            Self::Id(_) | Self::Named(None) | Self::Media => Ok(()),
        }
    }

    /// The tokens of a text, of `{"prompt_string": …}`, or of a list of ids and texts.
    pub(super) fn ids(&self, chat: &Chat, prefix: &[u32]) -> Result<Vec<u32>> {
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
        match self {
            Self::Text(text) | Self::Named(Some(text)) => push(&mut ids, text)?,
            Self::Named(None) => return Err(refuse("the prompt has no prompt_string")),
            Self::Media => return Err(refuse("only text can be prompted")),
            Self::Id(_) => return Err(refuse("a token id alone is no prompt; put it into a list")),
            Self::List(parts) => {
                for part in parts {
                    match part {
                        Self::Id(id) => ids.push(*id),
                        Self::Text(text) => push(&mut ids, text)?,
                        _ => return Err(refuse("a prompt's list holds token ids and texts")),
                    }
                }
            }
        }
        match ids.is_empty() {
            true => Err(refuse("the prompt is empty")),
            false => Ok(ids),
        }
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PartVisitor)
    }
}

struct PartVisitor;

impl<'de> Visitor<'de> for PartVisitor {
    type Value = Part;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, token ids, or a list of those")
    }

    fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Part, E> {
        let id = u32::try_from(id).map_err(|_| E::custom(format!("{id} is no token id")));
        id.map(Part::Id)
    }

    fn visit_str<E>(self, text: &str) -> Result<Part, E> {
        Ok(Part::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Part, A::Error> {
        capped::entries(list, MAX_PARTS).map(Part::List)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Part, A::Error> {
        let mut part = Part::Named(None);
        while let Some(key) = map.next_key::<String>()? {
            match (key.as_str(), &part) {
                ("multimodal_data", _) => {
                    map.next_value::<IgnoredAny>()?;
                    part = Part::Media;
                }
                ("prompt_string", Part::Named(_)) => part = Part::Named(Some(map.next_value()?)),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(part)
    }
}

/// Biases, of tokens or of texts.
#[derive(Debug, Default)]
pub(super) struct Biases(Vec<(Biased, f32)>);

/// What is biased: a token, or every token of a text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Biased {
    Id(u32),
    Text(String),
}

/// How much; `false` is never.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Bias {
    Number(f64),
    Word(bool),
}

impl Biases {
    /// The bias of each token.
    pub(super) fn encoded(self, chat: &Chat) -> Result<Vec<(u32, f32)>> {
        let mut biases = BTreeMap::new();
        for (biased, bias) in self.0 {
            let mut ids = Vec::new();
            match biased {
                Biased::Id(id) => ids.push(id),
                Biased::Text(text) if text.len() > MAX_BAD_WORD_BYTES => {
                    let message = format!("a biased text has at most {MAX_BAD_WORD_BYTES} bytes");
                    return Err(Error::invalid("logit_bias", message));
                }
                Biased::Text(text) => {
                    let encoded =
                        chat.tokenizer()
                            .encode_into(&text, EncodePolicy::Parity, &mut ids);
                    encoded.map_err(|error| Error::invalid("logit_bias", one_line(&error)))?;
                }
            }
            biases.extend(ids.into_iter().map(|id| (id, bias)));
        }
        Ok(biases.into_iter().collect())
    }
}

impl Bias {
    fn value<E: serde::de::Error>(self) -> Result<f32, E> {
        match self {
            Self::Number(bias) => Ok(bias.clamp(-100.0, 100.0) as f32),
            Self::Word(false) => Ok(-100.0),
            Self::Word(true) => Err(E::custom("a bias is a number or false")),
        }
    }
}

impl<'de> Deserialize<'de> for Biases {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BiasesVisitor).map(Self)
    }
}

struct BiasesVisitor;

impl<'de> Visitor<'de> for BiasesVisitor {
    type Value = Vec<(Biased, f32)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("pairs of a token id or text and a number or false, or an object of them")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        let pairs: Vec<(Biased, Bias)> = capped::entries(list, MAX_LOGIT_BIASES)?;
        let pair = |(biased, bias): (Biased, Bias)| Ok((biased, bias.value()?));
        pairs.into_iter().map(pair).collect()
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut biases = Vec::new();
        while let Some((key, bias)) = map.next_entry::<String, Bias>()? {
            if biases.len() == MAX_LOGIT_BIASES {
                let message = format!("at most {MAX_LOGIT_BIASES} entries are possible");
                return Err(A::Error::custom(message));
            }
            let biased = key.parse().map_or(Biased::Text(key), Biased::Id);
            biases.push((biased, bias.value()?));
        }
        Ok(biases)
    }
}
