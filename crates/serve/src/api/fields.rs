//! The request fields that chat and text completions share, with OpenAI's defaults and ranges.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use updraft_chat::{Chat, TokenizerExt};

use super::capped::{self, Capped};
use super::constrain::FormatFields;
use super::draws::DrawFields;
use super::json::JsonBody;
use crate::app::Shared;
use crate::engine::{GenerateRequest, ModelInfo};
use crate::error::{Error, Result, one_line};
use crate::generate::TextRequest;
use crate::limits::{
    MAX_BAD_WORD_BYTES, MAX_BAD_WORDS, MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOP_TOKEN_IDS,
};

/// Stop strings of one request at most, as OpenAI's.
const MAX_STOPS: usize = 4;
/// Bytes of a cache salt at most.
const MAX_SALT_BYTES: usize = 1024;

/// Everything about a request but its prompt.
#[derive(Debug, Deserialize)]
pub(crate) struct Fields {
    #[serde(default)]
    pub(crate) model: Option<String>,
    #[serde(default)]
    pub(crate) stream: Option<bool>,
    #[serde(default)]
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    n: Option<i64>,
    #[serde(default)]
    best_of: Option<i64>,
    #[serde(default)]
    max_tokens: Option<i64>,
    #[serde(default)]
    max_completion_tokens: Option<i64>,
    #[serde(default)]
    min_tokens: Option<i64>,
    #[serde(default)]
    stop: Option<Stop>,
    #[serde(default)]
    stop_token_ids: Option<Capped<Vec<u32>, MAX_STOP_TOKEN_IDS>>,
    #[serde(default)]
    include_stop_str_in_output: Option<bool>,
    #[serde(default)]
    ignore_eos: Option<bool>,
    #[serde(default)]
    skip_special_tokens: Option<bool>,
    #[serde(default)]
    cache_salt: Option<String>,
    #[serde(default)]
    bad_words: Option<Capped<Vec<String>, MAX_BAD_WORDS>>,
    #[serde(default)]
    logprob_token_ids: Option<Capped<Vec<u32>, MAX_LOGPROBS>>,
    #[serde(default)]
    prompt_logprobs: Option<i64>,
    #[serde(default)]
    truncate_prompt_tokens: Option<i64>,
    #[serde(default)]
    truncation_side: Option<Side>,
    #[serde(default)]
    return_token_ids: Option<bool>,
    #[serde(default)]
    request_id: Option<String>,
    /// How tokens are drawn.
    #[serde(skip)]
    draws: DrawFields,
    /// What form the answer must have.
    #[serde(skip)]
    format: FormatFields,
}

/// Which end of a prompt that is too long goes.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    #[default]
    Left,
    Right,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
    #[serde(default)]
    continuous_usage_stats: Option<bool>,
}

/// One string or a few.
#[derive(Debug, Default)]
pub(crate) struct Stop(Vec<String>);

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StopVisitor).map(Self)
    }
}

struct StopVisitor;

impl<'de> Visitor<'de> for StopVisitor {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_unit<E>(self) -> Result<Vec<String>, E> {
        Ok(Vec::new())
    }

    fn visit_str<E>(self, text: &str) -> Result<Vec<String>, E> {
        Ok(vec![text.to_owned()])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Vec<String>, A::Error> {
        capped::entries(list, MAX_STOPS)
    }
}

/// Refuses stop strings that are empty or too long.
pub(crate) fn check_stops(stops: &[String]) -> Result<()> {
    if stops.iter().any(String::is_empty) {
        return Err(Error::invalid("stop", "a stop string must not be empty"));
    }
    if stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
        let message = format!("a stop string must be at most {MAX_STOP_BYTES} bytes");
        return Err(Error::invalid("stop", message));
    }
    Ok(())
}

/// What of the request concerns the answer's form.
#[derive(Debug, Clone)]
pub(crate) struct Form {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// In every chunk, not only in the last.
    pub(crate) continuous_usage: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) num_choices: u32,
}

impl Fields {
    /// Everything that both completion APIs know.
    pub(crate) fn read(body: &JsonBody) -> Result<Self> {
        Ok(Self {
            draws: DrawFields::read(body)?,
            format: body.read()?,
            ..body.read()?
        })
    }

    /// How tokens are to be drawn.
    pub(crate) fn draws(&self) -> &DrawFields {
        &self.draws
    }

