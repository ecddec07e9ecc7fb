//! `POST /v1/responses`: text in, text out, in the newer API's words.

mod events;
mod input;
pub(crate) mod kept;

use std::collections::BTreeMap;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use updraft_chat::{Message, Role};

use self::events::Answer;
use self::input::Input;
use self::kept::Keeping;
use super::capped::Capped;
use super::chat::{ChatFields, Excess, prompt};
use super::constrain;
use super::error::ApiError;
use super::fields::{Fields, Form};
use super::json::JsonBody;
use super::unsupported;
use super::weighed::InputField;
use crate::app::{App, Shared};
use crate::auth::Owner;
use crate::constraint::Constraint;
use crate::error::{Error, Result};
use crate::generate::{self, TextStream};

/// Texts to keep beside a response at most, as OpenAI's.
const MAX_METADATA: usize = 16;
/// What an answer may be asked to include at most; OpenAI knows eight such things.
const MAX_INCLUDES: usize = 64;
/// The one of them that would be in a text answer.
const LOGPROBS: &str = "message.output_text.logprobs";

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
    previous_response_id: Option<String>,
    #[serde(default)]
    conversation: Option<IgnoredAny>,
    #[serde(default)]
    background: Option<bool>,
    #[serde(default)]
    store: Option<bool>,
    #[serde(default)]
    metadata: Option<Capped<BTreeMap<String, String>, MAX_METADATA>>,
    /// What thinking templates may read.
    #[serde(default)]
    reasoning: Option<Reasoning>,
    /// A prompt that OpenAI keeps.
    #[serde(default)]
    prompt: Option<IgnoredAny>,
    #[serde(default)]
    top_logprobs: Option<i64>,
    #[serde(default)]
    include: Option<Capped<Vec<String>, MAX_INCLUDES>>,
}

#[derive(Debug, Deserialize)]
struct Reasoning {
    #[serde(default)]
    effort: Option<String>,
}

#[derive(Debug, Deserialize)]
struct TextOptions {
    #[serde(default)]
    format: Option<Value>,
}

/// Answers an input: at once, as a stream of typed events, or in the background.
pub(crate) async fn create(
    State(app): State<App>,
    Extension(owner): Extension<Owner>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    app.check_ready()?;
    body.read::<InputField>()?;
    let fields = Fields::read(&body)?;
    unsupported::refuse_fields(&body)?;
    let own: ResponseFields = body.read()?;
    let form = fields.form()?;
    own.refuse_unsupported(&app, &form)?;
    let model = app.model_or_default(fields.model.clone())?;
    let chat = app.chat(&model)?;
    let constraint = own.constraint()?;
    let envelope = own.envelope(&app, &model, &fields);
    let (keep, background) = (own.keep(&app), own.background == Some(true));
    let effort = own.reasoning.as_ref().and_then(|own| own.effort.clone());
    let max_output_tokens = own.max_output_tokens;
    let instructions = own.instructions.clone();
    let conversation = own.into_conversation(&app, owner)?;
    let instructions = instructions.map(|text| Message::new(Role::System, text));
    let messages = instructions.into_iter().chain(conversation.clone());
    let info = app.info(&model)?;
    let excess = Excess::of(&fields);
    let asked = ChatFields::of(messages.collect(), effort);
    let prompt_ids = prompt(&app, &chat, asked, &info, excess).await?;
    let arrived = body.arrived();
    drop(body);
    let fields = fields.with_max_tokens("max_output_tokens", max_output_tokens)?;
    let prompt_ids = fields.truncated(prompt_ids, info.max_model_len)?;
    let template = fields.template(&app, &model, &chat).await?;
    let mut request = template.request(&app, prompt_ids, None)?;
    request.request.constraint = constraint.or(request.request.constraint);
    let mut started = generate::start(&app, &chat, vec![request], arrived).await?;
    let completion = started.pop().ok_or(Error::Unavailable {
        reason: "the engine gave no answer",
    })?;
    let keeping = keep.then(|| Keeping {
        app: app.clone(),
        owner,
        conversation,
    });
    let answer = Answer {
        envelope,
        item_id: app.id("msg_"),
        keeping,
    };
    if form.stream {
        return answer.stream(completion).await;
    }
    if background {
        return Ok(Json(in_background(answer, completion)).into_response());
    }
    let whole = generate::collect(completion).await?;
    Ok(Json(answer.ended(&whole.text, whole.reason, whole.usage)).into_response())
}

