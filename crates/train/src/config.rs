//! The settings of a run, by the names of `transformers.TrainingArguments`.

use candle_core::DType;
use serde::{Deserialize, Serialize};
use updraft_model::Activations;

use crate::plan::Batching;
use crate::schedule::{Schedule, SchedulerType};
use crate::{Error, Result};

/// Settings of one training run.
///
/// Names and defaults are those of `transformers.TrainingArguments` (and of
/// TRL's `SFTConfig` for `packing`); LoRA usually wants a higher
/// `learning_rate` than the default, such as `2e-4`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Peak learning rate. Too high and the loss jumps, too low and it stays.
    pub learning_rate: f64,
    /// Passes over the data; a fraction stops inside a pass.
    pub num_train_epochs: f64,
    /// Optimizer steps; when set, it overrides `num_train_epochs` and the data
    /// is passed over as often as that takes.
    pub max_steps: Option<u64>,
    /// Examples per micro-batch, or packed rows when `packing` is on. Memory
    /// grows with it. The token budget of a micro-batch (other programs'
    /// `max_tokens`, `max_tokens_per_batch` or `batch_tokens`) is
    /// `packing: true` with this many times `max_seq_len`: no micro-batch has
    /// more tokens. Without packing examples lie end to end all the same:
    /// nothing is ever padded, and the numbers are those of padded batches.
    pub per_device_train_batch_size: u32,
    /// Micro-batches per optimizer step. The step's loss and gradients do not
    /// depend on how the same examples are divided.
    pub gradient_accumulation_steps: u32,
    /// Put several examples into one row of at most `max_seq_len` tokens.
    /// Attention and positions stay per example, so only the composition of a
    /// step changes.
    pub packing: bool,
    /// Tokens in a packed row, `max_length` in TRL. Without packing only a limit that the data must
    /// already respect.
    pub max_seq_len: u32,
    /// Examples packed together. A larger window fills rows better and holds
    /// more examples in memory.
    pub packing_window: u32,
    /// How the learning rate falls.
    pub lr_scheduler_type: SchedulerType,
    /// Optimizer steps over which the learning rate rises from zero.
    pub warmup_steps: u64,
    /// The same as a share of all steps; used when `warmup_steps` is zero.
    pub warmup_ratio: f64,
    /// Which optimizer.
    pub optim: OptimizerKind,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of AdamW's first moment.
    pub adam_beta1: f64,
    /// Decay of AdamW's second moment.
    pub adam_beta2: f64,
    /// Keeps AdamW's denominator away from zero.
    pub adam_epsilon: f64,
    /// LoRA+: the learning rate of each `B` is this many times that of its `A`,
    /// which stays `learning_rate`. PEFT's `create_loraplus_optimizer` takes it
    /// under this name; 16 is a common choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_ratio: Option<f64>,
    /// Gradients are scaled down to this norm; zero leaves them alone.
    pub max_grad_norm: f64,
    /// Seed of the adapter's first values, of dropout and of noise. The order of
    /// the examples is the source's.
    pub seed: u64,
    /// Keep only each block's input and run the block again on the way back:
    /// the same numbers, a third more work, a fraction of the memory.
    pub gradient_checkpointing: bool,
    /// Noise on the embeddings while training: uniform up to
    /// `neftune_noise_alpha / √(tokens · hidden size)` of each example; 5 is
    /// usual.
    pub neftune_noise_alpha: Option<f64>,
    /// Multiply with the frozen weights in bf16, as transformers does under
    /// this name: half their memory, and on processors that multiply bf16 twice
    /// the speed. The adapter and everything else stay in f32.
    pub bf16: bool,
    /// Train in f16 on a GPU, for those that came before bf16: the loss is multiplied with a power of two, as large as
    /// does not overflow, and a step that does overflow changes nothing, as in transformers under this name.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fp16: bool,
    /// Optimizer steps between evaluations on held-out examples, where some
    /// are given; without it they are evaluated at the end only.
    pub eval_steps: Option<u64>,
    /// Examples per evaluation batch. The figures do not depend on it.
    pub per_device_eval_batch_size: u32,
    /// Keep the adapter of the evaluation with the lowest loss instead of the
    /// last one.
    pub load_best_model_at_end: bool,
    /// Stop after this many evaluations in a row without a better loss.
    pub early_stopping_patience: Option<u32>,
    /// How much lower a loss must be to count as better.
    pub early_stopping_threshold: f64,
    /// Optimizer steps between checkpoints.
    pub save_steps: u64,
    /// Checkpoints kept; older ones are deleted.
    pub save_total_limit: u32,
    /// Train even if the memory estimate says that it will not fit.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ignore_memory_estimate: bool,
}

