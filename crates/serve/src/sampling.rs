//! How a client wants the next token chosen.

use std::sync::Arc;

use crate::error::{Error, Result};

/// The choice of each token, in the order the settings apply: bias, penalties, temperature,
/// `min_p`, `top_k`, `top_p`, then one draw.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits. 0 takes the likeliest token (ties: the lowest id); above 1 is bolder.
    pub temperature: f32,
    /// Keeps the likeliest tokens until their probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Drops tokens less likely than this fraction of the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Subtracted from a logit once for each time its token was generated.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of every token generated so far.
    pub presence_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or completion;
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Arc<[(u32, f32)]>,
    /// No other token is chosen; none named allows all.
    pub allowed_token_ids: Arc<[u32]>,
    /// Decides every draw, together with the token's position in the completion.
    pub seed: u64,
}

/// What a model's makers recommend, as `generation_config.json` has it; what a request leaves out
/// is taken from here.
#[derive(Debug, Clone, Default, PartialEq, serde::Deserialize)]
pub struct SamplingDefaults {
    /// As [`SamplingParams::temperature`].
    #[serde(default)]
    pub temperature: Option<f64>,
    /// As [`SamplingParams::top_p`].
    #[serde(default)]
    pub top_p: Option<f64>,
    /// As [`SamplingParams::top_k`].
    #[serde(default)]
    pub top_k: Option<i64>,
    /// As [`SamplingParams::min_p`].
    #[serde(default)]
    pub min_p: Option<f64>,
    /// As [`SamplingParams::repetition_penalty`].
    #[serde(default)]
    pub repetition_penalty: Option<f64>,
}

impl SamplingParams {
    /// The likeliest token each time.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::seeded(0)
        }
    }

    /// The model's own distribution (temperature 1), drawn with `seed`.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Arc::default(),
            allowed_token_ids: Arc::default(),
            seed,
        }
    }

    /// Whether the choice never depends on the seed.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] naming the first field out of range.
    pub fn validate(&self) -> Result<()> {
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)
            .map_err(|_| Error::invalid("top_p", "top_p must be above 0 and at most 1"))?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let message = "repetition_penalty must be a number above 0";
            return Err(Error::invalid("repetition_penalty", message));
        }
        self.logit_bias
            .iter()
            .try_for_each(|(_, bias)| within("logit_bias", *bias, -100.0, 100.0))
    }
}

fn within(param: &str, value: f32, low: f32, high: f32) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(
        param,
        format!("{param} must be between {low} and {high}, not {value}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_is_checked_and_named() {
        let base = SamplingParams::seeded(1);
        assert!(base.validate().is_ok());
        assert!(SamplingParams::greedy().validate().is_ok());
        let cases: [(SamplingParams, &str); 9] = [
            (
                SamplingParams {
                    temperature: 2.1,
                    ..base.clone()
                },
                "temperature",
            ),
            (
                SamplingParams {
                    temperature: f32::NAN,
                    ..base.clone()
                },
                "temperature",
            ),
            (
                SamplingParams {
                    top_p: 0.0,
                    ..base.clone()
                },
                "top_p",
            ),
            (
                SamplingParams {
                    top_p: 1.5,
                    ..base.clone()
                },
                "top_p",
            ),
            (
                SamplingParams {
                    min_p: -0.1,
                    ..base.clone()
                },
                "min_p",
            ),
            (
                SamplingParams {
                    frequency_penalty: 2.5,
                    ..base.clone()
                },
                "frequency_penalty",
            ),
            (
                SamplingParams {
                    presence_penalty: -2.5,
                    ..base.clone()
                },
                "presence_penalty",
            ),
            (
                SamplingParams {
                    repetition_penalty: 0.0,
                    ..base.clone()
                },
                "repetition_penalty",
            ),
            (
                SamplingParams {
                    logit_bias: Arc::from([(3, 101.0)]),
                    ..base.clone()
                },
                "logit_bias",
            ),
        ];
        for (params, field) in cases {
            match params.validate() {
                Err(Error::InvalidRequest {
                    param: Some(param), ..
                }) => assert_eq!(param, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
