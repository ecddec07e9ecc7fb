//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them.

use axum::extract::State;
use serde::Deserialize;

use super::error::ApiError;
use super::json::JsonBody;
use crate::app::{App, Shared};
use crate::engine::{Adapters, Existing};
use crate::error::{Error, Result, one_line};
use crate::model_engine::{AdapterSource, ModelSource};

#[derive(Debug, Deserialize)]
struct Load {
    lora_name: String,
    lora_path: String,
    #[serde(default)]
    load_inplace: Option<bool>,
}

/// Loads an adapter under a name.
pub(crate) async fn load(State(app): State<App>, body: JsonBody) -> Result<String, ApiError> {
    app.check_ready()?;
    let fields: Load = body.read()?;
    let existing = match fields.load_inplace.unwrap_or(false) {
        true => Existing::Replace,
        false => Existing::Keep,
    };
    let name = fields.lora_name;
    let source = ModelSource::parse(&fields.lora_path).map_err(|error| unusable(&error))?;
    let source = AdapterSource {
        name: name.clone(),
        source,
    };
    let loaded = adapters(&app)?.load_adapter(&source, existing).await;
    loaded.map_err(|error| match error {
        Error::InvalidRequest { .. } | Error::Unavailable { .. } => error,
        other => unusable(&other),
    })?;
    tracing::info!(name, path = fields.lora_path, "an adapter is loaded");
    Ok(format!("the adapter `{name}` is loaded"))
}

#[derive(Debug, Deserialize)]
struct Unload {
    lora_name: String,
}

/// Takes a name away; requests under way keep what they began with.
pub(crate) async fn unload(State(app): State<App>, body: JsonBody) -> Result<String, ApiError> {
    let name = body.read::<Unload>()?.lora_name;
    adapters(&app)?.unload_adapter(&name)?;
    app.metrics.forget(&name);
    tracing::info!(name, "an adapter is unloaded");
    Ok(format!("the adapter `{name}` is unloaded"))
}

fn adapters(app: &Shared) -> Result<&dyn Adapters> {
    app.engine.adapters().ok_or_else(|| Error::InvalidRequest {
        message: "this server's models take no adapters".into(),
        param: None,
    })
}

/// The path is the client's: what is wrong with it is a 400. The causes are for the log.
fn unusable(error: &Error) -> Error {
    tracing::warn!(error = one_line(error), "an adapter was not loaded");
    Error::invalid("lora_path", error.to_string())
}
