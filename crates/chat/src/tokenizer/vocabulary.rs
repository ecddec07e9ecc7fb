//! The tokens of a `tokenizer.json`, each as the bytes it stands for.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::OnceLock;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::error::{Error, Result};

/// Every token's bytes, and which tokens are special.
///
/// Read from `tokenizer.json` without any engine, so that all engines agree.
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    added: HashMap<String, u32>,
    prefix: &'static str,
    strips_prefix: bool,
    by_bytes: OnceLock<Vec<u32>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Unused,
    Ordinary,
    Added,
    Special,
}

impl Vocabulary {
    /// Reads the vocabulary of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it is not one, or if its decoder does not work
    /// token by token on bytes (WordPiece and CTC do not).
    pub fn from_json(tokenizer_json: &[u8]) -> Result<Vocabulary> {
        let file: File<'_> = serde_json::from_slice(tokenizer_json).map_err(tokenizer_error)?;
        let spelling = file.spelling()?;
        let prefix = if file.prepends_space() { " " } else { "" };
        let ordinary = file
            .model
            .vocab
            .0
            .into_iter()
            .map(|(token, id)| (spelling.bytes(&token), id, Kind::Ordinary));
        let added = file.added_tokens.iter().map(|token| {
            let kind = if token.special {
                Kind::Special
            } else {
                Kind::Added
            };
            (token.content.as_bytes().to_vec(), token.id, kind)
        });
        let mut vocabulary = Vocabulary::from_tokens(ordinary.chain(added))?;
        vocabulary.prefix = prefix;
        vocabulary.strips_prefix = !matches!(spelling, Spelling::ByteLevel(_));
        Ok(vocabulary)
    }

    /// A vocabulary of plain tokens in id order, then special ones.
    pub fn new<'a, 'b>(
        tokens: impl IntoIterator<Item = &'a [u8]>,
        special: impl IntoIterator<Item = &'b str>,
    ) -> Vocabulary {
        let ordinary = tokens
            .into_iter()
            .map(|token| (token.to_vec(), Kind::Ordinary));
        let special = special
            .into_iter()
            .map(|token| (token.as_bytes().to_vec(), Kind::Special));
        let tokens = ordinary
            .chain(special)
            .zip(0..)
            .map(|((token, kind), id)| (token, id, kind));
        Vocabulary::from_tokens(tokens).expect("ids in order leave no room for a wild one")
    }

    fn from_tokens(tokens: impl Iterator<Item = (Vec<u8>, u32, Kind)>) -> Result<Vocabulary> {
        let mut slots: Vec<(Vec<u8>, Kind)> = Vec::new();
        let mut added = HashMap::new();
        for (bytes, id, kind) in tokens {
            if id > MAX_ID {
                return Err(tokenizer_error(format!("token id {id} is out of range")));
            }
            if kind != Kind::Ordinary {
                added.insert(String::from_utf8_lossy(&bytes).into_owned(), id);
            }
            let index = id as usize;
            if slots.len() <= index {
                slots.resize(index + 1, (Vec::new(), Kind::Unused));
            }
            slots[index] = (bytes, kind);
        }
        let mut bytes = Vec::with_capacity(slots.len() * 7);
        let mut ends = Vec::with_capacity(slots.len());
        for (token, _) in &slots {
            bytes.extend_from_slice(token);
            ends.push(u32::try_from(bytes.len()).map_err(tokenizer_error)?);
        }
        Ok(Vocabulary {
            bytes,
            ends,
            kinds: slots.iter().map(|&(_, kind)| kind).collect(),
            added,
            prefix: "",
            strips_prefix: false,
            by_bytes: OnceLock::new(),
        })
    }