/// The optimizers, by their `TrainingArguments.optim` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// AdamW as PyTorch computes it.
    AdamwTorch,
    /// Accepted for the sake of existing recipes: an adapter's moments are
    /// small, so they stay in f32 and the run is `adamw_torch`.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// Plain gradient descent.
    Sgd,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            learning_rate: 5e-5,
            num_train_epochs: 3.0,
            max_steps: None,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            packing: false,
            max_seq_len: 4096,
            packing_window: 4096,
            lr_scheduler_type: SchedulerType::Linear,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            optim: OptimizerKind::AdamwTorch,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            loraplus_lr_ratio: None,
            max_grad_norm: 1.0,
            seed: 42,
            gradient_checkpointing: false,
            neftune_noise_alpha: None,
            bf16: false,
            fp16: false,
            eval_steps: None,
            per_device_eval_batch_size: 8,
            load_best_model_at_end: false,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            save_steps: 500,
            save_total_limit: 2,
            ignore_memory_estimate: false,
        }
    }
}

impl TrainConfig {
    /// Refuses settings that no run could follow.
    ///
    /// # Errors
    /// [`Error::Config`] names the first bad field and what it may be.
    pub fn validate(&self) -> Result<()> {
        const COUNT: &str = "it must be at least one";
        const AMOUNT: &str = "it must be finite and not negative";
        const POSITIVE: &str = "it must be finite and positive";
        const DECAY: &str = "it must lie in [0, 1)";
        let count = |x: u64| (x as f64, x > 0, COUNT);
        let amount = |x: f64| (x, x.is_finite() && x >= 0.0, AMOUNT);
        let positive = |x: f64| (x, x.is_finite() && x > 0.0, POSITIVE);
        let decay = |x: f64| (x, (0.0..1.0).contains(&x), DECAY);
        let ratio = |x: f64| (x, (0.0..=1.0).contains(&x), "it must lie in [0, 1]");
        let rules = [
            ("learning_rate", amount(self.learning_rate)),
            ("num_train_epochs", positive(self.num_train_epochs)),
            ("max_steps", count(self.max_steps.unwrap_or(1))),
            (
                "per_device_train_batch_size",
                count(self.per_device_train_batch_size.into()),
            ),
            (
                "gradient_accumulation_steps",
                count(self.gradient_accumulation_steps.into()),
            ),
            ("max_seq_len", count(self.max_seq_len.into())),
            ("packing_window", count(self.packing_window.into())),
            ("warmup_ratio", ratio(self.warmup_ratio)),
            ("weight_decay", amount(self.weight_decay)),
            ("adam_beta1", decay(self.adam_beta1)),
            ("adam_beta2", decay(self.adam_beta2)),
            ("adam_epsilon", positive(self.adam_epsilon)),
            (
                "loraplus_lr_ratio",
                positive(self.loraplus_lr_ratio.unwrap_or(1.0)),
            ),
            ("max_grad_norm", amount(self.max_grad_norm)),
            (
                "neftune_noise_alpha",
                amount(self.neftune_noise_alpha.unwrap_or(0.0)),
            ),
            ("eval_steps", count(self.eval_steps.unwrap_or(1))),
            (
                "per_device_eval_batch_size",
                count(self.per_device_eval_batch_size.into()),
            ),
            (
                "early_stopping_patience",
                count(self.early_stopping_patience.unwrap_or(1).into()),
            ),
            (
                "early_stopping_threshold",
                amount(self.early_stopping_threshold),
            ),
            (
                "fp16",
                (1.0, !(self.fp16 && self.bf16), "not both bf16 and fp16"),
            ),
            ("save_steps", count(self.save_steps)),
            ("save_total_limit", count(self.save_total_limit.into())),
        ];
        match rules.into_iter().find(|(_, (_, ok, _))| !ok) {
            Some((field, (value, _, expected))) => Err(Error::Config {
                field,
                value: value.to_string(),
                expected,
            }),
            None => Ok(()),
        }
    }

