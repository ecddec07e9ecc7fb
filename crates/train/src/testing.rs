//! Small worlds for this crate's tests.

use std::ops::Range;
use std::time::Duration;

use updraft_chat::Example;

use crate::{StepRecord, TrainReport};

/// An example of this many tokens whose second half is trained.
pub(crate) fn example(tokens: usize) -> Example {
    let input_ids = (0..tokens as u32)
        .map(|i| (i * 31 + tokens as u32 * 17) % 64)
        .collect();
    Example {
        input_ids,
        loss_spans: span((tokens as u32 / 2).max(1)..tokens as u32),
    }
}

/// One loss span. (A range in `vec![]` looks like a slip to clippy.)
pub(crate) fn span(span: Range<u32>) -> Vec<Range<u32>> {
    std::iter::once(span).collect()
}

/// Records of a run whose loss falls from 4, with awkward fractions.
pub(crate) fn records(count: u64) -> Vec<StepRecord> {
    (1..=count)
        .map(|step| StepRecord {
            step,
            epoch: step as f64 / 7.0,
            loss: 4.0 / (step as f64).sqrt() + 0.01 * (step as f64).sin(),
            learning_rate: 2e-4 / step as f64,
            grad_norm: 1.0 / 3.0 / step as f64,
            tokens: 96,
            trained_tokens: 31,
            examples: 2,
            overflowed: false,
        })
        .collect()
}

/// The report of a run of this many steps that took two seconds.
pub(crate) fn report(steps: u64) -> TrainReport {
    TrainReport {
        steps,
        epoch: 1.0,
        train_loss: 1.25,
        eval: None,
        tokens: 96 * steps,
        trained_tokens: 31 * steps,
        examples: 2 * steps,
        train_runtime: Duration::from_secs(2),
        train_samples_per_second: steps as f64,
        train_steps_per_second: 0.5 * steps as f64,
        train_tokens_per_second: 48.0 * steps as f64,
        flops_per_second: 1e9,
        packing_fill_rate: None,
        mfu: Some(0.5),
        peak_memory_bytes: Some(1 << 30),
        peak_gpu_memory_bytes: None,
        resumed_from: 0,
    }
}
