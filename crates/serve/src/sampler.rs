//! One token from one row of logits: a pure function of the logits, the settings and the past.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::engine::TokenLogprobs;
use crate::rng;
use crate::sampling::SamplingParams;

/// How far a logit may lie below the one that `min_p` asks for and still be looked at exactly.
const SLACK: f64 = 1e-3;

/// What came before the token to choose.
#[derive(Debug, Clone, Copy)]
pub struct Past<'a> {
    /// Prompt and completion as penalties count them.
    pub seen: &'a Seen,
    /// The completion so far; its length is the step of the draw.
    pub generated: &'a [u32],
    /// Stop tokens that would come too early.
    pub early_stops: &'a [u32],
    /// Token sequences that are never completed.
    pub bad_words: &'a [Vec<u32>],
}

impl Past<'_> {
    /// Tokens that must not be chosen now.
    fn forbidden(&self) -> impl Iterator<Item = u32> {
        let ends = self.bad_words.iter().filter_map(|word| word.split_last());
        let begun = ends.filter(|(_, start)| self.generated.ends_with(start));
        let early = self.early_stops.iter();
        early.chain(begun.map(|(last, _)| last)).copied()
    }
}

/// How often each token was generated, and which ones the prompt has; kept along with a request,
/// because counting them anew for each token would be work that grows with its square.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// 0 is in the prompt only.
    counts: HashMap<u32, u32>,
    is_counted: bool,
}

impl Seen {
    /// Before the first token. Nothing is counted for settings without a penalty.
    #[must_use]
    pub fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let repetition = params.repetition_penalty != 1.0;
        let others = params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
        let prompt = if repetition { prompt } else { &[] };
        Self {
            counts: prompt.iter().map(|&id| (id, 0)).collect(),
            is_counted: repetition || others,
        }
    }

    /// One more token was generated.
    pub fn push(&mut self, id: u32) {
        if self.is_counted {
            *self.counts.entry(id).or_default() += 1;
        }
    }
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
    choose(&adjust(logits, params, past), params, past.generated.len())
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
        [] => largest(logits, top as usize),
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
        || !past.seen.counts.is_empty()
        || past.forbidden().next().is_some()
}

fn adjust(logits: &[f32], params: &SamplingParams, past: Past<'_>) -> Vec<f32> {
    let mut adjusted = match &*params.allowed_token_ids {
        [] => logits.to_vec(),
        allowed => {
            let mut only = vec![f32::NEG_INFINITY; logits.len()];
            for &id in allowed {
                if let (Some(kept), Some(logit)) =
                    (only.get_mut(id as usize), logits.get(id as usize))
                {
                    *kept = *logit;
                }
            }
            only
        }
    };
    let mut at = |id: u32, change: &dyn Fn(f32) -> f32| {
        if let Some(logit) = adjusted.get_mut(id as usize) {
            *logit = change(*logit);
        }
    };
    for &(id, bias) in &*params.logit_bias {
        at(id, &|logit| logit + bias);
    }
    for (&id, &count) in &past.seen.counts {
        at(id, &|logit| penalized(logit, count, params));
    }
    for id in past.forbidden() {
        at(id, &|_| f32::NEG_INFINITY);
    }
    adjusted
}

