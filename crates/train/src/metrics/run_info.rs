//! A run's name and settings, for those who show it beside others.

use serde::Serialize;
use serde_json::{Map, Value};
#[cfg(any(feature = "mlflow", feature = "wandb"))]
use updraft_store::sha256_hex;

use crate::{Error, Result};

/// What a tracking server is told about a run before its figures.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunInfo {
    /// What people call it.
    pub name: String,
    /// Its settings, flat.
    pub params: Map<String, Value>,
    /// What tells it from other runs, such as [`RunIdentity::key`](crate::RunIdentity::key) or a
    /// stage's key; without it name and settings do.
    pub identity: Option<String>,
}

impl RunInfo {
    /// A run of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            params: Map::new(),
            identity: None,
        }
    }

    /// The same with what tells it from other runs: one that goes on has it again.
    #[must_use]
    pub fn with_identity(mut self, identity: impl Into<String>) -> Self {
        self.identity = Some(identity.into());
        self
    }

    /// What tells it from other runs, as one SHA-256.
    #[cfg(any(feature = "mlflow", feature = "wandb"))]
    pub(super) fn key(&self) -> String {
        match &self.identity {
            Some(identity) => sha256_hex(identity.as_bytes()),
            None => {
                let settings = Value::Object(self.params.clone());
                sha256_hex(format!("{}\n{settings}", self.name).as_bytes())
            }
        }
    }

    /// The same run with the fields of some settings, such as a [`TrainConfig`](crate::TrainConfig)
    /// or a `LoraConfig`, as parameters.
    ///
    /// # Errors
    /// [`Error::Config`] if the settings have no named fields; configurations do.
    pub fn with_params(mut self, settings: &impl Serialize) -> Result<Self> {
        let Ok(Value::Object(fields)) = serde_json::to_value(settings) else {
            return Err(Error::Config {
                field: "params",
                value: std::any::type_name_of_val(settings).to_owned(),
                expected: "settings have named fields",
            });
        };
        let set = fields.into_iter().filter(|(_, value)| !value.is_null());
        self.params.extend(set);
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TrainConfig;

    #[test]
    fn settings_become_parameters_and_what_has_no_fields_is_refused() {
        let run = RunInfo::new("run").with_params(&TrainConfig::default());
        let params = run.expect("settings").params;
        assert_eq!(params["learning_rate"], 5e-5);
        assert!(!params.contains_key("max_steps"), "it is not set");
        let error = RunInfo::new("run").with_params(&3).expect_err("a number");
        assert!(
            matches!(
                error,
                Error::Config {
                    field: "params",
                    ..
                }
            ),
            "{error}"
        );
    }
}
