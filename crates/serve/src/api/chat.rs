//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, TryStreamExt, future, stream};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use updraft_chat::{Chat, Content, Conversation, LocalTime, Message, Part, RenderOptions, Role};

use super::capped::Capped;
use super::error::ApiError;
use super::fields::{Fields, Form};
use super::json::JsonBody;
use super::logprobs::{ChatLogprobs, PromptLogprobs};
use super::sse;
use super::unsupported;
use super::usage::UsageBody;
use crate::app::{App, Shared};
use crate::engine::{FinishReason, ModelInfo, Usage};
use crate::error::{Error, Result, one_line};
use crate::generate::{self, ChoiceEvent, TextRequest, TextStream, Token};
use crate::limits::check_told;

/// Likeliest tokens per position at most, as OpenAI's.
const MAX_TOP_LOGPROBS: i64 = 20;

/// Messages of one conversation at most.
const MAX_MESSAGES: usize = 16_384;

/// The fields that only chat has.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatFields {
    messages: Capped<Vec<Message>, MAX_MESSAGES>,
    #[serde(default)]
    logprobs: Option<bool>,
    #[serde(default)]
    top_logprobs: Option<i64>,
    #[serde(default)]
    add_generation_prompt: Option<bool>,
    #[serde(default)]
    continue_final_message: Option<bool>,
    #[serde(default)]
    chat_template_kwargs: Option<Map<String, Value>>,
    #[serde(default)]
    echo: Option<bool>,
    #[serde(default)]
    add_special_tokens: Option<bool>,
    /// A variable that templates of thinking models read.
    #[serde(default)]
    reasoning_effort: Option<String>,
}

/// Answers a conversation, at once or as a stream.
pub(crate) async fn create(State(app): State<App>, body: JsonBody) -> Result<Response, ApiError> {
    app.check_ready()?;
    let fields = Fields::read(&body)?;
    unsupported::refuse(&body)?;
    let chat_fields: ChatFields = body.read()?;
    let form = fields.form()?;
    let model = app.model_or_default(fields.model.clone())?;
    let chat = app.chat(&model)?;
    let logprobs = chat_fields.logprobs()?;
    let echoed = chat_fields.echoed();
    app.check_choices(1, form.num_choices)?;
    let info = app.info(&model)?;
    let excess = Excess::of(&fields);
    let prompt_ids = prompt(&app, &chat, chat_fields, &info, excess).await?;
    let prompt_ids = fields.truncated(prompt_ids, info.max_model_len)?;
    let arrived = body.arrived();
    drop(body);
    let template = fields.template(&app, &model, &chat).await?;
    let mut request = template.request(&app, prompt_ids, None)?;
    request.request.logprobs = logprobs;
    request.request.prompt_logprobs = fields.prompt_logprobs()?;
    let answer = Answer {
        id: fields.answer_id(&app, "chatcmpl-"),
        created: app.options.clock.unix_seconds(),
        model,
        logprobs: logprobs.is_some(),
        echoed,
        prompt_ids: request.request.prompt_ids.clone(),
        chat,
        form,
    };
    let choices = (0..answer.form.num_choices).map(|index| request.for_choice(index));
    let choices: Vec<TextRequest> = choices.collect();
    if !answer.form.stream {
        check_told(choices.iter().map(|choice| &choice.request))?;
    }
    let choices = generate::start(&app, &answer.chat, choices, arrived).await?;
    if answer.form.stream {
        return answer.stream(choices).await;
    }
    Ok(Json(answer.whole(choices).await?).into_response())
}

impl ChatFields {
    /// These messages, and how much thought they are worth.
    pub(crate) fn of(messages: Vec<Message>, reasoning_effort: Option<String>) -> Self {
        Self {
            messages: Capped(messages),
            logprobs: None,
            top_logprobs: None,
            add_generation_prompt: None,
            continue_final_message: None,
            chat_template_kwargs: None,
            echo: None,
            add_special_tokens: None,
            reasoning_effort,
        }
    }

    /// The text before the answer's own: the last message, if it is the assistant's and wanted.
    fn echoed(&self) -> String {
        let last = self
            .messages
            .0
            .last()
            .filter(|last| last.role == Role::Assistant);
        match last.map(|last| &last.content) {
            Some(Content::Text(text)) if self.echo == Some(true) => text.clone(),
            Some(Content::Parts(parts)) if self.echo == Some(true) => {
                parts.iter().filter_map(Part::text).collect()
            }
            _ => String::new(),
        }
    }

    fn logprobs(&self) -> Result<Option<u32>> {
        let wanted = self.logprobs.unwrap_or(false);
        match self.top_logprobs {
            None => Ok(wanted.then_some(0)),
            Some(top) if !(0..=MAX_TOP_LOGPROBS).contains(&top) => {
                let message = format!("top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}");
                Err(Error::invalid("top_logprobs", message))
            }
            Some(0) if !wanted => Ok(None),
            Some(_) if !wanted => Err(Error::invalid(
                "top_logprobs",
                "top_logprobs needs `logprobs: true`",
            )),
            Some(top) => Ok(Some(top as u32)),
        }
    }
}

