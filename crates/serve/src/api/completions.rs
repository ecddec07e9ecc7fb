//! `POST /v1/completions`: plain text or token ids continued, as llama.cpp and evaluation
//! harnesses use it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, TryStreamExt, future, stream};
use serde::{Deserialize, Serialize};
use updraft_chat::Chat;

use super::error::ApiError;
use super::fields::{Fields, Form};
use super::json::JsonBody;
use super::logprobs::{PromptLogprobs, TextLogprobs};
use super::prompt::{Prompt, PromptText};
use super::sse;
use super::unsupported;
use super::usage::UsageBody;
use crate::app::App;
use crate::engine::{TokenLogprobs, Usage};
use crate::error::{Error, Result};
use crate::generate::{self, ChoiceEvent, Collected, TextStream, Token};
use crate::limits::check_told;

/// What an absent `max_tokens` means, as OpenAI's.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Likeliest tokens per position at most.
const MAX_LOGPROBS: i64 = 20;

/// The fields that only text completions have.
#[derive(Debug, Deserialize)]
struct TextFields {
    prompt: Prompt,
    #[serde(default)]
    echo: Option<bool>,
    #[serde(default)]
    add_special_tokens: Option<bool>,
    #[serde(default)]
    logprobs: Option<i64>,
}

/// Continues one prompt or several, at once or as a stream.
pub(crate) async fn create(State(app): State<App>, body: JsonBody) -> Result<Response, ApiError> {
    app.check_ready()?;
    let fields = Fields::read(&body)?;
    unsupported::refuse(&body)?;
    let text_fields: TextFields = body.read()?;
    let form = fields.form()?;
    let model = app.model_or_default(fields.model.clone())?;
    let chat = app.chat(&model)?;
    let logprobs = text_fields.logprobs()?;
    let echo = text_fields.echo.unwrap_or(false);
    let info = app.info(&model)?;
    let (prompt, max_model_len) = (text_fields.prompt, info.max_model_len);
    app.check_choices(prompt.count(), form.num_choices)?;
    if !fields.truncates() {
        prompt.check_size(&info)?;
    }
    prompt.check_work("prompt", &info)?;
    let prefix = match text_fields.add_special_tokens.unwrap_or(true) {
        true => info.text_prefix,
        false => Vec::new(),
    };
    let prompts = prompt.into_prompts(&app, "prompt", &chat, prefix).await?;
    let prompts: Result<Vec<PromptText>> = prompts
        .into_iter()
        .map(|prompt| prompt.truncated(&fields, max_model_len))
        .collect();
    let prompts = prompts?;
    let prompt_logprobs = fields.prompt_logprobs()?;

    let arrived = body.arrived();
    drop(body);
    let template = fields.template(&app, &model, &chat).await?;
    let mut requests = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        let mut request = template.request(&app, prompt.ids.clone(), Some(DEFAULT_MAX_TOKENS))?;
        request.request.logprobs = logprobs;
        request.request.prompt_logprobs = logprobs.filter(|_| echo).max(prompt_logprobs);
        requests.extend((0..form.num_choices).map(|index| request.for_choice(index)));
    }
    if !form.stream {
        check_told(requests.iter().map(|choice| &choice.request))?;
    }
    let prompt_ids = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
    let echoed = match echo {
        true => {
            let chat = chat.clone();
            let texts = move || Ok(prompts.into_iter().map(|one| one.text(&chat)).collect());
            Some(app.encode(texts).await?)
        }
        false => None,
    };
    let streams = generate::start(&app, &chat, requests, arrived).await?;
    let answer = Answer {
        id: fields.answer_id(&app, "cmpl-"),
        created: app.options.clock.unix_seconds(),
        model,
        logprobs: logprobs.is_some(),
        prompt_logprobs: prompt_logprobs.is_some(),
        prompt_ids,
        echoed,
        chat,
        form,
    };
    if answer.form.stream {
        return answer.stream(streams).await;
    }
    Ok(Json(answer.whole(streams).await?).into_response())
}

impl TextFields {
    fn logprobs(&self) -> Result<Option<u32>> {
        match self.logprobs {
            None => Ok(None),
            Some(top) if (0..=MAX_LOGPROBS).contains(&top) => Ok(Some(top as u32)),
            Some(_) => {
                let message = format!("logprobs must be between 0 and {MAX_LOGPROBS}");
                Err(Error::invalid("logprobs", message))
            }
        }
    }
}

/// What all parts of one answer have in common.
#[derive(Debug)]
struct Answer {
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
    prompt_logprobs: bool,
    prompt_ids: Vec<Vec<u32>>,
    /// The prompts' texts, if the answer begins with them.
    echoed: Option<Vec<String>>,
    chat: Arc<Chat>,
    form: Form,
}

/// The whole answer, or one chunk of it: text completions stream the same object.
#[derive(Debug, Serialize)]
struct Completion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
}

#[derive(Debug, Serialize)]
struct Choice {
    index: u32,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

impl Choice {
    fn new(index: u32, text: String) -> Self {
        Self {
            index,
            text,
            logprobs: None,
            finish_reason: None,
            prompt_logprobs: None,
            prompt_token_ids: None,
            token_ids: None,
        }
    }
}

impl Answer {
    fn prompt_ids(&self, index: u32) -> &[u32] {
        &self.prompt_ids[(index / self.form.num_choices) as usize]
    }

    fn echoed(&self, index: u32) -> Option<&str> {
        let texts = self.echoed.as_ref()?;
        Some(&texts[(index / self.form.num_choices) as usize])
    }

