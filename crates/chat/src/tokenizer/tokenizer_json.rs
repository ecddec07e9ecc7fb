//! What a `tokenizer.json` says of its tokens, read without any engine.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::spelling::{ByteLevel, Spelling};
use crate::error::{Error, Result};

/// The parts of a `tokenizer.json`.
#[derive(Deserialize)]
pub(super) struct TokenizerJson<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Option<Value>,
    #[serde(default)]
    pre_tokenizer: Option<Value>,
    #[serde(default)]
    decoder: Option<Value>,
    #[serde(borrow)]
    model: Model<'a>,
}

/// A token beside the model's own.
#[derive(Deserialize)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    #[serde(default)]
    pub(super) special: bool,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow)]
    vocab: Tokens<'a>,
    #[serde(default)]
    byte_fallback: bool,
}

impl<'a> TokenizerJson<'a> {
    pub(super) fn parse(tokenizer_json: &'a [u8]) -> Result<TokenizerJson<'a>> {
        serde_json::from_slice(tokenizer_json).map_err(tokenizer_error)
    }

    /// The model's own tokens, as the file spells them.
    pub(super) fn tokens(&self) -> impl Iterator<Item = (&str, u32)> {
        let tokens = self.model.vocab.0.iter();
        tokens.map(|(token, id)| (token.as_ref(), *id))
    }

    pub(super) fn added_tokens(&self) -> &[AddedToken] {
        &self.added_tokens
    }

    /// How [`tokens`](Self::tokens) spell bytes.
    pub(super) fn spelling(&self) -> Result<Spelling> {
        let decoder = self.decoder.as_ref();
        if let Some(kind) = ["WordPiece", "CTC"]
            .into_iter()
            .find(|kind| components(decoder).any(|part| is(part, kind)))
        {
            return Err(tokenizer_error(format!(
                "the decoder {kind} does not work byte by byte"
            )));
        }
        let byte_level = components(decoder)
            .chain(components(self.pre_tokenizer.as_ref()))
            .any(|part| is(part, "ByteLevel"));
        let metaspace = components(decoder)
            .any(|part| is(part, "Metaspace") || (is(part, "Replace") && replaces_metaspace(part)));
        Ok(match (byte_level, metaspace) {
            (true, _) => Spelling::ByteLevel(Box::new(ByteLevel::new())),
            (false, true) => Spelling::SentencePiece {
                byte_fallback: self.model.byte_fallback,
            },
            (false, false) => Spelling::Plain,
        })
    }

    /// Whether encoding writes a space before the text.
    pub(super) fn prepends_space(&self) -> bool {
        components(self.normalizer.as_ref()).any(|part| is(part, "Prepend"))
            || components(self.pre_tokenizer.as_ref()).any(|part| {
                let scheme = part.get("prepend_scheme").and_then(Value::as_str);
                let legacy = part.get("add_prefix_space").and_then(Value::as_bool);
                match (is(part, "Metaspace"), is(part, "ByteLevel")) {
                    (true, _) => scheme.map_or(legacy.unwrap_or(true), |scheme| scheme != "never"),
                    (_, true) => legacy.unwrap_or(true),
                    _ => false,
                }
            })
    }
}

/// A component, or the members of a `Sequence` of them, at any depth.
fn components(root: Option<&Value>) -> impl Iterator<Item = &Value> {
    let mut waiting: Vec<&Value> = root.into_iter().collect();
    std::iter::from_fn(move || {
        let next = waiting.pop()?;
        for list in ["decoders", "pretokenizers", "normalizers"] {
            waiting.extend(
                next.get(list)
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten(),
            );
        }
        Some(next)
    })
}

fn is(component: &Value, kind: &str) -> bool {
    component.get("type").is_some_and(|found| found == kind)
}

fn replaces_metaspace(component: &Value) -> bool {
    component
        .pointer("/pattern/String")
        .is_some_and(|text| text == "▁")
}

/// `vocab` is a mapping, or for Unigram a list of pairs.
struct Tokens<'a>(Vec<(Cow<'a, str>, u32)>);

impl<'de: 'a, 'a> Deserialize<'de> for Tokens<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Tokens<'a>, D::Error> {
        struct TokensVisitor;

        impl<'de> Visitor<'de> for TokensVisitor {
            type Value = Tokens<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping of tokens to ids, or a list of tokens with scores")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut tokens = Vec::new();
                while let Some((token, id)) = map.next_entry::<Text<'de>, u32>()? {
                    tokens.push((token.0, id));
                }
                Ok(Tokens(tokens))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut tokens = Vec::new();
                let mut id = 0;
                while let Some((token, _)) = list.next_element::<(Text<'de>, IgnoredAny)>()? {
                    tokens.push((token.0, id));
                    id += 1;
                }
                Ok(Tokens(tokens))
            }
        }

        deserializer.deserialize_any(TokensVisitor)
    }
}

/// A string, borrowed from the file unless it holds an escape.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

pub(super) fn tokenizer_error(source: impl Into<crate::error::BoxError>) -> Error {
    Error::Tokenizer {
        source: source.into(),
    }
}
