//! The fields that say how tokens are drawn, with OpenAI's ranges and the model's own defaults.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

use super::capped::Capped;
use super::json::JsonBody;
use crate::app::Shared;
use crate::error::{Error, Result};
use crate::limits::{MAX_ALLOWED_TOKEN_IDS, MAX_LOGIT_BIASES};
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
    #[serde(skip)]
    logit_bias: Option<Capped<BTreeMap<String, f64>, MAX_LOGIT_BIASES>>,
    #[serde(default)]
    allowed_token_ids: Option<Capped<Vec<u32>, MAX_ALLOWED_TOKEN_IDS>>,
}

/// By token ids, as OpenAI has it; llama.cpp's is another.
#[derive(Debug, Deserialize)]
struct BiasField {
    #[serde(default)]
    logit_bias: Option<Capped<BTreeMap<String, f64>, MAX_LOGIT_BIASES>>,
}

impl DrawFields {
    /// Everything that OpenAI's and vLLM's requests say.
    pub(crate) fn read(body: &JsonBody) -> Result<Self> {
        Ok(Self {
            logit_bias: body.read::<BiasField>()?.logit_bias,
            ..body.read()?
        })
    }

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
        let params = SamplingParams {
            temperature: or(self.temperature.or(defaults.temperature), 1.0),
            top_p: or(self.top_p.or(defaults.top_p), 1.0),
            top_k,
            min_p: or(self.min_p.or(defaults.min_p), 0.0),
            frequency_penalty: or(self.frequency_penalty, 0.0),
            presence_penalty: or(self.presence_penalty, 0.0),
            repetition_penalty: or(self.repetition_penalty.or(defaults.repetition_penalty), 1.0),
            logit_bias: self.logit_bias()?,
            allowed_token_ids: self.allowed_token_ids()?,
            seed: self.seed.map_or_else(|| app.seed(), i64::cast_unsigned),
        };
        params.validate()?;
        Ok(params)
    }

    /// Each once.
    fn allowed_token_ids(&self) -> Result<Arc<[u32]>> {
        let Some(Capped(ids)) = &self.allowed_token_ids else {
            return Ok(Arc::default());
        };
        if ids.is_empty() {
            let message = "allowed_token_ids is empty; leave it out or name a token";
            return Err(Error::invalid("allowed_token_ids", message));
        }
        let mut ids = ids.clone();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids.into())
    }

    fn logit_bias(&self) -> Result<Arc<[(u32, f32)]>> {
        let biases = self.logit_bias.iter().flat_map(|Capped(biases)| biases);
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
