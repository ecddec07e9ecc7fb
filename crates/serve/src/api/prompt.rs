//! Prompts as OpenAI takes them: texts, token ids, or several of either.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use updraft_chat::{Chat, EncodePolicy, TokenizerExt};

use super::capped;
use super::fields::Fields;
use crate::app::Shared;
use crate::engine::ModelInfo;
use crate::error::{Error, Result, one_line};

/// Prompts of one request at most, as OpenAI's embeddings.
pub(crate) const MAX_PROMPTS: usize = 2048;

/// What is to be continued or embedded. Read without a detour, in which every id would take as
/// much memory as a text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

/// One prompt, and the text it came as.
#[derive(Debug, Clone)]
pub(crate) struct PromptText {
    pub(crate) ids: Vec<u32>,
    /// Of ids there is none until somebody [asks](Self::text).
    given: Option<String>,
}

impl Prompt {
    /// How many prompts there are.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Ids(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::IdLists(lists) => lists.len(),
        }
    }

    /// Refuses what cannot fit the context, before anybody tokenizes it.
    pub(crate) fn check_size(&self, info: &ModelInfo) -> Result<()> {
        match self {
            Self::Text(text) => info.check_text(text.len()),
            Self::Texts(texts) => texts
                .iter()
                .try_for_each(|text| info.check_text(text.len())),
            Self::Ids(_) | Self::IdLists(_) => Ok(()), // Counted where they are used.
        }
    }

    /// Refuses what would take too much to tokenize.
    pub(crate) fn check_work(&self, param: &str, info: &ModelInfo) -> Result<()> {
        let texts = match self {
            Self::Text(text) => std::slice::from_ref(text),
            Self::Texts(texts) => texts,
            Self::Ids(_) | Self::IdLists(_) => &[],
        };
        let mut texts = texts.iter();
        texts.try_for_each(|text| info.check_work(param, text.len()))
    }

    /// The tokens of each prompt.
    pub(crate) async fn into_prompts(
        self,
        app: &Shared,
        param: &'static str,
        chat: &Arc<Chat>,
        prefix: Vec<u32>,
    ) -> Result<Vec<PromptText>> {
        let chat = Arc::clone(chat);
        let prompts = app.encode(move || {
            let tokenizer = chat.tokenizer();
            let from_ids = |ids| PromptText { ids, given: None };
            let from_text = |text: String| {
                let mut ids = prefix.clone();
                let encoded = tokenizer.encode_into(&text, EncodePolicy::Parity, &mut ids);
                let given = Some(text);
                match encoded {
                    Ok(()) => Ok(PromptText { ids, given }),
                    Err(error) => Err(Error::invalid(param, one_line(&error))),
                }
            };
            match self {
                Self::Text(text) => Ok(vec![from_text(text)?]),
                Self::Ids(ids) => Ok(vec![from_ids(ids)]),
                Self::Texts(texts) => texts.into_iter().map(from_text).collect(),
                Self::IdLists(lists) => Ok(lists.into_iter().map(from_ids).collect()),
            }
        });
        let prompts = prompts.await?;
        match prompts.iter().any(|prompt| prompt.ids.is_empty()) || prompts.is_empty() {
            true => Err(Error::invalid(param, format!("the {param} is empty"))),
            false => Ok(prompts),
        }
    }
}

impl PromptText {
    /// The same with at most as many tokens as asked for.
    pub(crate) fn truncated(self, fields: &Fields, max_model_len: u32) -> Result<Self> {
        let before = self.ids.len();
        let ids = fields.truncated(self.ids, max_model_len)?;
        let given = self.given.filter(|_| ids.len() == before);
        Ok(Self { ids, given })
    }

    /// Its text. Of ids it may be hundreds of times as long: ask once they are known to fit.
    pub(crate) fn text(self, chat: &Chat) -> String {
        let decode = || chat.tokenizer().decode(&self.ids);
        self.given.unwrap_or_else(decode)
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

const EXPECTING: &str =
    "it must be a string, a list of strings, a list of token ids or a list of those";

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTING)
    }

    fn visit_str<E>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
        // The first entry says what the list is of; the others must be the same.
        let mut prompt = match list.next_element()? {
            None => return Ok(Prompt::Ids(Vec::new())),
            Some(Entry::Id(id)) => Prompt::Ids(vec![id]),
            Some(Entry::Text(text)) => Prompt::Texts(vec![text]),
            Some(Entry::Ids(ids)) => Prompt::IdLists(vec![ids]),
        };
        while let Some(entry) = list.next_element()? {
            match (&mut prompt, entry) {
                (Prompt::Ids(ids), Entry::Id(id)) => ids.push(id),
                (Prompt::Texts(texts), Entry::Text(text)) => texts.push(text),
                (Prompt::IdLists(lists), Entry::Ids(ids)) => lists.push(ids),
                _ => return Err(A::Error::custom(EXPECTING)),
            }
            if !matches!(prompt, Prompt::Ids(_)) && prompt.count() > MAX_PROMPTS {
                let message = format!("at most {MAX_PROMPTS} prompts are possible at once");
                return Err(A::Error::custom(message));
            }
        }
        Ok(prompt)
    }
}

/// Of a list of prompts, or of token ids.
enum Entry {
    Id(u32),
    Text(String),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTING)
    }

    fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Entry, E> {
        match u32::try_from(id) {
            Ok(id) => Ok(Entry::Id(id)),
            Err(_) => Err(E::custom(EXPECTING)),
        }
    }

    fn visit_str<E>(self, text: &str) -> Result<Entry, E> {
        Ok(Entry::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Entry, A::Error> {
        capped::entries(list, usize::MAX).map(Entry::Ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_comes_in_four_forms_and_no_other() {
        let read = |json: &str| serde_json::from_str::<Prompt>(json).ok();
        assert_eq!(read(r#""a""#), Some(Prompt::Text("a".into())));
        assert_eq!(read("[1, 2]"), Some(Prompt::Ids(vec![1, 2])));
        let texts = Prompt::Texts(vec!["a".into(), "b".into()]);
        assert_eq!(read(r#"["a", "b"]"#), Some(texts));
        let lists = Prompt::IdLists(vec![vec![1], vec![2, 3]]);
        assert_eq!(read("[[1], [2, 3]]"), Some(lists));
        assert_eq!(read("[]"), Some(Prompt::Ids(Vec::new())));
        for no_prompt in [
            "1",
            "null",
            "{}",
            r#"[1, "a"]"#,
            "[[1], 2]",
            "[-1]",
            "[4294967296]",
            "[[[1]]]",
        ] {
            assert_eq!(read(no_prompt), None, "{no_prompt}");
        }
    }

    #[test]
    fn no_more_prompts_are_read_than_may_be() {
        let many = |count| format!("[{}]", vec!["[1]"; count].join(","));
        assert!(serde_json::from_str::<Prompt>(&many(MAX_PROMPTS)).is_ok());
        let error = serde_json::from_str::<Prompt>(&many(MAX_PROMPTS + 1)).expect_err("too many");
        assert!(error.to_string().contains("2048"), "{error}");
        let long = format!("[{}]", vec!["1"; 10 * MAX_PROMPTS].join(","));
        assert!(
            serde_json::from_str::<Prompt>(&long).is_ok(),
            "one prompt of many ids"
        );
    }
}
