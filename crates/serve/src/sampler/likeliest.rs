//! The likeliest of a whole vocabulary, found without sorting it.

use std::cmp::Ordering;

/// The likeliest token, ties by the lower id, if its logit is finite.
pub(super) fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best = (0, f32::NEG_INFINITY);
    for (&logit, id) in logits.iter().zip(0..) {
        if logit > best.1 {
            best = (id, logit);
        }
    }
    best.1.is_finite().then_some(best)
}

/// The fewest likeliest candidates whose weights reach `top_p` of the whole, best first.
pub(super) fn nucleus(mut candidates: Vec<(f64, u32)>, top_p: f64) -> Vec<(f64, u32)> {
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
pub(super) fn largest(logits: &[f32], count: usize) -> Vec<(f32, u32)> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
