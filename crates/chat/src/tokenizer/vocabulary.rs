//! The tokens of a `tokenizer.json`, each as the bytes it stands for.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use super::spelling::Spelling;
use super::tokenizer_json::{TokenizerJson, tokenizer_error};
use crate::error::Result;

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
    /// [`Error::Tokenizer`](crate::Error::Tokenizer) if it is not one, or if its decoder does not work
    /// token by token on bytes (WordPiece and CTC do not).
    pub fn from_json(tokenizer_json: &[u8]) -> Result<Vocabulary> {
        let file = TokenizerJson::parse(tokenizer_json)?;
        let spelling = file.spelling()?;
        let prefix = if file.prepends_space() { " " } else { "" };
        let ordinary = file
            .tokens()
            .map(|(token, id)| (spelling.bytes(token), id, Kind::Ordinary));
        let added = file.added_tokens().iter().map(|token| {
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

    /// Of two tokens with one id the later wins.
    fn from_tokens(tokens: impl Iterator<Item = (Vec<u8>, u32, Kind)>) -> Result<Vocabulary> {
        let mut as_given = Vec::new();
        let mut slots: Vec<(Range<usize>, Kind)> = Vec::new();
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
                slots.resize(index + 1, (0..0, Kind::Unused));
            }
            slots[index] = (as_given.len()..as_given.len() + bytes.len(), kind);
            as_given.extend_from_slice(&bytes);
        }
        let mut bytes = Vec::with_capacity(as_given.len());
        let mut ends = Vec::with_capacity(slots.len());
        for (range, _) in &slots {
            bytes.extend_from_slice(&as_given[range.clone()]);
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
const MAX_ID: u32 = 1 << 22;