/// Goes on without the client, which asks for the end, or cancels, by the id.
fn in_background(answer: Answer, completion: TextStream) -> Value {
    let begun = answer.envelope.clone();
    if let Some(keeping) = &answer.keeping {
        let cancelled = keeping.begin(&begun);
        let task = keeping.app.background.begin();
        tokio::spawn(async move {
            let _held_until_done = task;
            let whole = tokio::select! {
                whole = generate::collect(completion) => whole,
                () = cancelled => return, // Dropping the completion frees what it held.
            };
            match whole {
                Ok(whole) => answer.ended(&whole.text, whole.reason, whole.usage),
                Err(error) => answer.failed(error),
            };
        });
    }
    begun
}

/// A kept response.
pub(crate) async fn get(
    State(app): State<App>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let kept = app.kept.get(&id, owner);
    kept.map(Json)
        .ok_or_else(|| ApiError::no_such_response(&id))
}

/// Ends a response that is made in the background.
pub(crate) async fn cancel(
    State(app): State<App>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let response = app.kept.get(&id, owner);
    let response = response.ok_or_else(|| ApiError::no_such_response(&id))?;
    if response["background"] != true {
        let message = "only responses made with `background: true` can be cancelled";
        return Err(ApiError::invalid(message, Some("background".into())));
    }
    let response = app.kept.cancel(&id, owner);
    response
        .map(Json)
        .ok_or_else(|| ApiError::no_such_response(&id))
}

/// Forgets a kept response, and ends it if it is still being made.
pub(crate) async fn delete(
    State(app): State<App>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match app.kept.remove(&id, owner) {
        true => Ok(Json(
            json!({"id": id, "object": "response", "deleted": true}),
        )),
        false => Err(ApiError::no_such_response(&id)),
    }
}

impl ResponseFields {
    /// Whether the response can be asked for again.
    fn keep(&self, app: &Shared) -> bool {
        self.store.unwrap_or(true) && app.options.max_kept_responses > 0
    }

    fn refuse_unsupported(&self, app: &Shared, form: &Form) -> Result<()> {
        let mut included = self.include.iter().flat_map(|Capped(included)| included);
        let refused = [
            ("conversation", self.conversation.is_some()),
            ("prompt", self.prompt.is_some()),
            (
                "tools",
                self.tools.as_ref().is_some_and(|tools| !tools.is_empty()),
            ),
            (
                "top_logprobs",
                self.top_logprobs.is_some_and(|top| top != 0),
            ),
            ("include", included.any(|what| what == LOGPROBS)),
            ("n", form.num_choices > 1),
        ];
        if let Some((field, _)) = refused.iter().find(|(_, is_asked)| *is_asked) {
            let message = format!("`{field}` is not supported by this server; leave it out");
            return Err(Error::invalid(*field, message));
        }
        if self.background == Some(true) && (!self.keep(app) || form.stream) {
            let message = "a response in the background must be stored and cannot be streamed";
            return Err(Error::invalid("background", message));
        }
        Ok(())
    }

    fn constraint(&self) -> Result<Option<Constraint>> {
        let format = self.text.as_ref().and_then(|text| text.format.as_ref());
        format.map_or(Ok(None), |format| {
            constrain::of_text_format("text.format", format)
        })
    }

    /// What was said before, and what is said now.
    fn into_conversation(self, app: &Shared, owner: Owner) -> Result<Vec<Message>> {
        let mut conversation = match &self.previous_response_id {
            None => Vec::new(),
            Some(id) => app.kept.conversation(id, owner).ok_or_else(|| {
                let message = "there is no such response; responses are kept for a while only";
                Error::invalid("previous_response_id", message)
            })?,
        };
        conversation.extend(self.input.into_messages()?);
        Ok(conversation)
    }

    /// What every form of the answer says, before anything is generated.
    fn envelope(&self, app: &Shared, model: &str, fields: &Fields) -> Value {
        let format = self.text.as_ref().and_then(|text| text.format.clone());
        let draws = fields.draws();
        let Capped(metadata) = self.metadata.clone().unwrap_or_default();
        json!({
            "id": app.id("resp_"), "object": "response",
            "created_at": app.options.clock.unix_seconds(), "status": "in_progress",
            "background": self.background.unwrap_or(false), "error": null,
            "incomplete_details": null, "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": metadata, "model": model, "output": [],
            "parallel_tool_calls": true, "previous_response_id": self.previous_response_id,
            "store": self.keep(app), "temperature": draws.temperature,
            "text": {"format": format.unwrap_or_else(|| json!({"type": "text"}))},
            "tool_choice": "auto", "tools": [], "top_p": draws.top_p,
            "truncation": "disabled", "usage": null,
        })
    }
}
