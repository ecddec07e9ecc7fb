//! A request's settings as a GPU's sampler takes them.

use std::collections::BTreeMap;

use updraft_model::{Choice, Edit};

use super::Past;
use crate::rng;
use crate::sampling::SamplingParams;

/// The largest number below one.
const BELOW_ONE: f32 = 1.0 - f32::EPSILON / 2.0;

/// How a row's token is chosen on a GPU, and, added to `edits`, what changes of its logits first; `None` where the
/// settings name the only tokens allowed, which the host looks at.
///
/// The distribution is [`sample`](super::sample)'s. A draw may fall on another token: where few are kept, the host
/// walks through them by their weights and a GPU by their ids.
pub(crate) fn choice(
    row: u32,
    params: &SamplingParams,
    past: Past<'_>,
    edits: &mut Vec<Edit>,
) -> Option<Choice> {
    if !params.allowed_token_ids.is_empty() {
        return None;
    }
    let mut changes: BTreeMap<u32, Edit> = BTreeMap::new();
    let mut of = |id: u32, change: &dyn Fn(&mut Edit)| {
        let nothing = Edit {
            row,
            id,
            bias: 0.0,
            repetition: 1.0,
            penalty: 0.0,
        };
        change(changes.entry(id).or_insert(nothing));
    };
    for &(id, bias) in &*params.logit_bias {
        of(id, &|edit| edit.bias += bias);
    }
    for (&id, &count) in &past.seen.counts {
        of(id, &|edit| {
            edit.repetition = params.repetition_penalty;
            if count > 0 {
                edit.penalty = params.presence_penalty + params.frequency_penalty * count as f32;
            }
        });
    }
    for id in past.forbidden() {
        of(id, &|edit| edit.penalty = f32::INFINITY);
    }
    edits.extend(changes.into_values());
    let uniform = rng::uniform(params.seed, past.generated.len() as u64) as f32;
    Some(Choice {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        uniform: uniform.min(BELOW_ONE), // rounding may have made it one
    })
}

#[cfg(test)]
mod tests {
    use super::super::Seen;
    use super::*;

    fn past<'a>(seen: &'a Seen, generated: &'a [u32], early: &'a [u32]) -> Past<'a> {
        Past {
            seen,
            generated,
            early_stops: early,
            bad_words: &[],
        }
    }

    /// Applied one after the other they are what the host's sampler does to the logits.
    #[test]
    fn edits_are_what_the_host_changes() {
        let params = SamplingParams {
            temperature: 0.7,
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.2,
            logit_bias: vec![(2, 1.5), (5, -2.0), (2, 0.25)].into(),
            ..SamplingParams::seeded(9)
        };
        let mut seen = Seen::new(&params, &[1, 2]);
        let generated = [2, 3, 3];
        generated.iter().for_each(|&id| seen.push(id));
        let past = past(&seen, &generated, &[4, 2]);
        let logits: Vec<f32> = (0..8).map(|id| id as f32 - 3.5).collect();

        let mut edits = Vec::new();
        let choice = choice(3, &params, past, &mut edits).expect("nothing for the host alone");
        assert!((0.0..1.0).contains(&choice.uniform));
        let mut edited = logits.clone();
        for edit in &edits {
            assert_eq!(edit.row, 3);
            let x = edited[edit.id as usize] + edit.bias;
            let x = if x > 0.0 {
                x / edit.repetition
            } else {
                x * edit.repetition
            };
            edited[edit.id as usize] = x - edit.penalty;
        }
        assert_eq!(edited, super::super::adjust(&logits, &params, past));
        let mut ids: Vec<u32> = edits.iter().map(|edit| edit.id).collect();
        ids.dedup();
        assert_eq!(ids, [1, 2, 3, 4, 5], "each token once");
    }

    #[test]
    fn plain_settings_change_nothing_and_a_list_of_tokens_is_the_hosts() {
        let seen = Seen::default();
        let mut edits = Vec::new();
        let greedy = SamplingParams::greedy();
        let chosen = choice(0, &greedy, past(&seen, &[7], &[]), &mut edits);
        assert_eq!(chosen.map(|choice| choice.temperature), Some(0.0));
        assert!(edits.is_empty());
        let listed = SamplingParams {
            allowed_token_ids: vec![1].into(),
            ..greedy
        };
        let chosen = choice(0, &listed, past(&seen, &[7], &[3]), &mut edits);
        assert_eq!((chosen, edits.len()), (None, 0));
    }
}