/// What becomes of a conversation that is longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Excess {
    /// It is refused before it is tokenized.
    Refused,
    /// It is cut, or only counted.
    Tokenized,
}

impl Excess {
    pub(crate) fn of(fields: &Fields) -> Self {
        match fields.truncates() {
            true => Self::Tokenized,
            false => Self::Refused,
        }
    }
}

/// Renders and tokenizes on a thread that may block: a long conversation takes a while.
pub(crate) async fn prompt(
    app: &Shared,
    chat: &Arc<Chat>,
    fields: ChatFields,
    info: &ModelInfo,
    excess: Excess,
) -> Result<Vec<u32>> {
    let continue_final_message = fields.continue_final_message.unwrap_or(false);
    if continue_final_message && fields.add_generation_prompt == Some(true) {
        let message = "continue_final_message and add_generation_prompt exclude each other";
        return Err(Error::invalid("continue_final_message", message));
    }
    if fields.add_special_tokens == Some(true) {
        let message = "a chat template writes what begins a prompt itself; leave it out";
        return Err(Error::invalid("add_special_tokens", message));
    }
    let options = RenderOptions {
        add_generation_prompt: fields
            .add_generation_prompt
            .unwrap_or(!continue_final_message),
        continue_final_message,
        now: Some(LocalTime::utc(app.options.clock.now())),
        ..RenderOptions::default()
    };
    let mut conversation = conversation(fields.messages.0)?;
    conversation.variables = fields.chat_template_kwargs.unwrap_or_default();
    if let Some(effort) = fields.reasoning_effort {
        let known = conversation.variables.entry("reasoning_effort");
        known.or_insert(Value::String(effort));
    }
    let (chat, info) = (Arc::clone(chat), info.clone());
    app.encode(move || {
        let refuse = |error: &updraft_chat::Error| Error::invalid("messages", one_line(error));
        let check = |bytes: usize| {
            if excess == Excess::Refused {
                info.check_text(bytes)?;
            }
            info.check_work("messages", bytes)
        };
        if check(said(&conversation)).is_err() {
            // A template need not say everything.
            let text = chat.template().render(&conversation, &options);
            check(text.map_err(|error| refuse(&error))?.len())?;
        }
        let prompt = chat.prompt(&conversation, &options);
        prompt.map_err(|error| refuse(&error))
    })
    .await
}

/// Bytes of all messages' texts.
fn said(conversation: &Conversation) -> usize {
    let texts = conversation
        .messages
        .iter()
        .map(|message| match &message.content {
            Content::Text(text) => text.len(),
            _ => 0,
        });
    texts.sum()
}

/// Messages as templates want them: known roles, one text each, parsed tool arguments.
fn conversation(mut messages: Vec<Message>) -> Result<Conversation> {
    if messages.is_empty() {
        return Err(Error::invalid("messages", "messages must not be empty"));
    }
    for (index, message) in messages.iter_mut().enumerate() {
        message.role = match std::mem::take(&mut message.role) {
            Role::Other(role) if role == "developer" => Role::System,
            Role::Other(role) => {
                let known = "developer, system, user, assistant or tool";
                let message = format!("the role `{role}` is not {known}");
                return Err(Error::invalid(format!("messages[{index}].role"), message));
            }
            known => known,
        };
        let only_calls = message.role == Role::Assistant && message.tool_calls.is_some();
        let content = std::mem::take(&mut message.content);
        message.content = match content {
            Content::Parts(parts) => Content::Text(text_of(index, &parts)?),
            Content::Absent | Content::Null if !only_calls => {
                let message = format!("messages[{index}] has no content");
                return Err(Error::invalid(
                    format!("messages[{index}].content"),
                    message,
                ));
            }
            other => other,
        };
        for call in message.tool_calls.iter_mut().flatten() {
            call.function.arguments = std::mem::take(&mut call.function.arguments).into_json();
        }
    }
    Ok(Conversation::new(messages))
}

/// The texts of a message's parts, a line each, as templates that know only text expect.
fn text_of(index: usize, parts: &[Part]) -> Result<String> {
    let mut texts = Vec::with_capacity(parts.len());
    for (part_index, part) in parts.iter().enumerate() {
        let text = match part {
            Part::Text(text) => Some(text.as_str()),
            Part::Other(fields) if fields.get("type").is_some_and(|kind| kind == "text") => {
                part.text()
            }
            Part::Other(_) => None,
        };
        texts.push(text.ok_or_else(|| {
            let param = format!("messages[{index}].content[{part_index}]");
            Error::invalid(param, "only content parts of type `text` are supported")
        })?);
    }
    Ok(texts.join("\n"))
}

/// What all parts of one answer have in common.
#[derive(Debug)]
struct Answer {
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
    /// What every choice begins with.
    echoed: String,
    prompt_ids: Vec<u32>,
    chat: Arc<Chat>,
    form: Form,
}