    /// An answer's name: the one asked for, if a log can hold it, or a new one.
    pub(crate) fn answer_id(&self, app: &Shared, prefix: &str) -> String {
        let asked = self.request_id.as_ref();
        let printable = |id: &&String| {
            (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
        };
        match asked.filter(printable) {
            Some(id) => format!("{prefix}{id}"),
            None => app.id(prefix),
        }
    }

    /// The likeliest tokens to tell for each of the prompt's.
    pub(crate) fn prompt_logprobs(&self) -> Result<Option<u32>> {
        match self.prompt_logprobs {
            None => Ok(None),
            Some(top) if (0..=MAX_LOGPROBS as i64).contains(&top) => Ok(Some(top as u32)),
            Some(_) => {
                let message = format!("prompt_logprobs must be between 0 and {MAX_LOGPROBS}");
                Err(Error::invalid("prompt_logprobs", message))
            }
        }
    }

    /// The prompt without what is more than `truncate_prompt_tokens`; -1 is the context.
    pub(crate) fn truncated(&self, mut ids: Vec<u32>, max_model_len: u32) -> Result<Vec<u32>> {
        let keep = match self.truncate_prompt_tokens {
            None => return Ok(ids),
            // One token must be left to say.
            Some(-1) => max_model_len.saturating_sub(1) as usize,
            Some(keep) => count("truncate_prompt_tokens", Some(keep), 1)?.unwrap_or(1) as usize,
        };
        let excess = ids.len().saturating_sub(keep);
        match self.truncation_side.unwrap_or_default() {
            Side::Left => drop(ids.drain(..excess)),
            Side::Right => ids.truncate(keep),
        }
        Ok(ids)
    }

    /// Whether a prompt that is too long is cut instead of refused.
    pub(crate) fn truncates(&self) -> bool {
        self.truncate_prompt_tokens.is_some()
    }

    /// The same with a limit that another API calls `param`.
    pub(crate) fn with_max_tokens(mut self, param: &str, max_tokens: Option<i64>) -> Result<Self> {
        count(param, max_tokens, 1)?;
        self.max_tokens = max_tokens;
        self.max_completion_tokens = None;
        Ok(self)
    }

    /// Checks the fields about the answer's form.
    pub(crate) fn form(&self) -> Result<Form> {
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(Error::invalid(
                "stream_options",
                "stream_options needs `stream: true`",
            ));
        }
        let options = self.stream_options.as_ref();
        let num_choices = count("n", self.n, 1)?.unwrap_or(1);
        if let Some(best_of) = count("best_of", self.best_of, 1)?
            && best_of != num_choices
        {
            return Err(Error::invalid(
                "best_of",
                "best_of other than n is not supported",
            ));
        }
        let include_usage = options
            .and_then(|options| options.include_usage)
            .unwrap_or(false);
        let continuous = options.and_then(|options| options.continuous_usage_stats);
        if self.prompt_logprobs.is_some() && stream {
            let message = "prompt_logprobs cannot be streamed";
            return Err(Error::invalid("prompt_logprobs", message));
        }
        Ok(Form {
            stream,
            include_usage,
            continuous_usage: include_usage && continuous.unwrap_or(false),
            return_token_ids: self.return_token_ids.unwrap_or(false),
            num_choices,
        })
    }

    /// What the completions of all prompts have in common, made once for all of them.
    pub(crate) async fn template(
        &self,
        app: &Shared,
        model: &str,
        chat: &Arc<Chat>,
    ) -> Result<Template> {
        let ModelInfo {
            max_model_len,
            sampling: defaults,
            ..
        } = app.info(model)?;
        let max_tokens = match count("max_completion_tokens", self.max_completion_tokens, 1)? {
            Some(asked) => Some(asked),
            None => count("max_tokens", self.max_tokens, 0)?,
        };
        if self
            .cache_salt
            .as_ref()
            .is_some_and(|salt| salt.len() > MAX_SALT_BYTES)
        {
            let message = format!("cache_salt must be at most {MAX_SALT_BYTES} bytes");
            return Err(Error::invalid("cache_salt", message));
        }
        let request = GenerateRequest {
            sampling: self.draws.params(app, &defaults)?,
            stop_token_ids: self.stop_token_ids(chat),
            min_tokens: count("min_tokens", self.min_tokens, 0)?.unwrap_or(0),
            logprob_ids: self.logprob_ids(),
            bad_words: self.bad_words(app, chat).await?,
            constraint: self.format.constraint()?,
            cache_salt: self.cache_salt.clone(),
            ..GenerateRequest::greedy(model, Vec::new(), 0)
        };
        Ok(Template {
            text: TextRequest {
                request,
                stop: self.stop()?,
                include_stop: self.include_stop_str_in_output.unwrap_or(false),
                skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            },
            max_tokens,
            max_model_len,
            is_seeded: self.draws.seed.is_some(),
        })
    }

