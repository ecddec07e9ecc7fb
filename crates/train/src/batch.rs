//! From the examples of a micro-batch to what the decoder takes: documents
//! laid end to end, divided into parts that are computed side by side.

use std::cmp::Reverse;

use updraft_chat::Example;
use updraft_kernels::noise::derive;
use updraft_model::Part;

use crate::{Error, Result};

/// Divides a micro-batch into at most `num_parts` parts of about equally many
/// tokens, whole documents each.
///
/// Documents keep their order within a part; one without a trained token says
/// nothing and is left out. The division depends on the arguments alone, which
/// keeps a run repeatable for a given number of threads.
///
/// # Errors
/// [`Error::TokenOutOfRange`] for an id the model does not know,
/// [`Error::SpanOutOfRange`] for a loss span outside its example.
pub fn parts(examples: &[Example], num_parts: usize, vocab_size: usize) -> Result<Vec<Part>> {
    noisy_parts(examples, num_parts, vocab_size, Noise::default())
}

/// What is drawn at random for a micro-batch.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Noise {
    /// The seed of the optimizer step.
    pub(crate) step_seed: u64,
    /// Examples of the step before this micro-batch, so that it does not matter how a step is cut.
    pub(crate) first_example: u64,
    /// As [`Part::neftune_noise_alpha`].
    pub(crate) neftune_noise_alpha: f64,
}

/// [`parts`] that know what to drop and what to add.
pub(crate) fn noisy_parts(
    examples: &[Example],
    num_parts: usize,
    vocab_size: usize,
    noise: Noise,
) -> Result<Vec<Part>> {
    for example in examples {
        check(example, vocab_size)?;
    }
    let mut longest_first: Vec<usize> = (0..examples.len())
        .filter(|&index| examples[index].trained_tokens() > 0)
        .collect();
    longest_first.sort_by_key(|&index| (Reverse(examples[index].len()), index));

    let num_parts = num_parts.clamp(1, longest_first.len().max(1));
    let mut members = vec![Vec::new(); num_parts];
    let mut loads = vec![0; num_parts];
    for index in longest_first {
        let (lightest, load) = loads
            .iter_mut()
            .enumerate()
            .min_by_key(|(_, load)| **load)
            .expect("at least one part");
        *load += examples[index].len();
        members[lightest].push(index);
    }
    Ok(members
        .into_iter()
        .filter(|members| !members.is_empty())
        .map(|mut members| {
            members.sort_unstable();
            part(examples, &members, noise)
        })
        .collect())
}

fn part(examples: &[Example], members: &[usize], noise: Noise) -> Part {
    let mut part = Part {
        neftune_noise_alpha: noise.neftune_noise_alpha,
        ..Part::default()
    };
    for &index in members {
        let example = &examples[index];
        let of_step = noise.first_example + index as u64;
        part.seeds.push(derive(noise.step_seed, of_step));
        let spans: Vec<_> = example
            .loss_spans
            .iter()
            .map(|span| span.start as usize..span.end as usize)
            .collect();
        part.push(&example.input_ids, &spans);
    }
    part
}

fn check(example: &Example, vocab_size: usize) -> Result<()> {
    if let Some(&token) = example
        .input_ids
        .iter()
        .find(|&&token| token as usize >= vocab_size)
    {
        return Err(Error::TokenOutOfRange { token, vocab_size });
    }
    let tokens = example.len();
    match example
        .loss_spans
        .iter()
        .find(|span| span.start > span.end || span.end as usize > tokens)
    {
        Some(span) => Err(Error::SpanOutOfRange {
            start: span.start,
            end: span.end,
            tokens,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{example, span};

    #[test]
    fn parts_are_balanced_and_keep_every_label() {
        let examples: Vec<Example> = [10, 3, 4, 9, 2].map(example).to_vec();
        let parts = parts(&examples, 2, 64).expect("parts");
        let sizes: Vec<usize> = parts.iter().map(|part| part.batch.num_tokens()).collect();
        assert_eq!(sizes, [15, 13]);
        let labels: usize = parts.iter().map(Part::num_labels).sum();
        assert_eq!(
            labels as u32,
            examples.iter().map(Example::trained_tokens).sum::<u32>()
        );
        assert_eq!(
            parts[0].batch.seq_starts,
            [0, 10, 13, 15],
            "documents in order"
        );
    }

    #[test]
    fn labels_are_shifted_and_the_first_token_is_never_one() {
        let example = Example {
            input_ids: vec![5, 6, 7, 8],
            loss_spans: vec![0..2, 3..4],
        };
        let parts = parts(&[example], 4, 64).expect("one part");
        assert_eq!(parts.len(), 1);
        assert_eq!(parts[0].batch.logit_rows, [0, 2]);
        assert_eq!(parts[0].labels, [6, 8]);
    }

    #[test]
    fn what_the_model_cannot_take_is_refused() {
        let error = parts(&[example(8)], 1, 10).expect_err("a token beyond the vocabulary");
        assert!(
            matches!(error, Error::TokenOutOfRange { vocab_size: 10, .. }),
            "{error}"
        );
        let beyond = Example {
            input_ids: vec![1, 2],
            loss_spans: span(1..3),
        };
        let error = parts(&[beyond], 1, 10).expect_err("a span beyond the example");
        assert!(
            matches!(
                error,
                Error::SpanOutOfRange {
                    start: 1,
                    end: 3,
                    tokens: 2
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn a_micro_batch_without_trained_tokens_has_no_parts() {
        let silent = Example {
            input_ids: vec![1, 2],
            loss_spans: vec![],
        };
        assert!(parts(&[silent], 2, 10).expect("nothing wrong").is_empty());
    }
}