#[derive(Debug, Serialize)]
struct Completion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<Choice>,
    usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize)]
struct Choice {
    index: u32,
    message: AssistantMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize)]
struct AssistantMessage {
    role: &'static str,
    content: String,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct Chunk {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChunkChoice>,
    /// Absent unless usage is asked for; then null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize)]
struct ChunkChoice {
    index: u32,
    delta: ChunkDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Default, Serialize)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

impl Answer {
    async fn whole(self, streams: Vec<TextStream>) -> Result<Completion> {
        let collected = streams.into_iter().map(generate::collect);
        let collected = future::try_join_all(collected).await?;
        let usages: Vec<_> = collected.iter().map(|text| text.usage).collect();
        let first = collected.first().map_or(&[][..], |text| &text.prompt);
        let prompt_logprobs = PromptLogprobs::of(&self.chat, &self.prompt_ids, first);
        let choice = |(index, text): (u32, generate::Collected)| Choice {
            index,
            logprobs: self
                .logprobs
                .then(|| ChatLogprobs::of(&self.chat, &text.tokens)),
            token_ids: self.form.return_token_ids.then(|| Token::ids(&text.tokens)),
            message: AssistantMessage {
                role: "assistant",
                content: format!("{}{}", self.echoed, text.text),
                refusal: None,
            },
            finish_reason: text.reason.as_str(),
        };
        Ok(Completion {
            object: "chat.completion",
            choices: (0..).zip(collected).map(choice).collect(),
            usage: UsageBody::of(&usages, self.form.num_choices),
            prompt_logprobs,
            prompt_token_ids: self.form.return_token_ids.then_some(self.prompt_ids),
            id: self.id,
            created: self.created,
            model: self.model,
        })
    }

    /// Waits for the first event, so that an early error is a status, then streams.
    async fn stream(self, streams: Vec<TextStream>) -> Result<Response, ApiError> {
        let events = generate::merge(streams).await?;
        let roles: Vec<_> = (0..self.form.num_choices)
            .map(|index| Ok(self.role(index)))
            .collect();
        let chunks = events.try_filter_map(move |event| future::ready(Ok(self.chunk(event))));
        Ok(sse::respond(stream::iter(roles).chain(chunks)))
    }

    fn chunk(&self, event: ChoiceEvent) -> Option<Chunk> {
        match event {
            ChoiceEvent::Text {
                text,
                tokens,
                index,
                usage,
            } => self
                .delta(index, text, &tokens)
                .map(|chunk| self.with_usage(chunk, usage)),
            ChoiceEvent::Finished {
                reason,
                index,
                usage,
            } => Some(self.with_usage(self.finish(index, reason), usage)),
            ChoiceEvent::Prompt { .. } => None,
            ChoiceEvent::AllFinished { usages } => self.usage(&usages),
        }
    }

    fn role(&self, index: u32) -> Chunk {
        let delta = ChunkDelta {
            role: Some("assistant"),
            content: Some(self.echoed.clone()),
        };
        let told = self.form.return_token_ids.then(|| self.prompt_ids.clone());
        Chunk {
            prompt_token_ids: told,
            ..self.part(index, delta)
        }
    }

    fn delta(&self, index: u32, text: String, tokens: &[Token]) -> Option<Chunk> {
        let told = self.logprobs || self.form.return_token_ids;
        if text.is_empty() && (!told || tokens.is_empty()) {
            return None;
        }
        let delta = ChunkDelta {
            role: None,
            content: Some(text),
        };
        let mut chunk = self.part(index, delta);
        for choice in &mut chunk.choices {
            choice.logprobs = self.logprobs.then(|| ChatLogprobs::of(&self.chat, tokens));
            choice.token_ids = self.form.return_token_ids.then(|| Token::ids(tokens));
        }
        Some(chunk)
    }

    fn finish(&self, index: u32, reason: FinishReason) -> Chunk {
        let mut chunk = self.part(index, ChunkDelta::default());
        for choice in &mut chunk.choices {
            choice.finish_reason = Some(reason.as_str());
        }
        chunk
    }

    fn part(&self, index: u32, delta: ChunkDelta) -> Chunk {
        self.envelope(vec![ChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            token_ids: None,
        }])
    }

    /// With what its choice cost until then, if that is wanted.
    fn with_usage(&self, chunk: Chunk, usage: Usage) -> Chunk {
        match self.form.continuous_usage {
            true => Chunk {
                usage: Some(Some(UsageBody::of(&[usage], 1))),
                ..chunk
            },
            false => chunk,
        }
    }

    fn usage(&self, usages: &[Usage]) -> Option<Chunk> {
        let usage = UsageBody::of(usages, self.form.num_choices);
        let last = Chunk {
            usage: Some(Some(usage)),
            ..self.envelope(Vec::new())
        };
        self.form.include_usage.then_some(last)
    }

    fn envelope(&self, choices: Vec<ChunkChoice>) -> Chunk {
        Chunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage: self.form.include_usage.then_some(None),
            prompt_token_ids: None,
        }
    }
}
