//! llama.cpp's own dialect: `POST /completion`, `GET /slots`, counting a prompt's tokens.

mod answer;
mod prompts;
mod samplers;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::future;
use serde::Deserialize;
use serde_json::{Value, json};
use updraft_chat::Chat;

use self::answer::Answer;
use self::prompts::{Biases, Part, PromptField, is_one_prompt};
use self::samplers::Others;
use super::capped::Capped;
use super::chat::{ChatFields, Excess, prompt};
use super::constrain::FormatFields;
use super::draws::DrawFields;
use super::error::ApiError;
use super::fields::check_stops;
use super::json::JsonBody;
use super::unsupported;
use crate::app::{App, Shared};
use crate::engine::GenerateRequest;
use crate::error::{Error, Result};
use crate::generate::TextRequest;
use crate::limits::{MAX_LOGPROBS, check_told};
use crate::sampling::SamplingParams;

/// Likeliest tokens for each generated one at most.
const MAX_PROBS: u32 = MAX_LOGPROBS as u32;
/// Stop strings of one request at most.
const MAX_STOPS: usize = 16;
/// Fields of the answer to choose at most; there are about thirty.
const MAX_FIELDS: usize = 64;

#[derive(Debug, Deserialize)]
struct CompletionFields {
    prompt: Part,
    #[serde(default)]
    model: Option<String>,
    /// -1 is all that is left of the context.
    #[serde(default, alias = "max_tokens")]
    n_predict: Option<i64>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    stop: Option<Capped<Vec<String>, MAX_STOPS>>,
    #[serde(default)]
    repeat_penalty: Option<f64>,
    #[serde(default)]
    ignore_eos: Option<bool>,
    #[serde(default)]
    n_probs: Option<u32>,
    #[serde(default)]
    return_tokens: Option<bool>,
    #[serde(default)]
    response_fields: Option<Capped<Vec<String>, MAX_FIELDS>>,
    #[serde(default)]
    cache_prompt: Option<bool>,
    #[serde(default)]
    post_sampling_probs: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct BiasField {
    #[serde(default)]
    logit_bias: Option<Biases>,
}

/// Continues one prompt, or each of several.
pub(crate) async fn completion(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    app.check_ready()?;
    body.read::<PromptField>()?;
    let mut fields: CompletionFields = body.read()?;
    fields.refuse_unsupported()?;
    body.read::<Others>()?.refuse()?;
    unsupported::refuse(&body)?;
    let format: FormatFields = body.read()?;
    let model = app.model_or_default(fields.model.clone())?;
    let (chat, info) = (app.chat(&model)?, app.info(&model)?);
    let mut draws: DrawFields = body.read()?;
    draws.repetition_penalty = fields.repeat_penalty.or(draws.repetition_penalty);
    draws.seed = draws.seed.filter(|seed| *seed != -1);
    let mut sampling = draws.params(&app, &info.sampling)?;
    let bias: BiasField = body.read()?;
    let (count, is_list) = match &fields.prompt {
        Part::List(parts) if !is_one_prompt(parts) => (parts.len(), true),
        _ => (1, false),
    };
    app.check_choices(count, 1)?;
    let prompt = std::mem::replace(&mut fields.prompt, Part::List(Vec::new()));
    prompt.check_size(&info)?;
    let prefix = info.text_prefix;
    let encoding = app.encode({
        let chat = chat.clone();
        move || {
            let biases = bias.logit_bias.unwrap_or_default().encoded(&chat)?;
            let parts = match prompt {
                Part::List(parts) if is_list => parts,
                one => vec![one],
            };
            let ids = parts.iter().map(|part| part.ids(&chat, &prefix));
            match ids.collect::<Result<Vec<_>>>()? {
                ids if ids.is_empty() => Err(Error::invalid("prompt", "the prompt is empty")),
                ids => Ok((biases, ids)),
            }
        }
    });
    let (biases, prompts) = encoding.await?;
    sampling.logit_bias = biases.into();
    let arrived = body.arrived();
    drop(body);
    let constraint = format.constraint()?;
    let mut requests = Vec::with_capacity(prompts.len());
    for ids in prompts {
        let request = fields.request(&app, &model, &chat, &sampling, ids, info.max_model_len)?;
        let request = TextRequest {
            request: GenerateRequest {
                constraint: constraint.clone(),
                ..request.request
            },
            ..request
        };
        requests.push(request);
    }
    if !fields.stream.unwrap_or(false) {
        check_told(requests.iter().map(|choice| &choice.request))?;
    }
    let mut answers = Answer::start(&app, &chat, &fields, requests, arrived).await?;
    if fields.stream.unwrap_or(false) {
        if answers.len() > 1 {
            return Err(Error::invalid("stream", "several prompts cannot be streamed").into());
        }
        return Ok(answers.remove(0).stream());
    }
    let whole = future::try_join_all(answers.into_iter().map(Answer::whole)).await?;
    Ok(match is_list {
        true => Json(Value::Array(whole)).into_response(),
        false => Json(whole.into_iter().next()).into_response(),
    })
}

/// Which places in the batch are taken.
pub(crate) async fn slots(State(app): State<App>) -> Json<Value> {
    let slot = |id: usize, is_processing: bool| json!({"id": id, "is_processing": is_processing});
    let slots = app.engine.stats().into_iter().flat_map(|engine| {
        let (running, all) = (engine.running, engine.max_num_seqs);
        (0..all).map(move |place| place < running)
    });
    let slots = slots
        .enumerate()
        .map(|(id, is_processing)| slot(id, is_processing));
    Json(slots.collect())
}

#[derive(Debug, Deserialize)]
struct ModelField {
    #[serde(default)]
    model: Option<String>,
}

/// How many tokens a conversation is.
pub(crate) async fn input_tokens(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let fields: ModelField = body.read()?;
    let model = app.model_or_default(fields.model)?;
    let (chat, info) = (app.chat(&model)?, app.info(&model)?);
    let asked = body.read::<ChatFields>()?;
    let ids = prompt(&app, &chat, asked, &info, Excess::Tokenized).await?;
    Ok(Json(
        json!({"object": "response.input_tokens", "input_tokens": ids.len()}),
    ))
}

impl CompletionFields {
    fn refuse_unsupported(&self) -> Result<()> {
        if self.post_sampling_probs == Some(true) {
            let message = "probabilities are those before sampling; leave post_sampling_probs out";
            return Err(Error::invalid("post_sampling_probs", message));
        }
        if self.n_probs.is_some_and(|top| top > MAX_PROBS) {
            let message = format!("n_probs must be at most {MAX_PROBS}");
            return Err(Error::invalid("n_probs", message));
        }
        check_stops(self.stop.as_ref().map_or(&[], |Capped(stops)| stops))
    }

