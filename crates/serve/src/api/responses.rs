//! `POST /v1/responses`: text in, text out, in the newer API's words. Nothing is stored.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};
use updraft_chat::{Chat, Content, Message, Role};

use super::chat::{ChatFields, prompt};
use super::error::ApiError;
use super::fields::Fields;
use super::json::JsonBody;
use super::sse;
use crate::app::App;
use crate::engine::{FinishReason, Usage};
use crate::error::{Error, Result};
use crate::generate::{self, ChoiceEvent, TextStream};

#[derive(Debug, Deserialize)]
struct ResponseFields {
    input: Input,
    #[serde(default)]
    instructions: Option<String>,
    #[serde(default)]
    max_output_tokens: Option<i64>,
    #[serde(default)]
    text: Option<TextOptions>,
    #[serde(default)]
    tools: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    previous_response_id: Option<IgnoredAny>,
    #[serde(default)]
    conversation: Option<IgnoredAny>,
    #[serde(default)]
    background: Option<bool>,
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "input must be a string or a list of messages")]
enum Input {
    Text(String),
    Items(Vec<Item>),
}

#[derive(Debug, Deserialize)]
struct Item {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    role: Option<String>,
    content: Option<ItemContent>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "content must be a string or a list of text parts"
)]
enum ItemContent {
    Text(String),
    Parts(Vec<ItemPart>),
}

#[derive(Debug, Deserialize)]
struct ItemPart {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

#[derive(Debug, Deserialize)]
struct TextOptions {
    #[serde(default)]
    format: Option<Format>,
}

#[derive(Debug, Deserialize)]
struct Format {
    #[serde(rename = "type")]
    kind: String,
}

/// Answers an input, at once or as a stream of typed events.
pub(crate) async fn create(State(app): State<App>, body: JsonBody) -> Result<Response, ApiError> {
    app.check_ready()?;
    let fields: Fields = body.read()?;
    let own: ResponseFields = body.read()?;
    own.refuse_unsupported()?;
    let form = fields.form()?;
    let model = app.model_or_default(fields.model.clone())?;
    let chat = app.chat(&model)?;
    let envelope = own.envelope(&app, &model, &fields);
    let max_output_tokens = own.max_output_tokens;
    let messages = own.into_messages()?;
    let prompt_ids = prompt(&app, &chat, ChatFields::of(messages)).await?;
    let fields = fields.with_max_tokens("max_output_tokens", max_output_tokens)?;
    let request = fields.request(&app, &model, &chat, prompt_ids, None)?;
    let completion = generate::start(app.clone(), Arc::<Chat>::clone(&chat), request).await?;
    let answer = Answer {
        envelope,
        item_id: app.id("msg"),
    };
    if form.stream {
        return answer.stream(completion).await;
    }
    let whole = generate::collect(completion).await?;
    Ok(Json(answer.ended(&whole.text, whole.reason, whole.usage)).into_response())
}

impl ResponseFields {
    fn refuse_unsupported(&self) -> Result<()> {
        let format = self.text.as_ref().and_then(|text| text.format.as_ref());
        let refused = [
            ("previous_response_id", self.previous_response_id.is_some()),
            ("conversation", self.conversation.is_some()),
            ("background", self.background == Some(true)),
            (
                "tools",
                self.tools.as_ref().is_some_and(|tools| !tools.is_empty()),
            ),
            (
                "text.format",
                format.is_some_and(|format| format.kind != "text"),
            ),
        ];
        match refused.iter().find(|(_, is_asked)| *is_asked) {
            Some((field, _)) => {
                let message = format!("`{field}` is not supported by this server; leave it out");
                Err(Error::invalid(*field, message))
            }
            None => Ok(()),
        }
    }

    fn into_messages(self) -> Result<Vec<Message>> {
        let mut messages = Vec::new();
        if let Some(instructions) = self.instructions {
            messages.push(Message::new(Role::System, instructions));
        }
        match self.input {
            Input::Text(text) => messages.push(Message::new(Role::User, text)),
            Input::Items(items) => {
                for (index, item) in items.into_iter().enumerate() {
                    messages.push(item.into_message(index)?);
                }
            }
        }
        Ok(messages)
    }

