//! llama.cpp's own dialect: `POST /completion`, `GET /slots`, counting a prompt's tokens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, TryStreamExt, future, stream};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use updraft_chat::{Chat, EncodePolicy, TokenizerExt};

use super::chat::{ChatFields, prompt};
use super::constrain::FormatFields;
use super::draws::DrawFields;
use super::error::ApiError;
use super::json::JsonBody;
use super::logprobs::llama_cpp_token;
use super::sse;
use super::unsupported;
use crate::app::{App, Shared};
use crate::engine::{FinishReason, GenerateRequest, Usage};
use crate::error::{Error, Result, one_line};
use crate::generate::{self, TextEvent, TextRequest, TextStream, Token};
use crate::sampling::SamplingParams;

/// Likeliest tokens for each generated one at most.
const MAX_PROBS: u32 = 20;
/// Stop strings of one request at most.
const MAX_STOPS: usize = 16;

#[derive(Debug, Deserialize)]
struct CompletionFields {
    prompt: Value,
    #[serde(default)]
    model: Option<String>,
    /// -1 is all that is left of the context.
    #[serde(default, alias = "max_tokens")]
    n_predict: Option<i64>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    stop: Option<Vec<String>>,
    #[serde(default)]
    repeat_penalty: Option<f64>,
    #[serde(default)]
    ignore_eos: Option<bool>,
    #[serde(default)]
    n_probs: Option<u32>,
    #[serde(default)]
    return_tokens: Option<bool>,
    #[serde(default)]
    response_fields: Option<Vec<String>>,
    #[serde(default)]
    cache_prompt: Option<bool>,
    #[serde(default)]
    post_sampling_probs: Option<bool>,
}

/// Biases come as pairs or as an object, and name tokens by id or by text.
#[derive(Debug, Deserialize)]
struct BiasField {
    #[serde(default)]
    logit_bias: Option<Value>,
}

/// Continues one prompt, or each of several.
pub(crate) async fn completion(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    app.check_ready()?;
    let fields: CompletionFields = body.read()?;
    fields.refuse_unsupported()?;
    unsupported::refuse(&body)?;
    let format: FormatFields = body.read()?;
    let model = app.model_or_default(fields.model.clone())?;
    let (chat, info) = (app.chat(&model)?, app.info(&model)?);
    let mut draws: DrawFields = body.read_without("logit_bias")?;
    draws.repetition_penalty = fields.repeat_penalty.or(draws.repetition_penalty);
    draws.seed = draws.seed.filter(|seed| *seed != -1);
    let mut sampling = draws.params(&app, &info.sampling)?;
    let bias: BiasField = body.read()?;
    let (biases, prompts) = fields
        .encoded(&chat, bias.logit_bias, info.text_prefix)
        .await?;
    sampling.logit_bias = biases;
    app.check_choices(prompts.ids.len(), 1)?;
    let constraint = format.constraint()?;
    let mut answers = Vec::with_capacity(prompts.ids.len());
    for (index, ids) in prompts.ids.into_iter().enumerate() {
        let request = fields.request(&app, &model, &chat, &sampling, ids, info.max_model_len)?;
        let request = TextRequest {
            request: GenerateRequest {
                constraint: constraint.clone(),
                ..request.request
            },
            ..request
        };
        answers.push(Answer::start(&app, &chat, &fields, index, request).await?);
    }
    if fields.stream.unwrap_or(false) {
        if answers.len() > 1 {
            return Err(Error::invalid("stream", "several prompts cannot be streamed").into());
        }
        return Ok(answers.remove(0).stream());
    }
    let whole = future::try_join_all(answers.into_iter().map(Answer::whole)).await?;
    Ok(match prompts.is_list {
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
    let chat = app.chat(&app.model_or_default(fields.model)?)?;
    let ids = prompt(&app, &chat, body.read::<ChatFields>()?).await?;
    Ok(Json(
        json!({"object": "response.input_tokens", "input_tokens": ids.len()}),
    ))
}

/// The prompts of one request.
struct Prompts {
    ids: Vec<Vec<u32>>,
    /// Whether the answer is a list too.
    is_list: bool,
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
        let stops = self.stop.as_deref().unwrap_or_default();
        if stops.len() > MAX_STOPS || stops.iter().any(String::is_empty) {
            let message = format!("at most {MAX_STOPS} stop strings, none of them empty");
            return Err(Error::invalid("stop", message));
        }
        Ok(())
    }

    /// The biases and the prompts as tokens, on a thread that may take its time.
    async fn encoded(
        &self,
        chat: &Arc<Chat>,
        bias: Option<Value>,
        prefix: Vec<u32>,
    ) -> Result<(Vec<(u32, f32)>, Prompts)> {
        let (chat, prompt) = (chat.clone(), self.prompt.clone());
        let encoded = tokio::task::spawn_blocking(move || {
            let biases = biases(&chat, bias.as_ref())?;
            let (parts, is_list) = match &prompt {
                Value::Array(parts) if !is_one_prompt(parts) => (parts.as_slice(), true),
                one => (std::slice::from_ref(one), false),
            };
            let ids: Result<Vec<_>> = parts
                .iter()
                .map(|part| ids_of(&chat, part, &prefix))
                .collect();
            match ids? {
                ids if ids.is_empty() => Err(Error::invalid("prompt", "the prompt is empty")),
                ids => Ok((biases, Prompts { ids, is_list })),
            }
        });
        encoded.await.map_err(|panic| Error::Step {
            source: panic.into(),
        })?
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
            true => Vec::new(),
            false => chat.end_ids().to_vec(),
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
            stop: self.stop.clone().unwrap_or_default(),
            include_stop: false,
            skip_special_tokens: true,
        })
    }
}