    fn request(
        &self,
        app: &Shared,
        model: &str,
        chat: &Chat,
        sampling: &SamplingParams,
        prompt_ids: Vec<u32>,
        max_model_len: u32,
    ) -> Result<TextRequest> {
        let prompt_tokens = u32::try_from(prompt_ids.len()).unwrap_or(u32::MAX);
        let left = max_model_len.saturating_sub(prompt_tokens);
        if left == 0 {
            return Err(Error::ContextLength {
                prompt_tokens,
                max_tokens: 1,
                max_model_len,
            });
        }
        // What is more than fits is cut here, not refused.
        let asked = self.n_predict.and_then(|asked| u32::try_from(asked).ok());
        let stop_token_ids = match self.ignore_eos.unwrap_or(false) {
            true => Arc::default(),
            false => chat.end_ids().into(),
        };
        let salt = (self.cache_prompt == Some(false)).then(|| app.id("once-"));
        Ok(TextRequest {
            request: GenerateRequest {
                sampling: sampling.clone(),
                stop_token_ids,
                logprobs: self.n_probs.filter(|top| *top > 0),
                cache_salt: salt,
                ..GenerateRequest::greedy(model, prompt_ids, asked.unwrap_or(left).min(left))
            },
            stop: self.stop.clone().unwrap_or_default().0,
            include_stop: false,
            skip_special_tokens: true,
        })
    }
}
