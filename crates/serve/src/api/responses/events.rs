//! A response as it is told: whole, or as typed events.

use axum::response::Response;
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use super::kept::Keeping;
use crate::api::error::ApiError;
use crate::api::sse;
use crate::engine::{FinishReason, Usage};
use crate::error::Error;
use crate::generate::{self, ChoiceEvent, TextStream};

/// What all events of one answer have in common.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) envelope: Value,
    pub(super) item_id: String,
    /// Where the end is noted; `None` if nobody may ask for it again.
    pub(super) keeping: Option<Keeping>,
}

impl Answer {
    fn item(&self, text: Option<&str>, status: &str) -> Value {
        let content: Vec<Value> = text.map(part).into_iter().collect();
        json!({
            "id": self.item_id, "type": "message", "role": "assistant", "status": status,
            "content": content,
        })
    }

    /// The whole response once its text is, which is kept.
    pub(super) fn ended(&self, text: &str, reason: FinishReason, usage: Usage) -> Value {
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
        if let Some(keeping) = &self.keeping {
            keeping.end(&response, text);
        }
        response
    }

    /// The response that came to nothing.
    pub(super) fn failed(&self, error: Error) -> Value {
        let mut response = self.envelope.clone();
        response["status"] = json!("failed");
        response["error"] = json!({
            "code": "server_error", "message": ApiError::from(error).message(),
        });
        if let Some(keeping) = &self.keeping {
            keeping.end(&response, "");
        }
        response
    }

    /// Waits for the first event, so that an early error is a status, then streams.
    pub(super) async fn stream(self, completion: TextStream) -> Result<Response, ApiError> {
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
        json!({"type": "response.failed", "response": self.answer.failed(error)})
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
