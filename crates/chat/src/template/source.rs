//! Where a model folder keeps its chat templates and special tokens.

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::Value;
use serde::Deserialize;
use serde_json::{Map, Value as Json};

use super::DEFAULT;
use crate::error::{Error, Result};

/// The files of a model folder that say how it chats, as their bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct TemplateFiles<'a> {
    /// `chat_template.jinja`.
    pub chat_template_jinja: Option<&'a [u8]>,
    /// `additional_chat_templates/<name>.jinja`, by name without the ending.
    pub additional_chat_templates: &'a [(&'a str, &'a [u8])],
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `chat_template.json`, which old processors keep.
    pub chat_template_json: Option<&'a [u8]>,
    /// `special_tokens_map.json`, which old tokenizers keep.
    pub special_tokens_map: Option<&'a [u8]>,
}

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

impl TemplateFiles<'_> {
    /// The templates by name: `.jinja` files before `tokenizer_config.json`
    /// before `chat_template.json`.
    pub(super) fn templates(&self) -> Result<BTreeMap<String, String>> {
        let mut found = BTreeMap::new();
        if let Some(bytes) = self.chat_template_jinja {
            found.insert(DEFAULT.to_owned(), text(bytes, "chat_template.jinja")?);
        }
        for (name, bytes) in self.additional_chat_templates {
            let source = text(bytes, "additional_chat_templates")?;
            found.insert((*name).to_owned(), source);
        }
        if found.is_empty() {
            found = named_templates(self.tokenizer_config, TOKENIZER_CONFIG)?;
        }
        if found.is_empty() {
            found = named_templates(self.chat_template_json, "chat_template.json")?;
        }
        if found.is_empty() {
            return Err(Error::NoTemplate);
        }
        Ok(found)
    }

    /// The special tokens of `tokenizer_config.json`, else of
    /// `special_tokens_map.json`.
    pub(super) fn special_tokens(&self) -> Result<SpecialTokens> {
        let mut tokens = BTreeMap::new();
        for (bytes, file) in [
            (self.special_tokens_map, "special_tokens_map.json"),
            (self.tokenizer_config, TOKENIZER_CONFIG),
        ] {
            let Some(bytes) = bytes else { continue };
            let fields: Map<String, Json> = parse(bytes, file)?;
            for (name, value) in &fields {
                if let (true, Some(token)) = (name.ends_with("_token"), token_text(value)) {
                    tokens.insert(name.clone(), token.to_owned());
                }
            }
        }
        Ok(tokens.into_iter().collect())
    }
}

/// The special tokens a template sees as variables: `bos_token` and its kind.
#[derive(Clone, Debug, Default)]
pub struct SpecialTokens {
    tokens: Arc<[(String, Value)]>,
}

impl SpecialTokens {
    /// These tokens, by the names templates use.
    ///
    /// ```
    /// let tokens = updraft_chat::SpecialTokens::new([("eos_token", "</s>")]);
    /// assert_eq!(tokens.get("eos_token"), Some("</s>"));
    /// ```
    pub fn new<'a>(tokens: impl IntoIterator<Item = (&'a str, &'a str)>) -> SpecialTokens {
        let owned = |(name, token): (&str, &str)| (name.to_owned(), token.to_owned());
        tokens.into_iter().map(owned).collect()
    }

    /// A token by its variable's name.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, token) = self.tokens.iter().find(|(known, _)| known == name)?;
        token.as_str()
    }

    /// All names and tokens.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.tokens
            .iter()
            .filter_map(|(name, token)| Some((name.as_str(), token.as_str()?)))
    }

    pub(super) fn values(&self) -> Arc<[(String, Value)]> {
        Arc::clone(&self.tokens)
    }

    /// For the hash.
    pub(super) fn to_json(&self) -> String {
        let sorted: BTreeMap<&str, &str> = self.iter().collect();
        Json::from_iter(sorted).to_string()
    }
}

impl FromIterator<(String, String)> for SpecialTokens {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(tokens: I) -> SpecialTokens {
        let tokens = tokens.into_iter();
        SpecialTokens {
            tokens: tokens
                .map(|(name, token)| (name, Value::from(token)))
                .collect(),
        }
    }
}

/// `chat_template`, as one source or as a list of named ones.
fn named_templates(bytes: Option<&[u8]>, file: &'static str) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        chat_template: Option<Templates>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Templates {
        One(String),
        Named(Vec<Named>),
        ByName(BTreeMap<String, String>),
    }
    #[derive(Deserialize)]
    struct Named {
        name: String,
        template: String,
    }

    let Some(bytes) = bytes else {
        return Ok(BTreeMap::new());
    };
    let file: File = parse(bytes, file)?;
    Ok(match file.chat_template {
        None => BTreeMap::new(),
        Some(Templates::One(source)) => BTreeMap::from([(DEFAULT.to_owned(), source)]),
        Some(Templates::Named(named)) => named
            .into_iter()
            .map(|entry| (entry.name, entry.template))
            .collect(),
        Some(Templates::ByName(templates)) => templates,
    })
}

/// A token is its text, or an object that holds it as `content`.
fn token_text(value: &Json) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn text(bytes: &[u8], file: &'static str) -> Result<String> {
    std::str::from_utf8(bytes)
        .map(str::to_owned)
        .map_err(|source| Error::ModelFile {
            file,
            source: source.into(),
        })
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], file: &'static str) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|source| Error::ModelFile {
        file,
        source: source.into(),
    })
}
