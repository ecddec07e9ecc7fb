//! A run's name and settings, for those who show it beside others.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// What a tracking server is told about a run before its figures.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunInfo {
    /// What people call it.
    pub name: String,
    /// Its settings, flat.
    pub params: Map<String, Value>,
}

impl RunInfo {
    /// A run of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            params: Map::new(),
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
