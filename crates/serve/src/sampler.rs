//! One token from one row of logits: a pure function of the logits, the settings and the past.

use std::collections::HashMap;

use self::likeliest::{argmax, largest, nucleus};
use crate::engine::TokenLogprobs;
use crate::rng;
use crate::sampling::SamplingParams;

mod likeliest;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub(crate) mod on_gpu;

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
mod tests;
