//! A model's template and tokenizer together: conversations to token ids.

use std::ops::Range;
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Rejection, Result};
use crate::example::Example;
use crate::message::Conversation;
use crate::span::{Rendered, TurnMarkers, render_spans};
use crate::template::{ChatTemplate, LocalTime, RenderOptions, TemplateFiles};
use crate::tokenizer::{EncodePolicy, Tokenizer, TokenizerExt as _};

/// How one model chats: its template, its tokenizer, and the tokens that end
/// its turns.
///
/// Clones share everything; a `Chat` can be used from any number of threads.
#[derive(Clone, Debug)]
pub struct Chat {
    template: Arc<ChatTemplate>,
    tokenizer: Arc<dyn Tokenizer>,
    markers: Arc<TurnMarkers>,
    end_ids: Vec<u32>,
    bos: Option<(u32, String)>,
    now: Option<LocalTime>,
    tokenizer_hash: [u8; 32],
}

/// The files of a model folder that [`Chat::from_files`] reads, as their bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChatFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer_json: &'a [u8],
    /// The files that hold templates and special tokens.
    pub template: TemplateFiles<'a>,
    /// `generation_config.json`, which names the tokens that end generation.
    pub generation_config: Option<&'a [u8]>,
}

impl Chat {
    /// Loads what a model folder says about chatting.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if `tokenizer.json` cannot be read,
    /// [`Error::NoTemplate`] if no file holds a chat template, and as
    /// [`ChatTemplate::from_files`].
    #[cfg(any(feature = "fast", feature = "stable"))]
    pub fn from_files(files: &ChatFiles<'_>) -> Result<Chat> {
        let template = ChatTemplate::from_files(&files.template)?;
        let tokenizer = crate::tokenizer::load_tokenizer(files.tokenizer_json)?;
        let ends = generation_ends(files.generation_config)?;
        let mut chat = Chat::with_ends(template, tokenizer, &ends);
        chat.tokenizer_hash = Sha256::digest(files.tokenizer_json).into();
        Ok(chat)
    }

    /// A template and a tokenizer, however they came to be. The turn's end is
    /// learnt from the template.
    pub fn new(template: ChatTemplate, tokenizer: Arc<dyn Tokenizer>) -> Chat {
        Chat::with_ends(template, tokenizer, &[])
    }

    fn with_ends(template: ChatTemplate, tokenizer: Arc<dyn Tokenizer>, ends: &[u32]) -> Chat {
        let vocabulary = tokenizer.vocabulary();
        let special = template.special_tokens();
        let text = |id: &u32| {
            let bytes = vocabulary.bytes(*id)?;
            Some(String::from_utf8_lossy(bytes).into_owned())
        };
        let eos = special.get("eos_token").map(str::to_owned);
        let known = ends.iter().filter_map(text).chain(eos).collect();
        let control = vocabulary.special_tokens().map(|(_, token)| token);
        let markers = TurnMarkers::learn(&template, control, known);
        let mut end_ids: Vec<u32> = markers
            .ends
            .iter()
            .filter_map(|end| vocabulary.id(end))
            .chain(ends.iter().copied())
            .collect();
        end_ids.sort_unstable();
        end_ids.dedup();
        let bos = special
            .get("bos_token")
            .and_then(|token| Some((vocabulary.id(token)?, token.to_owned())));
        let mut hash = Sha256::new();
        for id in 0..u32::try_from(vocabulary.len()).unwrap_or(u32::MAX) {
            let bytes = vocabulary.bytes(id).unwrap_or_default();
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
        Chat {
            template: Arc::new(template),
            tokenizer_hash: hash.finalize().into(),
            markers: Arc::new(markers),
            tokenizer,
            end_ids,
            bos,
            now: None,
        }
    }

    /// Renders for training as of this time, for templates that ask for the
    /// date.
    #[must_use]
    pub fn with_now(mut self, now: LocalTime) -> Chat {
        self.now = Some(now);
        self
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<dyn Tokenizer> {
        &self.tokenizer
    }

    /// The ids that end an assistant's turn, ascending: those that
    /// `generation_config.json` and the tokenizer name, and the one the
    /// template writes.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// SHA-256 over template, tokenizer, ends and clock: equal hashes make
    /// equal examples.
    pub fn hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.template.hash());
        hash.update(self.tokenizer_hash);
        for end in &self.markers.ends {
            hash.update((end.len() as u64).to_le_bytes());
            hash.update(end);
        }
        let now = self.now.filter(|_| self.template.reads_clock());
        hash.update(format!("{now:?}"));
        hash.finalize().into()
    }

