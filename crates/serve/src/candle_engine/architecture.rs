//! Which models of candle-transformers can be run, each behind the same two verbs.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{gemma, gemma2, gemma3, olmo2, phi3, starcoder2};
use serde_json::Value;

use crate::error::BoxError;

/// A model that computes one sequence and keeps its keys and values itself.
pub(super) trait OneSequence: Send {
    /// The logits after the last of `ids: [1, T]`, whose first has this position.
    fn forward(&mut self, ids: &Tensor, start: usize) -> Result<Tensor>;

    /// Forgets the sequence.
    fn clear(&mut self);
}

macro_rules! architectures {
    ($($model_type:literal => $module:ident ($($flash:literal)?),)*) => {
        /// The `model_type`s that [`CandleEngine`](crate::CandleEngine) runs.
        pub const CANDLE_ARCHITECTURES: &[&str] = &[$($model_type),*];

        $(impl OneSequence for $module::Model {
            fn forward(&mut self, ids: &Tensor, start: usize) -> Result<Tensor> {
                $module::Model::forward(self, ids, start)
            }

            fn clear(&mut self) {
                self.clear_kv_cache();
            }
        })*

        /// # Errors
        /// An architecture that is not among them, a setting that is missing, a tensor that is
        /// missing or of another shape.
        pub(super) fn build(
            model_type: &str,
            config: Value,
            weights: VarBuilder<'_>,
        ) -> std::result::Result<Box<dyn OneSequence>, BoxError> {
            match model_type {
                $($model_type => {
                    let config: $module::Config = serde_json::from_value(config)?;
                    Ok(Box::new($module::Model::new($($flash,)? &config, weights)?))
                })*
                other => Err(format!(
                    "the architecture {other:?} is not supported; these are: {}",
                    CANDLE_ARCHITECTURES.join(", ")
                )
                .into()),
            }
        }
    };
}

// Those whose logits are transformers': see tests/it/candle.rs. `false` is flash attention.
architectures! {
    "gemma" => gemma(false),
    "gemma2" => gemma2(false),
    "gemma3_text" => gemma3(false),
    "olmo2" => olmo2(),
    "phi3" => phi3(),
    "starcoder2" => starcoder2(),
}
