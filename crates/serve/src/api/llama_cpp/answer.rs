//! A prompt's answer in llama.cpp's words, whole or token by token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::response::Response;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Map, Value, json};
use updraft_chat::{Chat, TokenizerExt};

use super::CompletionFields;
use crate::api::logprobs::llama_cpp_token;
use crate::api::sse;
use crate::app::App;
use crate::engine::{FinishReason, Usage};
use crate::error::{Error, Result};
use crate::generate::{self, TextEvent, TextRequest, TextStream, Token};

/// One prompt's answer, as far as it is known.
pub(super) struct Answer {
    chat: Arc<Chat>,
    completion: TextStream,
    /// What the answer repeats of the request.
    head: Map<String, Value>,
    index: usize,
    stops: Vec<String>,
    n_probs: bool,
    return_tokens: bool,
    response_fields: Arc<[String]>,
    begun: Instant,
    first_token: Option<Instant>,
    text: String,
    tokens: Vec<u32>,
    probabilities: Vec<Value>,
}

impl Answer {
    /// Admits the completions of all prompts at once.
    pub(super) async fn start(
        app: &App,
        chat: &Arc<Chat>,
        fields: &CompletionFields,
        requests: Vec<TextRequest>,
        arrived: Instant,
    ) -> Result<Vec<Self>> {
        let begun = Instant::now();
        let told = |request: &TextRequest| {
            let stops = request.stop.clone();
            (
                head(chat, fields, request),
                stops,
                request.request.logprobs.is_some(),
            )
        };
        let told: Vec<_> = requests.iter().map(told).collect();
        let completions = generate::start(app, chat, requests, arrived).await?;
        let chosen = fields.response_fields.clone().unwrap_or_default().0;
        let response_fields: Arc<[String]> = chosen.into();
        let answers = completions.into_iter().zip(told).enumerate();
        let answer = |(index, (completion, (head, stops, n_probs)))| Self {
            completion,
            chat: chat.clone(),
            head,
            index,
            stops,
            n_probs,
            return_tokens: fields.return_tokens.unwrap_or(false),
            response_fields: response_fields.clone(),
            begun,
            first_token: None,
            text: String::new(),
            tokens: Vec::new(),
            probabilities: Vec::new(),
        };
        Ok(answers.map(answer).collect())
    }

    pub(super) async fn whole(mut self) -> Result<Value> {
        while let Some(event) = self.completion.try_next().await? {
            match event {
                TextEvent::Prompt(_) | TextEvent::Embedding(_) => {}
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
    pub(super) fn stream(self) -> Response {
        let chunks = stream::try_unfold(self, |mut this| async move {
            let Some(event) = this.completion.try_next().await? else {
                return Ok::<_, Error>(None);
            };
            let chunks = match event {
                TextEvent::Prompt(_) | TextEvent::Embedding(_) => Vec::new(),
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
