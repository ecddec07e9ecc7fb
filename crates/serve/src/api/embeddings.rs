//! `POST /v1/embeddings`: the last token's hidden state, of length 1.

use axum::Json;
use axum::extract::State;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::{TryStreamExt, future};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::completions::Prompt;
use super::error::ApiError;
use super::json::JsonBody;
use crate::app::{App, Shared};
use crate::engine::{GenerateRequest, TokenEvent};
use crate::error::{Error, Result};

#[derive(Debug, Deserialize)]
struct EmbeddingFields {
    #[serde(default)]
    model: Option<String>,
    input: Prompt,
    #[serde(default)]
    encoding_format: Encoding,
    #[serde(default)]
    dimensions: Option<IgnoredAny>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    /// Little-endian f32.
    Base64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Embeddings {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Debug, Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Values,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Values {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Serialize)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// Embeds one text or several.
pub(crate) async fn create(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Json<Embeddings>, ApiError> {
    app.check_ready()?;
    let fields: EmbeddingFields = body.read()?;
    if fields.dimensions.is_some() {
        let message = "`dimensions` is not supported by this server; leave it out";
        return Err(Error::invalid("dimensions", message).into());
    }
    let model = app.model_or_default(fields.model)?;
    let chat = app.chat(&model)?;
    let prefix = app.info(&model)?.text_prefix;
    let inputs = fields.input.into_prompts("input", &chat, prefix).await?;
    app.check_choices(inputs.len(), 1)?;
    let prompt_tokens = inputs.iter().map(|input| input.ids.len()).sum();
    let states = inputs
        .into_iter()
        .map(|input| hidden_state(&app, &model, input.ids));
    let states = future::try_join_all(states).await?;
    let embedding = |(index, state): (usize, Vec<f32>)| Embedding {
        object: "embedding",
        index,
        embedding: fields.encoding_format.encode(normalized(state)),
    };
    Ok(Json(Embeddings {
        object: "list",
        data: states.into_iter().enumerate().map(embedding).collect(),
        model,
        usage: EmbeddingUsage {
            prompt_tokens,
            total_tokens: prompt_tokens,
        },
    }))
}

async fn hidden_state(app: &Shared, model: &str, prompt_ids: Vec<u32>) -> Result<Vec<f32>> {
    let request = GenerateRequest {
        embed: true,
        ..GenerateRequest::greedy(model, prompt_ids, 0)
    };
    let mut events = app.engine.generate(request).await?;
    let mut state = None;
    while let Some(event) = events.try_next().await? {
        if let TokenEvent::Embedding(values) = event {
            state = Some(values);
        }
    }
    state.ok_or(Error::Unavailable {
        reason: "the engine gave no embedding",
    })
}

/// Of length 1, so that a dot product is a cosine; zero stays zero.
fn normalized(mut values: Vec<f32>) -> Vec<f32> {
    let length = values
        .iter()
        .map(|v| f64::from(*v).powi(2))
        .sum::<f64>()
        .sqrt();
    if length > 0.0 {
        values
            .iter_mut()
            .for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    values
}

impl Encoding {
    fn encode(self, values: Vec<f32>) -> Values {
        match self {
            Self::Float => Values::Float(values),
            Self::Base64 => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                Values::Base64(BASE64_STANDARD.encode(bytes))
            }
        }
    }
}
