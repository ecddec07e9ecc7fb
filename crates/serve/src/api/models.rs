//! `GET /v1/models` and one of them.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use super::error::ApiError;
use crate::app::App;
use crate::engine::ModelInfo;
use crate::error::Error;

#[derive(Debug, Serialize)]
pub(crate) struct List {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: u32,
    permission: [(); 0],
}

impl Model {
    fn new(info: ModelInfo, created: u64) -> Self {
        Self {
            id: info.id,
            object: "model",
            created,
            owned_by: "updraft",
            root: info.root,
            parent: info.parent,
            max_model_len: info.max_model_len,
            permission: [],
        }
    }
}

pub(crate) async fn list(State(app): State<App>) -> Json<List> {
    let models = app.engine.models().into_iter();
    let data = models.map(|info| Model::new(info, app.started)).collect();
    Json(List {
        object: "list",
        data,
    })
}

pub(crate) async fn get(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    match app.engine.models().into_iter().find(|info| info.id == id) {
        Some(info) => Ok(Json(Model::new(info, app.started))),
        None => Err(Error::ModelNotFound { model: id }.into()),
    }
}