    /// The client's and the model's own, each once.
    fn stop_token_ids(&self, chat: &Chat) -> Arc<[u32]> {
        let asked = self.stop_token_ids.iter().flat_map(|Capped(ids)| ids);
        let own = match self.ignore_eos.unwrap_or(false) {
            true => &[],
            false => chat.end_ids(),
        };
        let ids: BTreeSet<u32> = asked.chain(own).copied().collect();
        ids.into_iter().collect()
    }

    /// Each once, in the order asked for.
    fn logprob_ids(&self) -> Arc<[u32]> {
        let mut known = BTreeSet::new();
        let ids = self.logprob_token_ids.iter().flat_map(|Capped(ids)| ids);
        ids.filter(|id| known.insert(**id)).copied().collect()
    }

    /// The tokens of each bad word, at the start of a text and after a space.
    async fn bad_words(&self, app: &Shared, chat: &Arc<Chat>) -> Result<Arc<[Vec<u32>]>> {
        let words = self.bad_words.iter().flat_map(|Capped(words)| words);
        let words: BTreeSet<&String> = words.collect();
        if words.is_empty() {
            return Ok(Arc::default());
        }
        let sound = |word: &&String| (1..=MAX_BAD_WORD_BYTES).contains(&word.len());
        if !words.iter().all(sound) {
            let message = format!("a bad word must have 1 to {MAX_BAD_WORD_BYTES} bytes");
            return Err(Error::invalid("bad_words", message));
        }
        let texts = words
            .into_iter()
            .flat_map(|word| [word.clone(), format!(" {word}")]);
        let (texts, chat): (Vec<String>, _) = (texts.collect(), Arc::clone(chat));
        app.encode(move || {
            let encode = |text: &String| {
                let encoded = chat.tokenizer().encode(text);
                encoded.map_err(|error| Error::invalid("bad_words", one_line(&error)))
            };
            texts.iter().map(encode).collect()
        })
        .await
    }

    fn stop(&self) -> Result<Vec<String>> {
        let stops = self.stop.as_ref().map_or(&[][..], |Stop(stops)| stops);
        check_stops(stops)?;
        Ok(stops.to_vec())
    }
}

/// A request whose prompt is still to come.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) text: TextRequest,
    max_tokens: Option<u32>,
    max_model_len: u32,
    is_seeded: bool,
}

impl Template {
    /// The request for one prompt. `default_max_tokens` is what an absent `max_tokens` means;
    /// `None` is all that is left of the context.
    pub(crate) fn request(
        &self,
        app: &Shared,
        prompt_ids: Vec<u32>,
        default_max_tokens: Option<u32>,
    ) -> Result<TextRequest> {
        let max_model_len = self.max_model_len;
        let prompt_tokens = u32::try_from(prompt_ids.len()).unwrap_or(u32::MAX);
        let left = max_model_len.saturating_sub(prompt_tokens);
        let default = default_max_tokens.map_or(left, |tokens| tokens.min(left));
        let max_tokens = self.max_tokens.unwrap_or(default);
        // A prompt alone may fill the context.
        let is_full = left == 0 && self.max_tokens != Some(0);
        if is_full || prompt_tokens > max_model_len {
            return Err(Error::ContextLength {
                prompt_tokens,
                max_tokens: max_tokens.max(1),
                max_model_len,
            });
        }
        let mut text = self.text.clone();
        if text.request.min_tokens > max_tokens {
            return Err(Error::invalid(
                "min_tokens",
                "min_tokens must be at most max_tokens",
            ));
        }
        if !self.is_seeded {
            text.request.sampling.seed = app.seed();
        }
        text.request.prompt_ids = prompt_ids;
        text.request.max_tokens = max_tokens;
        Ok(text)
    }
}

/// A whole number of at least `least` that fits our counters.
fn count(param: &str, value: Option<i64>, least: u32) -> Result<Option<u32>> {
    let Some(value) = value else { return Ok(None) };
    match u32::try_from(value) {
        Ok(value) if value >= least => Ok(Some(value)),
        _ => Err(Error::invalid(
            param,
            format!("{param} must be at least {least}, not {value}"),
        )),
    }
}