    async fn whole(self, streams: Vec<TextStream>) -> Result<Completion> {
        let collected = streams.into_iter().map(generate::collect);
        let collected = future::try_join_all(collected).await?;
        let usages: Vec<Usage> = collected.iter().map(|text| text.usage).collect();
        let choices = (0..)
            .zip(&collected)
            .map(|(index, text)| self.whole_choice(index, text));
        let choices = choices.collect();
        let usage = UsageBody::of(&usages, self.form.num_choices);
        Ok(Completion {
            usage: Some(Some(usage)),
            ..self.envelope(choices)
        })
    }

    fn whole_choice(&self, index: u32, collected: &Collected) -> Choice {
        let mut offset = 0;
        let mut logprobs = TextLogprobs::default();
        let prompt_ids = self.prompt_ids(index);
        let mut text = String::new();
        if let Some(echoed) = self.echoed(index) {
            text.push_str(echoed);
            self.push_prompt(&mut logprobs, index, &collected.prompt, &mut offset);
        }
        self.push_tokens(&mut logprobs, &collected.tokens, &mut offset);
        text.push_str(&collected.text);
        let prompt_logprobs = PromptLogprobs::of(&self.chat, prompt_ids, &collected.prompt);
        Choice {
            logprobs: self.logprobs.then_some(logprobs),
            finish_reason: Some(collected.reason.as_str()),
            prompt_logprobs: prompt_logprobs.filter(|_| self.prompt_logprobs),
            prompt_token_ids: self.form.return_token_ids.then(|| prompt_ids.to_vec()),
            token_ids: self
                .form
                .return_token_ids
                .then(|| Token::ids(&collected.tokens)),
            ..Choice::new(index, text)
        }
    }

    fn push_prompt(
        &self,
        logprobs: &mut TextLogprobs,
        index: u32,
        prompt: &[Option<TokenLogprobs>],
        offset: &mut usize,
    ) {
        for (&id, token) in self.prompt_ids(index).iter().zip(prompt) {
            logprobs.push(&self.chat, id, token.as_ref(), offset);
        }
    }

    fn push_tokens(&self, logprobs: &mut TextLogprobs, tokens: &[Token], offset: &mut usize) {
        for token in tokens {
            logprobs.push(&self.chat, token.id, token.logprobs.as_ref(), offset);
        }
    }

    /// Waits for the first event, so that an early error is a status, then streams.
    async fn stream(self, streams: Vec<TextStream>) -> Result<Response, ApiError> {
        let mut offsets = vec![0; streams.len()];
        let events = generate::merge(streams).await?;
        let openings: Vec<_> = (0..offsets.len() as u32)
            .filter_map(|index| self.opening(index).map(Ok))
            .collect();
        let chunks =
            events.try_filter_map(move |event| future::ready(Ok(self.chunk(event, &mut offsets))));
        Ok(sse::respond(stream::iter(openings).chain(chunks)))
    }

    /// What a choice begins with, if that is more than its tokens.
    fn opening(&self, index: u32) -> Option<Completion> {
        let ids = self.form.return_token_ids;
        let ids = ids.then(|| self.prompt_ids(index).to_vec());
        // With logprobs the prompt comes as an event.
        let echoed = self.echoed(index).filter(|_| !self.logprobs);
        if ids.is_none() && echoed.is_none() {
            return None;
        }
        Some(self.envelope(vec![Choice {
            prompt_token_ids: ids,
            ..Choice::new(index, echoed.unwrap_or_default().to_owned())
        }]))
    }

    fn chunk(&self, event: ChoiceEvent, offsets: &mut [usize]) -> Option<Completion> {
        let mut logprobs = TextLogprobs::default();
        match event {
            ChoiceEvent::Prompt {
                index,
                logprobs: prompt,
            } => {
                self.push_prompt(&mut logprobs, index, &prompt, &mut offsets[index as usize]);
                let echoed = self.echoed(index).unwrap_or_default();
                Some(self.part(index, echoed.to_owned(), Some(logprobs)))
            }
            ChoiceEvent::Text {
                index,
                text,
                tokens,
                usage,
            } => {
                self.push_tokens(&mut logprobs, &tokens, &mut offsets[index as usize]);
                let told = self.logprobs || self.form.return_token_ids;
                if text.is_empty() && (!told || tokens.is_empty()) {
                    return None;
                }
                let choice = Choice {
                    logprobs: self.logprobs.then_some(logprobs),
                    token_ids: self.form.return_token_ids.then(|| Token::ids(&tokens)),
                    ..Choice::new(index, text)
                };
                Some(self.with_usage(self.envelope(vec![choice]), usage))
            }
            ChoiceEvent::Finished {
                index,
                reason,
                usage,
            } => {
                let choice = Choice {
                    finish_reason: Some(reason.as_str()),
                    ..Choice::new(index, String::new())
                };
                Some(self.with_usage(self.envelope(vec![choice]), usage))
            }
            ChoiceEvent::AllFinished { usages } => {
                let usage = UsageBody::of(&usages, self.form.num_choices);
                let last = Completion {
                    usage: Some(Some(usage)),
                    ..self.envelope(Vec::new())
                };
                self.form.include_usage.then_some(last)
            }
        }
    }

    fn part(&self, index: u32, text: String, logprobs: Option<TextLogprobs>) -> Completion {
        self.envelope(vec![Choice {
            logprobs,
            ..Choice::new(index, text)
        }])
    }

    /// With what its choice cost until then, if that is wanted.
    fn with_usage(&self, chunk: Completion, usage: Usage) -> Completion {
        match self.form.continuous_usage {
            true => Completion {
                usage: Some(Some(UsageBody::of(&[usage], 1))),
                ..chunk
            },
            false => chunk,
        }
    }

    fn envelope(&self, choices: Vec<Choice>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage: (self.form.stream && self.form.include_usage).then_some(None),
        }
    }
}
