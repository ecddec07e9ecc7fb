//! One token from one row of logits: a pure function of the logits, the settings and the past.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use crate::engine::TokenLogprobs;
use crate::rng;
use crate::sampling::SamplingParams;

/// What came before the token to choose.
#[derive(Debug, Clone, Copy)]
pub struct Past<'a> {
    /// The prompt.
    pub prompt: &'a [u32],
    /// The completion so far; its length is the step of the draw.
    pub generated: &'a [u32],
    /// Tokens that must not be chosen now.
    pub forbidden: &'a [u32],
}

/// Chooses a token; `None` if no logit is finite, which only a broken model gives.
///
/// # Shapes
/// `logits: [V]`
#[must_use]
pub fn sample(logits: &[f32], params: &SamplingParams, past: Past<'_>) -> Option<u32> {
    if !changes_logits(params, past) {
        return choose(logits, params, past.generated.len());
    }
    let mut adjusted = logits.to_vec();
    adjust(&mut adjusted, params, past);
    choose(&adjusted, params, past.generated.len())
}

/// Whether a row of logits has a likeliest token, which only a broken model's has not.
pub(crate) fn is_sound(logits: &[f32]) -> bool {
    argmax(logits).is_some()
}

/// The log-probability of `id`, and those of the `top` likeliest tokens, ties by the lower id, or
/// of the `named` ones if there are any.
///
/// # Shapes
/// `logits: [V]`
#[must_use]
pub fn token_logprobs(logits: &[f32], id: u32, top: u32, named: &[u32]) -> TokenLogprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    let logit = |id: u32| {
        logits
            .get(id as usize)
            .copied()
            .unwrap_or(f32::NEG_INFINITY)
    };
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let top = match named {
        [] => likeliest(logits.iter().copied().zip(0..).collect(), top as usize),
        named => named.iter().map(|&id| (logit(id), id)).collect(),
    };
    let own = logit(id);
    TokenLogprobs {
        logprob: logprob(own),
        rank: 1 + logits.iter().filter(|&&other| other > own).count() as u32,
        top: top
            .into_iter()
            .map(|(logit, id)| (id, logprob(logit)))
            .collect(),
    }
}

fn changes_logits(params: &SamplingParams, past: Past<'_>) -> bool {
    !params.logit_bias.is_empty()
        || !params.allowed_token_ids.is_empty()
        || !past.forbidden.is_empty()
        || params.repetition_penalty != 1.0
        || params.frequency_penalty != 0.0
        || params.presence_penalty != 0.0
}