/// A list that holds a token id outside of any list is one prompt, of ids and texts.
fn is_one_prompt(parts: &[Value]) -> bool {
    parts.iter().any(Value::is_number)
}

/// The tokens of a text, of `{"prompt_string": …}`, or of a list of ids and texts.
fn ids_of(chat: &Chat, prompt: &Value, prefix: &[u32]) -> Result<Vec<u32>> {
    let refuse = |message: &str| Error::invalid("prompt", message);
    let mut ids = Vec::new();
    let push = |ids: &mut Vec<u32>, text: &str| {
        if ids.is_empty() {
            ids.extend_from_slice(prefix);
        }
        let encoded = chat
            .tokenizer()
            .encode_into(text, EncodePolicy::Parity, ids);
        encoded.map_err(|error| refuse(&one_line(&error)))
    };
    match prompt {
        Value::String(text) => push(&mut ids, text)?,
        Value::Object(fields) if fields.contains_key("multimodal_data") => {
            return Err(refuse("only text can be prompted"));
        }
        Value::Object(fields) => match fields.get("prompt_string").and_then(Value::as_str) {
            Some(text) => push(&mut ids, text)?,
            None => return Err(refuse("the prompt has no prompt_string")),
        },
        Value::Array(parts) => {
            for part in parts {
                match (part, part.as_u64().map(u32::try_from)) {
                    (_, Some(Ok(id))) => ids.push(id),
                    (Value::String(text), _) => push(&mut ids, text)?,
                    _ => return Err(refuse("a prompt's list holds token ids and texts")),
                }
            }
        }
        _ => {
            return Err(refuse(
                "the prompt is a text, token ids, or a list of those",
            ));
        }
    }
    match ids.is_empty() {
        true => Err(refuse("the prompt is empty")),
        false => Ok(ids),
    }
}

/// The bias of each token, named by its id or by a text it is part of.
fn biases(chat: &Chat, field: Option<&Value>) -> Result<Vec<(u32, f32)>> {
    let refuse = || {
        Error::invalid(
            "logit_bias",
            "a bias is [token id or text, number or false]",
        )
    };
    let pairs: Vec<(Value, Value)> = match field {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(fields)) => {
            let key = |key: &String| {
                key.parse::<u32>()
                    .map_or_else(|_| json!(key), |id| json!(id))
            };
            fields
                .iter()
                .map(|(token, bias)| (key(token), bias.clone()))
                .collect()
        }
        Some(Value::Array(pairs)) => {
            let pair = |pair: &Value| match pair.as_array().map(Vec::as_slice) {
                Some([token, bias]) => Ok((token.clone(), bias.clone())),
                _ => Err(refuse()),
            };
            pairs.iter().map(pair).collect::<Result<_>>()?
        }
        Some(_) => return Err(refuse()),
    };
    let mut biases = BTreeMap::new();
    for (token, bias) in pairs {
        let bias = match bias {
            Value::Bool(false) => -100.0,
            bias => bias.as_f64().ok_or_else(refuse)?.clamp(-100.0, 100.0) as f32,
        };
        let mut ids = Vec::new();
        match (&token, token.as_u64().map(u32::try_from)) {
            (_, Some(Ok(id))) => ids.push(id),
            (Value::String(text), _) => {
                let encoded = chat
                    .tokenizer()
                    .encode_into(text, EncodePolicy::Parity, &mut ids);
                encoded.map_err(|_| refuse())?;
            }
            _ => return Err(refuse()),
        }
        biases.extend(ids.into_iter().map(|id| (id, bias)));
    }
    Ok(biases.into_iter().collect())
}

