//! The loss on examples that are held out of training, and what follows from it.

use serde::{Deserialize, Serialize};
use updraft_model::{Adapter, Decoder};
use updraft_store::CancelToken;

use crate::batch::parts;
use crate::source::ExampleSource;
use crate::{Error, Result, TrainConfig};

/// What one evaluation found, without any time: a rerun gives the same.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// The optimizer step after which it was done.
    pub step: u64,
    /// Passes over the training data done by then.
    pub epoch: f64,
    /// Mean cross-entropy over all held-out trained tokens, in nats.
    pub eval_loss: f64,
    /// Held-out tokens that count towards it.
    pub trained_tokens: u64,
}

impl EvalRecord {
    /// `e^eval_loss`: among how many equally likely tokens the model hesitates.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.eval_loss.exp()
    }
}

/// Mean cross-entropy over a source's trained tokens, and how many those are.
///
/// The sum runs over all tokens before it is divided, so the figure does not depend on
/// `batch_size`, which decides how much memory is taken.
///
/// # Errors
/// [`Error::NothingToLearn`] when no token counts; [`Error::Cancelled`] within a batch of one of
/// `cancels` being cancelled; else as the decoder's loss.
pub fn evaluate(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    held_out: &dyn ExampleSource,
    batch_size: usize,
    cancels: &[CancelToken],
) -> Result<(f64, u64)> {
    let (mut sum, mut tokens) = (0.0, 0);
    let mut examples = held_out.open(0, 0)?;
    loop {
        if cancels.iter().any(CancelToken::is_cancelled) {
            return Err(Error::Cancelled { step: 0 });
        }
        let batch: Vec<_> = examples.by_ref().take(batch_size).collect::<Result<_>>()?;
        if batch.is_empty() {
            break;
        }
        let parts = parts(&batch, decoder.num_parts(), decoder.config().vocab_size)?;
        if !parts.is_empty() {
            sum += decoder
                .threads()
                .install(|| decoder.loss(&parts, adapter))?;
        }
        tokens += batch
            .iter()
            .map(|example| u64::from(example.trained_tokens()))
            .sum::<u64>();
    }
    if tokens == 0 {
        let source_id = held_out.plan().id.clone();
        return Err(Error::NothingToLearn { source_id });
    }
    Ok((sum / tokens as f64, tokens))
}

/// The evaluation with the lowest loss, the earliest of equals; a loss that is no number is none.
pub fn best(evals: &[EvalRecord]) -> Option<&EvalRecord> {
    let numbers = evals.iter().filter(|eval| !eval.eval_loss.is_nan());
    numbers.reduce(|best, eval| {
        if eval.eval_loss < best.eval_loss {
            eval
        } else {
            best
        }
    })
}

/// Whether the last `early_stopping_patience` evaluations all failed to beat the best one before
/// them by more than `early_stopping_threshold`, as transformers' `EarlyStoppingCallback` counts.
pub(crate) fn patience_is_out(evals: &[EvalRecord], config: &TrainConfig) -> bool {
    let Some(patience) = config.early_stopping_patience else {
        return false;
    };
    let (mut best, mut failures) = (f64::INFINITY, 0);
    for eval in evals {
        if best - eval.eval_loss > config.early_stopping_threshold {
            failures = 0;
        } else {
            failures += 1;
        }
        best = best.min(eval.eval_loss);
    }
    failures >= patience
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evals(losses: &[f64]) -> Vec<EvalRecord> {
        losses
            .iter()
            .zip(1..)
            .map(|(&eval_loss, step)| EvalRecord {
                step,
                epoch: 0.0,
                eval_loss,
                trained_tokens: 1,
            })
            .collect()
    }

    #[test]
    fn patience_counts_evaluations_in_a_row_that_did_not_help() {
        let config = |threshold| TrainConfig {
            early_stopping_patience: Some(2),
            early_stopping_threshold: threshold,
            ..TrainConfig::default()
        };
        let stops = |losses: &[f64], threshold| patience_is_out(&evals(losses), &config(threshold));
        assert!(!stops(&[], 0.0));
        assert!(!stops(&[3.0, 2.0, 1.0], 0.0));
        assert!(!stops(&[3.0, 3.5], 0.0));
        assert!(stops(&[3.0, 3.5, 3.0], 0.0), "an equal loss is no better");
        assert!(!stops(&[3.0, 3.5, 2.9, 3.1], 0.0), "the count starts anew");
        assert!(stops(&[3.0, 2.95, 2.92], 0.1), "too little better");
        assert!(!patience_is_out(
            &evals(&[1.0, 2.0, 3.0]),
            &TrainConfig::default()
        ));
    }

    #[test]
    fn the_best_is_the_lowest_and_earliest() {
        assert_eq!(
            best(&evals(&[3.0, 1.0, 2.0, 1.0])).map(|eval| eval.step),
            Some(2)
        );
        assert_eq!(best(&[]), None);
        let after_nan = evals(&[f64::NAN, 3.0, 2.0]);
        assert_eq!(best(&after_nan).map(|eval| eval.step), Some(3));
        let e = std::f64::consts::E;
        assert!((evals(&[1.0])[0].perplexity() - e).abs() < 1e-12);
    }
}