/// The logit of a token that was seen, and generated `count` times.
fn penalized(logit: f32, count: u32, params: &SamplingParams) -> f32 {
    let penalty = params.repetition_penalty;
    let repeated = if logit > 0.0 {
        logit / penalty
    } else {
        logit * penalty
    };
    match count {
        0 => repeated,
        count => repeated - (params.presence_penalty + params.frequency_penalty * count as f32),
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
    let weighed = |(logit, id)| (weight(logit), id);
    let is_kept = |(weight, _): &(f64, u32)| *weight >= keep; // Drops NaN too.
    // The exponential of a whole vocabulary is most of the work: where only a few are wanted, they
    // are found by their logits.
    let mut candidates: Vec<(f64, u32)> = match params.top_k as usize {
        0 => {
            let least = f64::from(max) + keep.ln() / inverse_temperature - SLACK;
            let near = logits.iter().copied().zip(0..);
            let near = near.filter(|(logit, _)| f64::from(*logit) >= least);
            near.map(weighed).filter(is_kept).collect()
        }
        count => {
            let few = largest(logits, count).into_iter();
            few.map(weighed).filter(is_kept).collect()
        }
    };
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

/// The `count` largest logits, best first, ties by the lower id. Each is compared once with the
/// least of those kept so far; few are moved.
fn largest(logits: &[f32], count: usize) -> Vec<(f32, u32)> {
    let count = count.min(logits.len());
    let mut kept: Vec<(f32, u32)> = Vec::with_capacity(2 * count);
    let mut least = f32::NEG_INFINITY;
    for (&logit, id) in logits.iter().zip(0..) {
        // What equals the least has a higher id than those kept. NaN is no logit.
        if logit > least && count > 0 {
            kept.push((logit, id));
            if kept.len() == 2 * count {
                kept.select_nth_unstable_by(count - 1, likelier);
                kept.truncate(count);
                least = kept[count - 1].0;
            }
        }
    }
    likeliest(kept, count)
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
    use std::sync::Arc;

    use super::*;

    /// After this prompt and completion.
    fn next(
        logits: &[f32],
        params: &SamplingParams,
        prompt: &[u32],
        generated: &[u32],
    ) -> Option<u32> {
        let mut seen = Seen::new(params, prompt);
        generated.iter().for_each(|&id| seen.push(id));
        let past = Past {
            seen: &seen,
            generated,
            early_stops: &[],
            bad_words: &[],
        };
        sample(logits, params, past)
    }

    fn first(logits: &[f32], params: &SamplingParams) -> Option<u32> {
        next(logits, params, &[], &[])
    }

    /// How often each of `n` tokens is drawn over many steps.
    fn frequencies(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
        let draws = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..draws {
            let params = SamplingParams {
                seed,
                ..params.clone()
            };
            counts[first(logits, &params).expect("finite") as usize] += 1.0;
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
        assert_eq!(first(&[0.0, 2.0, 2.0], &params), Some(1));
        assert_eq!(first(&[f32::NAN, 1.0, f32::NEG_INFINITY], &params), Some(1));
    }

    #[test]
    fn a_model_that_broke_is_noticed() {
        for params in [SamplingParams::greedy(), SamplingParams::seeded(1)] {
            assert_eq!(first(&[f32::NAN; 3], &params), None);
            assert_eq!(first(&[f32::NEG_INFINITY; 3], &params), None);
            assert_eq!(first(&[0.0, f32::INFINITY], &params), None);
            assert_eq!(first(&[], &params), None);
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

    /// As sorting all of them would have it, for ties, for nothing at all, and for what is no number.
    #[test]
    fn the_largest_are_found_in_one_pass() {
        let logits: Vec<f32> = (0..5000)
            .map(|at| match at % 97 {
                0 => f32::NAN,
                1 => f32::NEG_INFINITY,
                _ => (crate::rng::uniform(3, at) * 40.0).round() as f32 - 20.0,
            })
            .collect();
        let mut sorted: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
        sorted.retain(|(logit, _)| logit.is_finite());
        sorted.sort_unstable_by(likelier);
        for count in [0, 1, 2, 20, 1000, 4000, 5000, usize::MAX] {
            let expected = &sorted[..count.min(sorted.len())];
            assert_eq!(largest(&logits, count), expected, "{count}");
        }
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
            assert_eq!(first(&logits(), &params), Some(0), "{params:?}");
        }
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let greedy = SamplingParams::greedy();
        let check = |params: SamplingParams, logits: &[f32], expected| {
            let chosen = next(logits, &params, &[0], &[1, 1]);
            assert_eq!(chosen, Some(expected), "{params:?}");
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
                logit_bias: Arc::from([(2, 5.0)]),
                ..greedy
            },
            &[1.0, 2.0, 0.5],
            2,
        );
    }

    /// Early stops, the ends of bad words that have begun, and whatever is not allowed.
    #[test]
    fn what_is_forbidden_is_not_chosen() {
        let words = [vec![2], vec![7, 1], vec![8, 0]];
        let chosen = |early_stops: &[u32], generated: &[u32], allowed: &[u32]| {
            let params = SamplingParams {
                allowed_token_ids: allowed.into(),
                ..SamplingParams::greedy()
            };
            let past = Past {
                seen: &Seen::default(),
                generated,
                early_stops,
                bad_words: &words,
            };
            sample(&[1.0, 2.0, 3.0, 0.5], &params, past)
        };
        assert_eq!(chosen(&[], &[], &[]), Some(1), "a word of one token");
        assert_eq!(chosen(&[1], &[], &[]), Some(0));
        assert_eq!(chosen(&[], &[7], &[]), Some(0), "the word has begun");
        assert_eq!(chosen(&[], &[8], &[]), Some(1));
        assert_eq!(chosen(&[], &[], &[3, 0, 3, 99]), Some(0));
        assert_eq!(chosen(&[0], &[], &[0, 2]), None, "nothing is left");
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
