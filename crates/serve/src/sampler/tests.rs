//! Choices from logits that are known.

use std::sync::Arc;

use super::*;

/// After this prompt and completion.
fn next(logits: &[f32], params: &SamplingParams, prompt: &[u32], generated: &[u32]) -> Option<u32> {
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
