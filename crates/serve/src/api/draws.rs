//! The fields that say how tokens are drawn, with OpenAI's ranges and the model's own defaults.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::app::Shared;
use crate::error::{Error, Result};
use crate::sampling::{SamplingDefaults, SamplingParams};

#[derive(Debug, Default, Deserialize)]
pub(crate) struct DrawFields {
    #[serde(default)]
    pub(crate) seed: Option<i64>,
    #[serde(default)]
    pub(crate) temperature: Option<f64>,
    #[serde(default)]
    pub(crate) top_p: Option<f64>,
    #[serde(default)]
    pub(crate) top_k: Option<i64>,
    #[serde(default)]
    pub(crate) min_p: Option<f64>,
    #[serde(default)]
    pub(crate) frequency_penalty: Option<f64>,
    #[serde(default)]
    pub(crate) presence_penalty: Option<f64>,
    #[serde(default)]
    pub(crate) repetition_penalty: Option<f64>,
    #[serde(default)]
    logit_bias: Option<BTreeMap<String, f64>>,
    #[serde(default)]
    allowed_token_ids: Option<Vec<u32>>,
}

impl DrawFields {
    /// The settings; what is left out is the model's default.
    pub(crate) fn params(
        &self,
        app: &Shared,
        defaults: &SamplingDefaults,
    ) -> Result<SamplingParams> {
        let or = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);
        let top_k = match self.top_k.or(defaults.top_k) {
            None | Some(-1) => 0,
            Some(top_k) => u32::try_from(top_k)
                .map_err(|_| Error::invalid("top_k", "top_k must be -1, 0 or a positive number"))?,
        };
        let allowed_token_ids = self.allowed_token_ids.clone();
        if allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
            let message = "allowed_token_ids is empty; leave it out or name a token";
            return Err(Error::invalid("allowed_token_ids", message));
        }
        let params = SamplingParams {
            temperature: or(self.temperature.or(defaults.temperature), 1.0),
            top_p: or(self.top_p.or(defaults.top_p), 1.0),
            top_k,
            min_p: or(self.min_p.or(defaults.min_p), 0.0),
            frequency_penalty: or(self.frequency_penalty, 0.0),
            presence_penalty: or(self.presence_penalty, 0.0),
            repetition_penalty: or(self.repetition_penalty.or(defaults.repetition_penalty), 1.0),
            logit_bias: self.logit_bias()?,
            allowed_token_ids: allowed_token_ids.unwrap_or_default(),
            seed: self.seed.map_or_else(|| app.seed(), i64::cast_unsigned),
        };
        params.validate()?;
        Ok(params)
    }

    fn logit_bias(&self) -> Result<Vec<(u32, f32)>> {
        let biases = self.logit_bias.iter().flatten();
        biases
            .map(|(id, bias)| match id.parse() {
                Ok(id) => Ok((id, *bias as f32)),
                Err(_) => Err(Error::invalid(
                    "logit_bias",
                    "logit_bias needs token ids as keys",
                )),
            })
            .collect()
    }
}