fn adjust(logits: &mut [f32], params: &SamplingParams, past: Past<'_>) {
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit += bias;
        }
    }
    if params.repetition_penalty != 1.0 {
        let seen: BTreeSet<u32> = past.prompt.iter().chain(past.generated).copied().collect();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                let penalty = params.repetition_penalty;
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
    }
    if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
        let mut counts: BTreeMap<u32, f32> = BTreeMap::new();
        past.generated
            .iter()
            .for_each(|&id| *counts.entry(id).or_default() += 1.0);
        for (id, count) in counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit -= params.presence_penalty + params.frequency_penalty * count;
            }
        }
    }
    if !params.allowed_token_ids.is_empty() {
        let allowed: BTreeSet<usize> = params
            .allowed_token_ids
            .iter()
            .map(|&id| id as usize)
            .collect();
        for (id, logit) in logits.iter_mut().enumerate() {
            if !allowed.contains(&id) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    for &id in past.forbidden {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn choose(logits: &[f32], params: &SamplingParams, step: usize) -> Option<u32> {
    let (best, max) = argmax(logits)?;
    if params.is_greedy() {
        return Some(best);
    }
    let inverse_temperature = 1.0 / f64::from(params.temperature);
    let weight = |logit: f32| (f64::from(logit - max) * inverse_temperature).exp();
    let keep = f64::from(params.min_p).max(f64::MIN_POSITIVE); // The likeliest weighs 1.
    let mut candidates: Vec<(f64, u32)> = logits
        .iter()
        .zip(0..)
        .map(|(&logit, id)| (weight(logit), id))
        .filter(|(weight, _)| *weight >= keep) // Drops NaN too.
        .collect();
    if params.top_k > 0 {
        candidates = likeliest(candidates, params.top_k as usize);
    }
    if params.top_p < 1.0 {
        candidates = nucleus(candidates, f64::from(params.top_p));
    }
    draw(&candidates, rng::uniform(params.seed, step as u64)).or(Some(best))
}

/// The likeliest token, ties by the lower id, if its logit is finite.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best = (0, f32::NEG_INFINITY);
    for (&logit, id) in logits.iter().zip(0..) {
        if logit > best.1 {
            best = (id, logit);
        }
    }
    best.1.is_finite().then_some(best)
}

/// The fewest likeliest candidates whose weights reach `top_p` of the whole, best first.
fn nucleus(mut candidates: Vec<(f64, u32)>, top_p: f64) -> Vec<(f64, u32)> {
    let goal = top_p * candidates.iter().map(|(weight, _)| weight).sum::<f64>();
    // A nucleus is nearly always small: look among a few before sorting a whole vocabulary.
    let mut count = 64;
    loop {
        let all = count >= candidates.len();
        if !all {
            candidates.select_nth_unstable_by(count, likelier);
        }
        let head = &candidates[..count.min(candidates.len())];
        if all || head.iter().map(|(weight, _)| weight).sum::<f64>() >= goal {
            candidates.truncate(count);
            break;
        }
        count *= 8;
    }
    candidates.sort_unstable_by(likelier);
    let mut sum = 0.0;
    let last = candidates.iter().position(|(weight, _)| {
        sum += weight;
        sum >= goal
    });
    candidates.truncate(last.map_or(candidates.len(), |last| last + 1));
    candidates
}

/// The `count` likeliest candidates, best first.
fn likeliest<W: PartialOrd + Copy>(mut candidates: Vec<(W, u32)>, count: usize) -> Vec<(W, u32)> {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, likelier);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(likelier);
    candidates
}

fn likelier<W: PartialOrd>(a: &(W, u32), b: &(W, u32)) -> Ordering {
    b.0.partial_cmp(&a.0)
        .unwrap_or(Ordering::Equal)
        .then(a.1.cmp(&b.1))
}

fn draw(candidates: &[(f64, u32)], uniform: f64) -> Option<u32> {
    let mut rest = uniform * candidates.iter().map(|(weight, _)| weight).sum::<f64>();
    for &(weight, id) in candidates {
        if rest < weight {
            return Some(id);
        }
        rest -= weight;
    }
    candidates.last().map(|&(_, id)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Past<'static> = Past {
        prompt: &[],
        generated: &[],
        forbidden: &[],
    };

    /// How often each of `n` tokens is drawn over many steps.
    fn frequencies(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
        let draws = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..draws {
            let params = SamplingParams {
                seed,
                ..params.clone()
            };
            counts[sample(logits, &params, NOTHING).expect("finite") as usize] += 1.0;
        }
        counts.iter().map(|count| count / draws as f64).collect()
    }

    fn close(actual: &[f64], expected: &[f64]) {
        let near = actual
            .iter()
            .zip(expected)
            .all(|(a, e)| (a - e).abs() < 0.015);
        assert!(near, "{actual:?} is not {expected:?}");
    }

    /// Logits of probabilities 0.5, 0.25, 0.15, 0.1.
    fn logits() -> Vec<f32> {
        [0.5f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_a_tie() {
        let params = SamplingParams::greedy();
        assert_eq!(sample(&[0.0, 2.0, 2.0], &params, NOTHING), Some(1));
        assert_eq!(
            sample(&[f32::NAN, 1.0, f32::NEG_INFINITY], &params, NOTHING),
            Some(1)
        );
    }

    #[test]
    fn a_model_that_broke_is_noticed() {
        for params in [SamplingParams::greedy(), SamplingParams::seeded(1)] {
            assert_eq!(sample(&[f32::NAN; 3], &params, NOTHING), None);
            assert_eq!(sample(&[f32::NEG_INFINITY; 3], &params, NOTHING), None);
            assert_eq!(sample(&[0.0, f32::INFINITY], &params, NOTHING), None);
            assert_eq!(sample(&[], &params, NOTHING), None);
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        let base = SamplingParams::seeded(0);
        close(&frequencies(&logits(), &base), &[0.5, 0.25, 0.15, 0.1]);
        let half = SamplingParams {
            temperature: 0.5,
            ..base.clone()
        };
        let squares = 0.25 + 0.0625 + 0.0225 + 0.01;
        let expected = [
            0.25 / squares,
            0.0625 / squares,
            0.0225 / squares,
            0.01 / squares,
        ];
        close(&frequencies(&logits(), &half), &expected);
        let two = SamplingParams {
            top_k: 2,
            ..base.clone()
        };
        close(
            &frequencies(&logits(), &two),
            &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        );
        let nucleus = SamplingParams {
            top_p: 0.6,
            ..base.clone()
        };
        close(
            &frequencies(&logits(), &nucleus),
            &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        );
        let likely = SamplingParams {
            min_p: 0.25,
            ..base
        };
        close(
            &frequencies(&logits(), &likely),
            &[0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0],
        );
    }

    #[test]
    fn a_wide_nucleus_is_found_beyond_the_first_few() {
        let flat = vec![0.0f32; 1000];
        let weights: Vec<_> = flat.iter().map(|_| 1.0).zip(0..).collect();
        let kept = nucleus(weights, 0.5);
        assert_eq!(kept.len(), 500);
        assert_eq!(kept.last(), Some(&(1.0, 499)), "ties keep the lower ids");
    }

    #[test]
    fn the_extremes_are_the_likeliest_token() {
        let base = SamplingParams::seeded(9);
        for params in [
            SamplingParams {
                temperature: 1e-7,
                ..base.clone()
            },
            SamplingParams {
                top_k: 1,
                ..base.clone()
            },
            SamplingParams {
                top_p: 1e-6,
                ..base.clone()
            },
            SamplingParams { min_p: 1.0, ..base },
        ] {
            assert_eq!(sample(&logits(), &params, NOTHING), Some(0), "{params:?}");
        }
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let greedy = SamplingParams::greedy();
        let past = Past {
            prompt: &[0],
            generated: &[1, 1],
            forbidden: &[],
        };
        let check = |params: SamplingParams, logits: &[f32], expected| {
            assert_eq!(sample(logits, &params, past), Some(expected), "{params:?}");
        };
        check(greedy.clone(), &[1.0, 2.0, 0.5], 1);
        // 2.0 - 2 x 0.6 = 0.8 falls behind 1.0; presence counts once, and prompts do not count.
        check(
            SamplingParams {
                frequency_penalty: 0.6,
                ..greedy.clone()
            },
            &[1.0, 2.0, 0.5],
            0,
        );
        check(
            SamplingParams {
                presence_penalty: 1.1,
                ..greedy.clone()
            },
            &[1.0, 2.0, 0.5],
            0,
        );
        check(
            SamplingParams {
                presence_penalty: 0.6,
                ..greedy.clone()
            },
            &[1.0, 2.0, 0.5],
            1,
        );
        // Repetition does count the prompt, and pushes negative logits further down.
        check(
            SamplingParams {
                repetition_penalty: 4.0,
                ..greedy.clone()
            },
            &[1.0, 1.9, 0.5],
            2,
        );
        check(
            SamplingParams {
                repetition_penalty: 4.0,
                ..greedy.clone()
            },
            &[-1.0, -1.1, -2.0],
            2,
        );
        check(
            SamplingParams {
                logit_bias: vec![(2, 5.0)],
                ..greedy
            },
            &[1.0, 2.0, 0.5],
            2,
        );
        let forbidden = Past {
            forbidden: &[1],
            ..past
        };
        assert_eq!(
            sample(&[1.0, 2.0], &SamplingParams::greedy(), forbidden),
            Some(0)
        );
    }

    #[test]
    fn logprobs_are_of_the_whole_distribution() {
        let logprobs = token_logprobs(&logits(), 2, 2, &[]);
        assert!((logprobs.logprob - 0.15f32.ln()).abs() < 1e-6);
        assert_eq!(
            logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [0, 1]
        );
        assert!((logprobs.top[1].1 - 0.25f32.ln()).abs() < 1e-6);
        assert!(token_logprobs(&logits(), 0, 0, &[]).top.is_empty());
        assert_eq!(token_logprobs(&logits(), 0, 9, &[]).top.len(), 4);
    }
}
