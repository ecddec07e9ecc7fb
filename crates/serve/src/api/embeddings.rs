//! `POST /v1/embeddings`: the last token's hidden state, of length 1.

use axum::Json;
use axum::extract::State;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::future;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use super::json::JsonBody;
use super::prompt::Prompt;
use crate::app::App;
use crate::engine::GenerateRequest;
use crate::error::Error;
use crate::generate::{self, TextRequest};

#[derive(Debug, Deserialize)]
struct EmbeddingFields {
    #[serde(default)]
    model: Option<String>,
    input: Prompt,
    #[serde(default)]
    encoding_format: Option<Encoding>,
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
    let (chat, info) = (app.chat(&model)?, app.info(&model)?);
    fields.input.check_size(&info)?;
    fields.input.check_work("input", &info)?;
    let inputs = fields
        .input
        .into_prompts(&app, "input", &chat, info.text_prefix);
    let inputs = inputs.await?;
    let arrived = body.arrived();
    drop(body);
    let prompt_tokens = inputs.iter().map(|input| input.ids.len()).sum();
    let mut states = Vec::with_capacity(inputs.len());
    // A few at a time: others wait less, and the queue has room for them.
    for some in inputs.chunks(app.options.max_choices.max(1)) {
        let requests = some.iter().map(|input| asking(&model, input.ids.clone()));
        let started = generate::start(&app, &chat, requests.collect(), arrived).await?;
        let some = future::try_join_all(started.into_iter().map(generate::collect)).await?;
        states.extend(some.into_iter().map(|whole| whole.embedding));
    }
    let encoding = fields.encoding_format.unwrap_or_default();
    let embedding = |(index, state): (usize, Vec<f32>)| Embedding {
        object: "embedding",
        index,
        embedding: encoding.encode(normalized(state)),
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

/// The hidden state after a prompt, and no text.
fn asking(model: &str, prompt_ids: Vec<u32>) -> TextRequest {
    TextRequest {
        request: GenerateRequest {
            embed: true,
            ..GenerateRequest::greedy(model, prompt_ids, 0)
        },
        stop: Vec::new(),
        include_stop: false,
        skip_special_tokens: true,
    }
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
