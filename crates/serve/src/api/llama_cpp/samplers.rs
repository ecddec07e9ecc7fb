//! What llama.cpp can do to an answer and this server cannot.

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::error::{Error, Result};

/// Fields of which the neutral values are harmless.
#[derive(Debug, Deserialize)]
pub(super) struct Others {
    #[serde(default)]
    adaptive_target: Option<f64>,
    #[serde(default)]
    dry_multiplier: Option<f64>,
    #[serde(default)]
    dynatemp_range: Option<f64>,
    #[serde(default)]
    image_data: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    lora: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    mirostat: Option<f64>,
    /// Several answers to each prompt.
    #[serde(default, alias = "n")]
    n_cmpl: Option<f64>,
    #[serde(default)]
    n_indent: Option<f64>,
    #[serde(default)]
    t_max_predict_ms: Option<f64>,
    #[serde(default)]
    top_n_sigma: Option<f64>,
    #[serde(default)]
    typical_p: Option<f64>,
    #[serde(default)]
    xtc_probability: Option<f64>,
}

impl Others {
    /// Refuses what would change the answer.
    pub(super) fn refuse(&self) -> Result<()> {
        let above = |value: Option<f64>, off: f64| value.is_some_and(|value| value > off);
        let any = |list: &Option<Vec<IgnoredAny>>| list.as_ref().is_some_and(|all| !all.is_empty());
        let asked = [
            (
                "adaptive_target",
                self.adaptive_target.is_some_and(|target| target >= 0.0),
            ),
            ("dry_multiplier", above(self.dry_multiplier, 0.0)),
            ("dynatemp_range", above(self.dynatemp_range, 0.0)),
            ("image_data", any(&self.image_data)),
            ("lora", any(&self.lora)),
            ("mirostat", above(self.mirostat, 0.0)),
            ("n_cmpl", above(self.n_cmpl, 1.0)),
            ("n_indent", above(self.n_indent, 0.0)),
            ("t_max_predict_ms", above(self.t_max_predict_ms, 0.0)),
            ("top_n_sigma", above(self.top_n_sigma, 0.0)),
            ("typical_p", self.typical_p.is_some_and(|p| p < 1.0)),
            ("xtc_probability", above(self.xtc_probability, 0.0)),
        ];
        match asked.iter().find(|(_, is_asked)| *is_asked) {
            Some((field, _)) => {
                let message = format!("`{field}` is not supported by this server; leave it out");
                Err(Error::invalid(*field, message))
            }
            None => Ok(()),
        }
    }
}
