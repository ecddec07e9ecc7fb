//! Proof that what was written is what was trained: the same tokens through
//! both, logits compared.

use safetensors::Dtype;
use updraft_chat::Example;
use updraft_model::{Adapter, Batch, Decoder, Weights};

use crate::{Error, Result};

/// Tokens of the probe: enough to pass through attention, few enough to be
/// nothing beside the training.
const PROBE_TOKENS: usize = 64;
/// Rows of logits compared.
const PROBE_ROWS: usize = 8;

/// What both models are asked.
#[derive(Debug, Clone)]
pub(crate) struct Probe {
    batch: Batch,
}

impl Probe {
    /// The beginning of an example.
    pub(crate) fn new(example: &Example) -> Self {
        let ids = &example.input_ids[..example.len().min(PROBE_TOKENS)];
        let mut batch = Batch::packed([ids]);
        let rows = 0..ids.len() as u32;
        batch.logit_rows = rows.skip(ids.len().saturating_sub(PROBE_ROWS)).collect();
        Self { batch }
    }

    /// The answer of a decoder, with or without an adapter.
    pub(crate) fn logits(&self, decoder: &Decoder, adapter: Option<&Adapter>) -> Result<Vec<f32>> {
        let mut batch = self.batch.clone();
        batch.adapters = vec![adapter.map(|_| 0)];
        let own = adapter.map(|adapter| decoder.with_saved_modules(adapter));
        let own = own.transpose()?;
        let decoder = own.as_ref().unwrap_or(decoder);
        let hidden = decoder.forward(&batch, adapter.as_slice(), None)?;
        Ok(decoder.logits(&hidden)?.to_vec()?)
    }
}

/// Checks `‖actual − expected‖ ≤ tolerance · ‖expected‖`.
///
/// # Errors
/// [`Error::Verification`].
pub(crate) fn compare(
    artifact: &'static str,
    expected: &[f32],
    actual: &[f32],
    tolerance: f64,
) -> Result<()> {
    let difference = difference(expected, actual);
    if expected.len() == actual.len() && difference <= tolerance {
        Ok(())
    } else {
        Err(Error::Verification {
            artifact,
            difference,
            tolerance,
        })
    }
}

/// `‖actual − expected‖ / ‖expected‖`
pub(crate) fn difference(expected: &[f32], actual: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| {
        values.map(|value| value * value).sum::<f64>().sqrt()
    };
    let pairs = expected.iter().zip(actual);
    let distance = norm(&mut pairs.map(|(&e, &a)| f64::from(e) - f64::from(a)));
    distance / norm(&mut expected.iter().map(|&e| f64::from(e))).max(f64::MIN_POSITIVE)
}

/// How far a merged model's logits may lie from base and adapter, once every merged weight is known
/// to be the right one.
///
/// In f32 `1e-4`: only the order of sums differs. What 16-bit types round away has no bound that a
/// wrong weight would pass and a right one not: there the logits need only be numbers.
pub(crate) fn tolerance(weights: &Weights) -> Result<f64> {
    for name in weights.names() {
        if matches!(weights.dtype(name)?, Dtype::BF16 | Dtype::F16) {
            return Ok(f64::INFINITY);
        }
    }
    Ok(1e-4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_relative_and_a_nan_is_one() {
        compare("fused", &[3.0, 4.0], &[3.0, 4.000_1], 1e-4).expect("close");
        for actual in [[3.0, 4.1], [3.0, f32::NAN]] {
            let error = compare("fused", &[3.0, 4.0], &actual, 1e-4).expect_err("far");
            assert!(
                matches!(
                    error,
                    Error::Verification {
                        artifact: "fused",
                        ..
                    }
                ),
                "{error}"
            );
        }
        let no_number = [3.0, f32::NAN];
        compare("fused", &[3.0, 4.0], &no_number, f64::INFINITY).expect_err("no number");
    }
}