    /// Refuses settings that follow from evaluations where there are none before the end.
    ///
    /// # Errors
    /// [`Error::Config`], as `EarlyStoppingCallback` and `TrainingArguments` of transformers refuse.
    pub(crate) fn check_evaluation(&self, has_held_out: bool) -> Result<()> {
        let wanted = [
            (
                "early_stopping_patience",
                self.early_stopping_patience
                    .map(|patience| patience.to_string()),
            ),
            (
                "load_best_model_at_end",
                self.load_best_model_at_end.then(|| "true".to_owned()),
            ),
        ];
        let evaluates = has_held_out && self.eval_steps.is_some();
        let unmet = wanted.into_iter().filter(|_| !evaluates);
        match unmet
            .filter_map(|(field, value)| Some((field, value?)))
            .next()
        {
            Some((field, value)) => Err(Error::Config {
                field,
                value,
                expected: "it needs eval_steps and held-out examples",
            }),
            None => Ok(()),
        }
    }

    /// The settings that decide the result, the others at their defaults: what
    /// a stage's key is made of.
    pub(crate) fn deciding(&self) -> Self {
        let Self {
            per_device_eval_batch_size,
            save_steps,
            save_total_limit,
            ignore_memory_estimate,
            ..
        } = Self::default();
        Self {
            per_device_eval_batch_size,
            save_steps,
            save_total_limit,
            ignore_memory_estimate,
            ..self.clone()
        }
    }

    /// What [`Decoder::load`](updraft_model::Decoder::load) is given for a run
    /// of these settings.
    pub fn dtype(&self) -> DType {
        match (self.bf16, self.fp16) {
            (true, _) => DType::BF16,
            (false, true) => DType::F16,
            (false, false) => DType::F32,
        }
    }

    /// How examples become micro-batches.
    pub fn batching(&self) -> Batching {
        let rows = self.per_device_train_batch_size as usize;
        if self.packing {
            Batching::Packed {
                rows,
                max_seq_len: self.max_seq_len,
                window: self.packing_window as usize,
            }
        } else {
            Batching::Examples { batch_size: rows }
        }
    }

    /// What the backward pass finds when it arrives at a block.
    pub fn activations(&self) -> Activations {
        if self.gradient_checkpointing {
            Activations::Recomputed
        } else {
            Activations::Stored
        }
    }

    /// The learning-rate schedule over `total_steps` optimizer steps.
    pub fn schedule(&self, total_steps: u64) -> Schedule {
        let from_ratio = (total_steps as f64 * self.warmup_ratio).ceil() as u64;
        let warmup_steps = if self.warmup_steps > 0 {
            self.warmup_steps
        } else {
            from_ratio
        };
        Schedule {
            kind: self.lr_scheduler_type,
            learning_rate: self.learning_rate,
            warmup_steps,
            total_steps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        TrainConfig::default().validate().expect("defaults");
    }

    #[test]
    fn a_bad_setting_is_named() {
        let cases: [(&str, TrainConfig); 5] = [
            (
                "learning_rate",
                TrainConfig {
                    learning_rate: f64::NAN,
                    ..Default::default()
                },
            ),
            (
                "num_train_epochs",
                TrainConfig {
                    num_train_epochs: 0.0,
                    ..Default::default()
                },
            ),
            (
                "max_steps",
                TrainConfig {
                    max_steps: Some(0),
                    ..Default::default()
                },
            ),
            (
                "adam_beta2",
                TrainConfig {
                    adam_beta2: 1.0,
                    ..Default::default()
                },
            ),
            (
                "gradient_accumulation_steps",
                TrainConfig {
                    gradient_accumulation_steps: 0,
                    ..Default::default()
                },
            ),
        ];
        for (expected, config) in cases {
            match config.validate() {
                Err(Error::Config { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_file_may_set_a_few_names_and_no_unknown_one() {
        let config: TrainConfig = serde_json::from_str(
            r#"{"learning_rate": 2e-4, "optim": "adamw_8bit", "lr_scheduler_type": "cosine", "max_steps": 60}"#,
        )
        .expect("TrainingArguments names");
        assert_eq!(config.optim, OptimizerKind::Adamw8bit);
        assert_eq!(config.max_steps, Some(60));
        let error =
            serde_json::from_str::<TrainConfig>(r#"{"lerning_rate": 1}"#).expect_err("a typo");
        assert!(error.to_string().contains("lerning_rate"), "{error}");
    }

    #[test]
    fn the_warmup_ratio_rounds_up_and_yields_to_steps() {
        let config = TrainConfig {
            warmup_ratio: 0.05,
            ..Default::default()
        };
        assert_eq!(config.schedule(101).warmup_steps, 6);
        let config = TrainConfig {
            warmup_steps: 5,
            ..config
        };
        assert_eq!(config.schedule(101).warmup_steps, 5);
    }
}
