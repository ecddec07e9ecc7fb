//! Several engines under one roof.

use std::sync::Arc;

use async_trait::async_trait;
use futures::future::try_join_all;
use updraft_chat::Chat;

use crate::engine::{
    Adapters, Engine, EngineStats, Existing, GenerateRequest, ModelInfo, TokenStream,
};
use crate::error::{Error, Result};
use crate::model_engine::AdapterSource;

/// Serves the models of several engines, such as a base model and its merged fine-tune.
#[derive(Debug)]
pub struct Engines(Vec<Arc<dyn Engine>>);

impl Engines {
    /// These engines, the first one's first model being the default.
    ///
    /// # Errors
    /// [`Error::Options`] if there is none, or two serve the same name.
    pub fn new(engines: Vec<Arc<dyn Engine>>) -> Result<Self> {
        let mut ids: Vec<String> = engines
            .iter()
            .flat_map(|engine| engine.models())
            .map(|info| info.id)
            .collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::same_name(&pair[0]));
        }
        match ids.is_empty() {
            true => Err(Error::Options(
                "no model is named; name at least one".into(),
            )),
            false => Ok(Self(engines)),
        }
    }

    fn of(&self, model: &str) -> Option<&Arc<dyn Engine>> {
        self.0.iter().find(|engine| engine.chat(model).is_some())
    }
}

#[async_trait]
impl Engine for Engines {
    fn models(&self) -> Vec<ModelInfo> {
        self.0.iter().flat_map(|engine| engine.models()).collect()
    }

    fn chat(&self, model: &str) -> Option<Arc<Chat>> {
        self.of(model)?.chat(model)
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream> {
        match self.of(&request.model) {
            Some(engine) => engine.generate(request).await,
            None => Err(Error::ModelNotFound {
                model: request.model,
            }),
        }
    }

    async fn generate_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<TokenStream>> {
        let first = requests.first().map(|request| request.model.clone());
        let one_model = requests
            .windows(2)
            .all(|pair| pair[0].model == pair[1].model);
        match first.as_ref().and_then(|model| self.of(model)) {
            Some(engine) if one_model => engine.generate_all(requests).await,
            _ => try_join_all(requests.into_iter().map(|request| self.generate(request))).await,
        }
    }

    fn stats(&self) -> Vec<EngineStats> {
        self.0.iter().flat_map(|engine| engine.stats()).collect()
    }

    fn adapters(&self) -> Option<&dyn Adapters> {
        let any = self.0.iter().any(|engine| engine.adapters().is_some());
        any.then_some(self)
    }
}

/// Adapters go to the first engine that takes any.
#[async_trait]
impl Adapters for Engines {
    async fn load_adapter(&self, source: &AdapterSource, existing: Existing) -> Result<()> {
        let taking = self
            .0
            .iter()
            .find_map(|engine| Some((engine, engine.adapters()?)));
        let (engine, adapters) = taking.ok_or_else(|| Error::InvalidRequest {
            message: "these models take no adapters".into(),
            param: None,
        })?;
        let named = self.of(&source.name);
        if named.is_some_and(|named| !Arc::ptr_eq(named, engine)) {
            let message = format!("`{}` is another model's name", source.name);
            return Err(Error::invalid("lora_name", message));
        }
        adapters.load_adapter(source, existing).await
    }

    fn unload_adapter(&self, name: &str) -> Result<()> {
        let adapters = self.of(name).and_then(|engine| engine.adapters());
        let unknown = || Error::ModelNotFound {
            model: name.to_owned(),
        };
        adapters.ok_or_else(unknown)?.unload_adapter(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EchoEngine;

    #[test]
    fn names_are_unique_and_there_is_one() {
        let engine = |names: &[&str]| -> Arc<dyn Engine> {
            Arc::new(EchoEngine::new(names.iter().copied()))
        };
        let twice = Engines::new(vec![engine(&["a", "b"]), engine(&["b"])]);
        let error = twice.expect_err("b is there twice").to_string();
        assert!(error.contains("`b`"), "{error}");
        assert!(Engines::new(Vec::new()).is_err());
        let both = Engines::new(vec![engine(&["a"]), engine(&["b"])]).expect("distinct");
        let ids: Vec<_> = both.models().into_iter().map(|info| info.id).collect();
        assert_eq!(ids, ["a", "b"]);
    }
}