    /// Renders a conversation and finds what of it is trained, in bytes.
    ///
    /// # Errors
    /// The [`Rejection`] says why not.
    pub fn render_spans(&self, conversation: &Conversation) -> Result<Rendered, Rejection> {
        if conversation.messages.is_empty() {
            return Err(Rejection::Empty);
        }
        for (index, message) in conversation.messages.iter().enumerate() {
            if let Some(weight) = message
                .weight
                .filter(|&weight| weight != 0.0 && weight != 1.0)
            {
                return Err(Rejection::Weight { index, weight });
            }
        }
        let options = RenderOptions {
            now: self.now,
            ..RenderOptions::default()
        };
        render_spans(&self.template, &self.markers, conversation, &options)
    }

    /// The training example of a conversation: its tokens, and those of the
    /// assistant to train.
    ///
    /// # Errors
    /// The [`Rejection`] says why there is none.
    pub fn example(&self, conversation: &Conversation) -> Result<Example, Rejection> {
        let rendered = self.render_spans(conversation)?;
        if rendered.spans.is_empty() {
            return Err(Rejection::NothingToTrain);
        }
        let input_ids = self.encode(&rendered.text)?;
        let ends = self.tokenizer.token_ends(&rendered.text, &input_ids);
        let example = Example {
            input_ids,
            loss_spans: token_spans(&rendered.spans, &ends),
        };
        match example.trained_tokens() {
            0 => Err(Rejection::NothingToTrain),
            _ => Ok(example),
        }
    }

    /// The prompt of a conversation: what a model is given to go on from.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode_into`], and
    /// [`Error::DoubledBos`].
    pub fn prompt(&self, conversation: &Conversation, options: &RenderOptions) -> Result<Vec<u32>> {
        self.encode(&self.template.render(conversation, options)?)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.tokenizer
            .encode_into(text, EncodePolicy::Parity, &mut ids)?;
        match &self.bos {
            Some((bos, token)) if ids.starts_with(&[*bos, *bos]) => Err(Error::DoubledBos {
                token: token.clone(),
            }),
            _ => Ok(ids),
        }
    }
}

/// The tokens that hold a byte of a span; touching ranges are joined.
fn token_spans(spans: &[Range<usize>], ends: &[usize]) -> Vec<Range<u32>> {
    let mut found: Vec<Range<u32>> = Vec::with_capacity(spans.len());
    let mut from = 0;
    for span in spans {
        let first = from + ends[from..].partition_point(|&end| end <= span.start);
        let last = first + ends[first..].partition_point(|&end| end < span.end);
        let end = (last + 1).min(ends.len());
        from = first;
        if first >= end || span.is_empty() {
            continue;
        }
        let (first, end) = (first as u32, end as u32);
        match found.last_mut() {
            Some(previous) if previous.end >= first => previous.end = previous.end.max(end),
            _ => found.push(first..end),
        }
    }
    found
}

/// `eos_token_id` is an id or a list of them.
fn generation_ends(generation_config: Option<&[u8]>) -> Result<Vec<u32>> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        eos_token_id: Option<Ids>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }

    let Some(bytes) = generation_config else {
        return Ok(Vec::new());
    };
    let file: File = serde_json::from_slice(bytes).map_err(|source| Error::ModelFile {
        file: "generation_config.json",
        source: source.into(),
    })?;
    Ok(match file.eos_token_id {
        None => Vec::new(),
        Some(Ids::One(id)) => vec![id],
        Some(Ids::Many(ids)) => ids,
    })
}

#[cfg(test)]
mod tests {
    use super::token_spans;

    #[track_caller]
    fn check(spans: &[(usize, usize)], expected: &[(u32, u32)]) {
        let spans: Vec<_> = spans.iter().map(|&(start, end)| start..end).collect();
        let found = token_spans(&spans, &[2, 4, 4, 7, 9]);
        let found: Vec<_> = found.iter().map(|span| (span.start, span.end)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_token_that_holds_a_byte_of_a_span_is_in() {
        check(&[(2, 4)], &[(1, 2)]);
        check(&[(3, 5)], &[(1, 4)]);
        check(&[(0, 1), (8, 9)], &[(0, 1), (4, 5)]);
        check(&[(0, 2), (2, 4)], &[(0, 2)]);
        check(&[(5, 5)], &[]);
    }
}