/// One prompt's answer, as far as it is known.
struct Answer {
    chat: Arc<Chat>,
    completion: TextStream,
    /// What the answer repeats of the request.
    head: Map<String, Value>,
    index: usize,
    stops: Vec<String>,
    n_probs: bool,
    return_tokens: bool,
    response_fields: Vec<String>,
    begun: Instant,
    first_token: Option<Instant>,
    text: String,
    tokens: Vec<u32>,
    probabilities: Vec<Value>,
}

impl Answer {
    async fn start(
        app: &App,
        chat: &Arc<Chat>,
        fields: &CompletionFields,
        index: usize,
        request: TextRequest,
    ) -> Result<Self> {
        let begun = Instant::now();
        let head = head(chat, fields, &request);
        let (stops, n_probs) = (request.stop.clone(), request.request.logprobs.is_some());
        Ok(Self {
            completion: generate::start(app.clone(), chat.clone(), request).await?,
            chat: chat.clone(),
            head,
            index,
            stops,
            n_probs,
            return_tokens: fields.return_tokens.unwrap_or(false),
            response_fields: fields.response_fields.clone().unwrap_or_default(),
            begun,
            first_token: None,
            text: String::new(),
            tokens: Vec::new(),
            probabilities: Vec::new(),
        })
    }

    async fn whole(mut self) -> Result<Value> {
        while let Some(event) = self.completion.try_next().await? {
            match event {
                TextEvent::Prompt(_) => {}
                TextEvent::Text { text, tokens, .. } => self.note(&text, &tokens),
                TextEvent::Finished {
                    reason,
                    usage,
                    stopped,
                } => {
                    let end = self.end(reason, usage, stopped);
                    let tokens = std::mem::take(&mut self.tokens);
                    let told = if self.return_tokens { &tokens[..] } else { &[] };
                    return Ok(self.select(end, &self.text, told, &self.probabilities));
                }
            }
        }
        Err(Error::Unavailable {
            reason: "the engine gave no end",
        })
    }

    /// A chunk for each token, the last of those that end in one character carrying it.
    fn stream(self) -> Response {
        let chunks = stream::try_unfold(self, |mut this| async move {
            let Some(event) = this.completion.try_next().await? else {
                return Ok::<_, Error>(None);
            };
            let chunks = match event {
                TextEvent::Prompt(_) => Vec::new(),
                TextEvent::Text { text, tokens, .. } => this.chunks(&text, &tokens),
                TextEvent::Finished {
                    reason,
                    usage,
                    stopped,
                } => {
                    let end = this.end(reason, usage, stopped);
                    vec![this.select(end, "", &[], &[])]
                }
            };
            Ok(Some((stream::iter(chunks.into_iter().map(Ok)), this)))
        });
        sse::respond_without_done(chunks.try_flatten().boxed())
    }

    fn chunks(&mut self, text: &str, tokens: &[Token]) -> Vec<Value> {
        self.note(text, tokens);
        let mut chunks = Vec::new();
        for (at, token) in tokens.iter().enumerate() {
            let is_last = at + 1 == tokens.len();
            let mut chunk = json!({
                "index": self.index, "content": if is_last { text } else { "" },
                "tokens": [token.id], "stop": false, "id_slot": 0,
            });
            if self.n_probs {
                chunk["completion_probabilities"] = json!([llama_cpp_token(&self.chat, token)]);
            }
            chunks.push(chunk);
        }
        if tokens.is_empty() && !text.is_empty() {
            let tokens: [u32; 0] = [];
            chunks.push(json!({
                "index": self.index, "content": text, "tokens": tokens, "stop": false, "id_slot": 0,
            }));
        }
        chunks
    }

    fn note(&mut self, text: &str, tokens: &[Token]) {
        self.first_token.get_or_insert_with(Instant::now);
        self.text.push_str(text);
        self.tokens.extend(Token::ids(tokens));
        if self.n_probs {
            let told = tokens
                .iter()
                .map(|token| llama_cpp_token(&self.chat, token));
            self.probabilities.extend(told);
        }
    }

