//! The request fields that chat and text completions share, with OpenAI's defaults and ranges.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use updraft_chat::Chat;

use crate::app::Shared;
use crate::constraint::Constraint;
use crate::engine::{GenerateRequest, ModelInfo};
use crate::error::{Error, Result};
use crate::generate::TextRequest;
use crate::sampling::{SamplingDefaults, SamplingParams};

/// Stop strings of one request at most, as OpenAI's.
const MAX_STOPS: usize = 4;

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
    seed: Option<i64>,
    #[serde(default)]
    temperature: Option<f64>,
    #[serde(default)]
    top_p: Option<f64>,
    #[serde(default)]
    top_k: Option<i64>,
    #[serde(default)]
    min_p: Option<f64>,
    #[serde(default)]
    frequency_penalty: Option<f64>,
    #[serde(default)]
    presence_penalty: Option<f64>,
    #[serde(default)]
    repetition_penalty: Option<f64>,
    #[serde(default)]
    response_format: Option<ResponseFormat>,
    #[serde(default)]
    cache_salt: Option<String>,
    #[serde(default)]
    logit_bias: Option<BTreeMap<String, f64>>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
    #[serde(default)]
    continuous_usage_stats: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    json_schema: Option<JsonSchema>,
}

#[derive(Debug, Deserialize)]
struct JsonSchema {
    #[serde(default)]
    schema: Option<Value>,
}

/// What of the request concerns the answer's form.
#[derive(Debug, Clone)]
pub(crate) struct Form {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) num_choices: u32,
}

impl Fields {
    /// The temperature asked for.
    pub(crate) fn temperature(&self) -> Option<f64> {
        self.temperature
    }

    /// The `top_p` asked for.
    pub(crate) fn top_p(&self) -> Option<f64> {
        self.top_p
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
        if options.is_some_and(|options| options.continuous_usage_stats.is_some()) {
            tracing::debug!("continuous_usage_stats is ignored: usage comes in the last chunk");
        }
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
        Ok(Form {
            stream,
            include_usage,
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
                sampling: self.sampling(app, &defaults)?,
                stop_token_ids,
                min_tokens,
                logprobs: None,
                prompt_logprobs: None,
                embed: false,
                constraint: self.constraint()?,
                cache_salt: self.cache_salt.clone(),
            },
            stop: self.stop()?,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
        })
    }

    fn constraint(&self) -> Result<Option<Constraint>> {
        let refuse = |param: &str, message: &str| Err(Error::invalid(param, message));
        let Some(format) = &self.response_format else {
            return Ok(None);
        };
        match format.kind.as_str() {
            "text" => Ok(None),
            "json_object" => Ok(Some(Constraint::JsonObject)),
            "json_schema" => match &format.json_schema {
                Some(JsonSchema {
                    schema: Some(schema),
                }) => Constraint::json_schema(schema.clone()).map(Some),
                _ => refuse("response_format.json_schema", "the schema is missing"),
            },
            _ => refuse(
                "response_format.type",
                "the type must be text, json_object or json_schema",
            ),
        }
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

    fn sampling(&self, app: &Shared, defaults: &SamplingDefaults) -> Result<SamplingParams> {
        let or = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);
        let top_k = match self.top_k.or(defaults.top_k) {
            None | Some(-1) => 0,
            Some(top_k) => u32::try_from(top_k)
                .map_err(|_| Error::invalid("top_k", "top_k must be -1, 0 or a positive number"))?,
        };
        let params = SamplingParams {
            temperature: or(self.temperature.or(defaults.temperature), 1.0),
            top_p: or(self.top_p.or(defaults.top_p), 1.0),
            top_k,
            min_p: or(self.min_p.or(defaults.min_p), 0.0),
            frequency_penalty: or(self.frequency_penalty, 0.0),
            presence_penalty: or(self.presence_penalty, 0.0),
            repetition_penalty: or(self.repetition_penalty.or(defaults.repetition_penalty), 1.0),
            logit_bias: self.logit_bias()?,
            seed: self.seed.map_or_else(|| app.seed(), i64::cast_unsigned),
        };
        params.validate()?;
        Ok(params)
    }

    fn logit_bias(&self) -> Result<Vec<(u32, f32)>> {
        let biases = self.logit_bias.iter().flatten();
        biases
            .map(|(id, bias)| match id.parse() {
                Ok(id) => Ok((id, *bias as f32)),
                Err(_) => Err(Error::invalid(
                    "logit_bias",
                    "logit_bias needs token ids as keys",
                )),
            })
            .collect()
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