    /// One more than the highest id.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes an id stands for; `None` for an id no token has.
    #[inline]
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let index = id as usize;
        match self.kinds.get(index)? {
            Kind::Unused => None,
            _ => Some(&self.bytes[self.start(index)..self.ends[index] as usize]),
        }
    }

    /// The id of a token, by its text; an added token wins over an ordinary one.
    pub fn id(&self, token: &str) -> Option<u32> {
        if let Some(&id) = self.added.get(token) {
            return Some(id);
        }
        let by_bytes = self.by_bytes.get_or_init(|| {
            let mut ids: Vec<u32> = (0..).take(self.len()).collect();
            ids.retain(|&id| self.kinds[id as usize] == Kind::Ordinary);
            ids.sort_by_key(|&id| (self.bytes(id), id));
            ids
        });
        let at = by_bytes.partition_point(|&id| self.bytes(id) < Some(token.as_bytes()));
        by_bytes
            .get(at)
            .copied()
            .filter(|&id| self.bytes(id) == Some(token.as_bytes()))
    }

    /// Whether an id is a special (control) token.
    #[inline]
    pub fn is_special(&self, id: u32) -> bool {
        self.kinds.get(id as usize) == Some(&Kind::Special)
    }

    /// Whether an id was added beside the model's own tokens, special or not.
    #[inline]
    pub fn is_added(&self, id: u32) -> bool {
        matches!(
            self.kinds.get(id as usize),
            Some(Kind::Special | Kind::Added)
        )
    }

    /// The special tokens, in id order.
    pub fn special_tokens(&self) -> impl Iterator<Item = (u32, &str)> {
        (0..)
            .zip(&self.kinds)
            .filter(|&(_, &kind)| kind == Kind::Special)
            .filter_map(|(id, _)| Some((id, std::str::from_utf8(self.bytes(id)?).ok()?)))
    }

    /// What encoding writes before a text that does not start with it: a
    /// space for SentencePiece vocabularies, else nothing.
    pub fn prefix(&self) -> &str {
        self.prefix
    }

    /// The text of ids; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.bytes(id).unwrap_or_default());
        }
        let text = match self.strips_prefix {
            true => bytes.strip_prefix(self.prefix.as_bytes()).unwrap_or(&bytes),
            false => &bytes,
        };
        String::from_utf8_lossy(text).into_owned()
    }

    #[inline]
    fn start(&self, index: usize) -> usize {
        match index {
            0 => 0,
            _ => self.ends[index - 1] as usize,
        }
    }

    /// How many bytes an id stands for; none for an id no token has.
    #[inline]
    pub(super) fn width(&self, id: u32) -> usize {
        let index = id as usize;
        match self.ends.get(index) {
            Some(&end) => end as usize - self.start(index),
            None => 0,
        }
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary")
            .field("len", &self.len())
            .field("added", &self.added.len())
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// Refuses a file whose ids would make us allocate without measure.
const MAX_ID: u32 = 1 << 24;

pub(super) fn tokenizer_error(source: impl Into<crate::error::BoxError>) -> Error {
    Error::Tokenizer {
        source: source.into(),
    }
}

/// How a vocabulary's strings spell bytes.
enum Spelling {
    /// GPT-2's table of one printable character per byte.
    ByteLevel(HashMap<char, u8>),
    /// `▁` is a space; `<0x0A>` may be a byte.
    SentencePiece { byte_fallback: bool },
    /// As written.
    Plain,
}

impl Spelling {
    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Spelling::Plain => token.as_bytes().to_vec(),
            Spelling::SentencePiece { byte_fallback } => match fallback_byte(token) {
                Some(byte) if *byte_fallback => vec![byte],
                _ => token.replace('▁', " ").into_bytes(),
            },
            Spelling::ByteLevel(table) => {
                let bytes: Option<Vec<u8>> =
                    token.chars().map(|c| table.get(&c).copied()).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
        }
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    match digits.len() {
        2 => u8::from_str_radix(digits, 16).ok(),
        _ => None,
    }
}

/// GPT-2's table: printable Latin-1 stands for itself, the other bytes for
/// the characters from U+0100 on.
fn byte_level_table() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = '\u{100}'..;
    (0..=u8::MAX)
        .filter_map(|byte| match printable(byte) {
            true => Some((char::from(byte), byte)),
            false => next.next().map(|c| (c, byte)),
        })
        .collect()
}

#[derive(Deserialize)]
struct File<'a> {
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

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow)]
    vocab: Tokens<'a>,
    #[serde(default)]
    byte_fallback: bool,
}

impl File<'_> {
    fn spelling(&self) -> Result<Spelling> {
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
            (true, _) => Spelling::ByteLevel(byte_level_table()),
            (false, true) => Spelling::SentencePiece {
                byte_fallback: self.model.byte_fallback,
            },
            (false, false) => Spelling::Plain,
        })
    }

    fn prepends_space(&self) -> bool {
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