    /// What the end says besides text and tokens.
    fn end(
        &self,
        reason: FinishReason,
        usage: Usage,
        stopped: Option<usize>,
    ) -> Map<String, Value> {
        let stop_type = match (reason, stopped) {
            (FinishReason::Length, _) => "limit",
            (FinishReason::Stop, Some(_)) => "word",
            (FinishReason::Stop, None) => "eos",
        };
        let word = stopped.and_then(|index| self.stops.get(index));
        let mut end = self.head.clone();
        let more = json!({
            "index": self.index, "id_slot": 0, "stop": true, "truncated": false,
            "stop_type": stop_type, "stopping_word": word.cloned().unwrap_or_default(),
            "has_new_line": self.text.contains('\n'),
            "tokens_predicted": usage.completion_tokens, "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.cached_tokens, "timings": self.timings(usage),
        });
        if let Value::Object(more) = more {
            end.extend(more);
        }
        end
    }

    fn timings(&self, usage: Usage) -> Value {
        let now = Instant::now();
        let first = self.first_token.unwrap_or(now);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let (prompt_ms, predicted_ms) = (ms(first - self.begun), ms(now - first));
        // Of nothing it is 0: there is no infinity in JSON.
        let per = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let computed = f64::from(usage.prompt_tokens - usage.cached_tokens);
        // The first token comes with the prompt and costs no step of its own.
        let steps = f64::from(usage.completion_tokens.saturating_sub(1));
        json!({
            "cache_n": usage.cached_tokens, "prompt_n": usage.prompt_tokens - usage.cached_tokens,
            "prompt_ms": prompt_ms, "prompt_per_token_ms": per(prompt_ms, computed),
            "prompt_per_second": per(computed * 1e3, prompt_ms),
            "predicted_n": usage.completion_tokens, "predicted_ms": predicted_ms,
            "predicted_per_token_ms": per(predicted_ms, steps),
            "predicted_per_second": per(steps * 1e3, predicted_ms),
        })
    }

    /// The answer, or the fields of it that were asked for, by paths such as `timings/prompt_n`.
    fn select(
        &self,
        mut end: Map<String, Value>,
        text: &str,
        tokens: &[u32],
        probabilities: &[Value],
    ) -> Value {
        end.insert("content".into(), json!(text));
        end.insert("tokens".into(), json!(tokens));
        if self.n_probs {
            end.insert("completion_probabilities".into(), json!(probabilities));
        }
        let whole = Value::Object(end);
        if self.response_fields.is_empty() {
            return whole;
        }
        let chosen = self.response_fields.iter();
        let chosen = chosen.filter_map(|path| Some((path.clone(), at(&whole, path)?.clone())));
        Value::Object(chosen.collect())
    }
}

fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('/').try_fold(value, |value, key| value.get(key))
}

/// The model, the prompt, and the settings as they were understood.
fn head(chat: &Chat, fields: &CompletionFields, request: &TextRequest) -> Map<String, Value> {
    let asked = &request.request;
    let ends = chat
        .end_ids()
        .iter()
        .filter(|_| fields.ignore_eos == Some(true));
    // What can never be is null: there is no infinity in JSON.
    let never = ends.map(|id| json!({"token": id, "bias": null}));
    let biases = asked.sampling.logit_bias.iter();
    let biases = biases.map(|(id, bias)| json!({"token": id, "bias": bias}));
    let settings = json!({
        "n_predict": asked.max_tokens, "seed": asked.sampling.seed,
        "temperature": asked.sampling.temperature, "top_k": asked.sampling.top_k,
        "top_p": asked.sampling.top_p, "min_p": asked.sampling.min_p,
        "repeat_penalty": asked.sampling.repetition_penalty,
        "presence_penalty": asked.sampling.presence_penalty,
        "frequency_penalty": asked.sampling.frequency_penalty, "stop": request.stop,
        "ignore_eos": fields.ignore_eos.unwrap_or(false), "n_probs": asked.logprobs.unwrap_or(0),
        "stream": fields.stream.unwrap_or(false), "logit_bias": never.chain(biases).collect::<Vec<_>>(),
    });
    let mut head = Map::new();
    head.insert("model".into(), json!(asked.model));
    head.insert(
        "prompt".into(),
        json!(chat.tokenizer().decode(&asked.prompt_ids)),
    );
    head.insert("generation_settings".into(), settings);
    head
}