    /// What every form of the answer says, before anything is generated.
    fn envelope(&self, app: &App, model: &str, fields: &Fields) -> Value {
        json!({
            "id": app.id("resp"), "object": "response",
            "created_at": app.options.clock.unix_seconds(), "status": "in_progress",
            "background": false, "error": null, "incomplete_details": null,
            "instructions": self.instructions, "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata.clone().unwrap_or_default(), "model": model, "output": [],
            "parallel_tool_calls": true, "previous_response_id": null, "store": false,
            "temperature": fields.temperature(), "text": {"format": {"type": "text"}},
            "tool_choice": "auto", "tools": [], "top_p": fields.top_p(),
            "truncation": "disabled", "usage": null,
        })
    }
}

impl Item {
    fn into_message(self, index: usize) -> Result<Message> {
        let at = |field: &str| format!("input[{index}].{field}");
        if self.kind.as_deref().is_some_and(|kind| kind != "message") {
            return Err(Error::invalid(
                at("type"),
                "only items of type `message` are supported",
            ));
        }
        let role = match self.role.as_deref() {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            _ => {
                let message = "the role must be developer, system, user or assistant";
                return Err(Error::invalid(at("role"), message));
            }
        };
        let text = match self.content {
            Some(ItemContent::Text(text)) => text,
            Some(ItemContent::Parts(parts)) => {
                let text = |part: ItemPart| match part.kind.as_str() {
                    "input_text" | "output_text" | "text" => part.text,
                    _ => None,
                };
                let texts: Option<Vec<String>> = parts.into_iter().map(text).collect();
                let message = "only parts of type `input_text` and `output_text` are supported";
                texts
                    .ok_or_else(|| Error::invalid(at("content"), message))?
                    .join("\n")
            }
            None => return Err(Error::invalid(at("content"), "the message has no content")),
        };
        Ok(Message {
            content: Content::Text(text),
            ..Message::new(role, "")
        })
    }
}

/// What all events of one answer have in common.
#[derive(Debug)]
struct Answer {
    envelope: Value,
    item_id: String,
}

impl Answer {
    fn item(&self, text: Option<&str>, status: &str) -> Value {
        let content: Vec<Value> = text.map(part).into_iter().collect();
        json!({
            "id": self.item_id, "type": "message", "role": "assistant", "status": status,
            "content": content,
        })
    }

    /// The whole response once its text is.
    fn ended(&self, text: &str, reason: FinishReason, usage: Usage) -> Value {
        let (status, details) = match reason {
            FinishReason::Stop => ("completed", Value::Null),
            FinishReason::Length => ("incomplete", json!({"reason": "max_output_tokens"})),
        };
        let mut response = self.envelope.clone();
        response["status"] = json!(status);
        response["incomplete_details"] = details;
        response["output"] = json!([self.item(Some(text), status)]);
        response["usage"] = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens, "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        response
    }

    /// Waits for the first event, so that an early error is a status, then streams.
    async fn stream(self, completion: TextStream) -> Result<Response, ApiError> {
        let events = generate::merge(vec![completion]).await?;
        let mut told = Told {
            text: String::new(),
            reason: FinishReason::Length,
            answer: self,
        };
        let opening = told.opening();
        let rest = events
            .map(move |event| match event {
                Ok(event) => told.on(event),
                Err(error) => vec![told.failed(error)],
            })
            .flat_map(stream::iter);
        let events = stream::iter(opening).chain(rest).enumerate();
        Ok(sse::respond_typed(events.map(|(number, mut event)| {
            event["sequence_number"] = json!(number);
            event
        })))
    }
}

/// A stream's text so far.
#[derive(Debug)]
struct Told {
    answer: Answer,
    text: String,
    reason: FinishReason,
}

impl Told {
    fn opening(&self) -> Vec<Value> {
        let envelope = &self.answer.envelope;
        vec![
            json!({"type": "response.created", "response": envelope}),
            json!({"type": "response.in_progress", "response": envelope}),
            json!({
                "type": "response.output_item.added", "output_index": 0,
                "item": self.answer.item(None, "in_progress"),
            }),
            self.of_part(json!({"type": "response.content_part.added", "part": part("")})),
        ]
    }

    fn on(&mut self, event: ChoiceEvent) -> Vec<Value> {
        match event {
            ChoiceEvent::Text { text, .. } if !text.is_empty() => {
                self.text.push_str(&text);
                vec![self.of_part(json!({
                    "type": "response.output_text.delta", "delta": text, "logprobs": [],
                }))]
            }
            ChoiceEvent::Text { .. } | ChoiceEvent::Prompt { .. } => Vec::new(),
            ChoiceEvent::Finished { reason, .. } => {
                self.reason = reason;
                Vec::new()
            }
            ChoiceEvent::AllFinished { usages } => self.closing(usages[0]),
        }
    }

    fn closing(&self, usage: Usage) -> Vec<Value> {
        let response = self.answer.ended(&self.text, self.reason, usage);
        let status = response["status"].as_str().unwrap_or_default().to_owned();
        vec![
            self.of_part(json!({
                "type": "response.output_text.done", "text": self.text, "logprobs": [],
            })),
            self.of_part(json!({"type": "response.content_part.done", "part": part(&self.text)})),
            json!({
                "type": "response.output_item.done", "output_index": 0,
                "item": self.answer.item(Some(&self.text), &status),
            }),
            json!({"type": format!("response.{status}"), "response": response}),
        ]
    }

    fn failed(&self, error: Error) -> Value {
        let mut response = self.answer.envelope.clone();
        response["status"] = json!("failed");
        response["error"] = json!({
            "code": "server_error", "message": ApiError::from(error).message(),
        });
        json!({"type": "response.failed", "response": response})
    }

    /// An event about the one text part.
    fn of_part(&self, mut event: Value) -> Value {
        event["item_id"] = json!(self.answer.item_id);
        event["output_index"] = json!(0);
        event["content_index"] = json!(0);
        event
    }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}
