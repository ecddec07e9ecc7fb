//! The request fields that chat and text completions share, with OpenAI's defaults and ranges.

use serde::Deserialize;
use updraft_chat::{Chat, EncodePolicy};

use super::constrain::FormatFields;
use super::draws::DrawFields;
use super::json::JsonBody;
use crate::app::Shared;
use crate::engine::{GenerateRequest, ModelInfo};
use crate::error::{Error, Result, one_line};
use crate::generate::TextRequest;

/// Stop strings of one request at most, as OpenAI's.
const MAX_STOPS: usize = 4;
/// Bad words of one request at most.
const MAX_BAD_WORDS: usize = 1024;
/// Likeliest tokens for each of the prompt's at most.
const MAX_PROMPT_LOGPROBS: i64 = 20;

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
    stop_token_ids: Option<Vec<u32>>,
    #[serde(default)]
    include_stop_str_in_output: Option<bool>,
    #[serde(default)]
    ignore_eos: Option<bool>,
    #[serde(default)]
    skip_special_tokens: Option<bool>,
    #[serde(default)]
    cache_salt: Option<String>,
    #[serde(default)]
    bad_words: Option<Vec<String>>,
    #[serde(default)]
    logprob_token_ids: Option<Vec<u32>>,
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

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
enum Stop {
    One(String),
    Many(Vec<String>),
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
            draws: body.read()?,
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
            Some(top) if (0..=MAX_PROMPT_LOGPROBS).contains(&top) => Ok(Some(top as u32)),
            Some(_) => {
                let message =
                    format!("prompt_logprobs must be between 0 and {MAX_PROMPT_LOGPROBS}");
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

    /// The request for one prompt. `default_max_tokens` is what an absent `max_tokens` means;
    /// `None` is all that is left of the context.
    pub(crate) fn request(
        &self,
        app: &Shared,
        model: &str,
        chat: &Chat,
        prompt_ids: Vec<u32>,
        default_max_tokens: Option<u32>,
    ) -> Result<TextRequest> {
        let ModelInfo {
            max_model_len,
            sampling: defaults,
            ..
        } = app.info(model)?;
        let prompt_tokens = u32::try_from(prompt_ids.len()).unwrap_or(u32::MAX);
        let left = max_model_len.saturating_sub(prompt_tokens);
        let asked = match count("max_completion_tokens", self.max_completion_tokens, 1)? {
            Some(asked) => Some(asked),
            None => count("max_tokens", self.max_tokens, 0)?,
        };
        let max_tokens = asked
            .or(default_max_tokens.map(|tokens| tokens.min(left)))
            .unwrap_or(left);
        if left == 0 {
            let max_tokens = max_tokens.max(1);
            return Err(Error::ContextLength {
                prompt_tokens,
                max_tokens,
                max_model_len,
            });
        }
        let min_tokens = count("min_tokens", self.min_tokens, 0)?.unwrap_or(0);
        if min_tokens > max_tokens {
            return Err(Error::invalid(
                "min_tokens",
                "min_tokens must be at most max_tokens",
            ));
        }
        let mut stop_token_ids = self.stop_token_ids.clone().unwrap_or_default();
        if !self.ignore_eos.unwrap_or(false) {
            stop_token_ids.extend(chat.end_ids());
        }
        Ok(TextRequest {
            request: GenerateRequest {
                model: model.to_owned(),
                prompt_ids,
                max_tokens,
                sampling: self.draws.params(app, &defaults)?,
                stop_token_ids,
                min_tokens,
                logprobs: None,
                prompt_logprobs: None,
                logprob_ids: self.logprob_token_ids.clone().unwrap_or_default(),
                bad_words: self.bad_words(chat)?,
                embed: false,
                constraint: self.format.constraint()?,
                cache_salt: self.cache_salt.clone(),
            },
            stop: self.stop()?,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
        })
    }

    /// The tokens of each bad word, at the start of a text and after a space.
    fn bad_words(&self, chat: &Chat) -> Result<Vec<Vec<u32>>> {
        let words = self.bad_words.as_deref().unwrap_or_default();
        if words.len() > MAX_BAD_WORDS || words.iter().any(String::is_empty) {
            let message = format!("bad_words are at most {MAX_BAD_WORDS}, none of them empty");
            return Err(Error::invalid("bad_words", message));
        }
        let mut all = Vec::with_capacity(2 * words.len());
        for word in words {
            for text in [word.clone(), format!(" {word}")] {
                let mut ids = Vec::new();
                let encoded = chat
                    .tokenizer()
                    .encode_into(&text, EncodePolicy::Parity, &mut ids);
                encoded.map_err(|error| Error::invalid("bad_words", one_line(&error)))?;
                all.push(ids);
            }
        }
        Ok(all)
    }

    fn stop(&self) -> Result<Vec<String>> {
        let stop = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(one)) => vec![one.clone()],
            Some(Stop::Many(many)) => many.clone(),
        };
        if stop.len() > MAX_STOPS {
            let message = format!("at most {MAX_STOPS} stop strings are possible");
            return Err(Error::invalid("stop", message));
        }
        if stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", "a stop string must not be empty"));
        }
        Ok(stop)
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
