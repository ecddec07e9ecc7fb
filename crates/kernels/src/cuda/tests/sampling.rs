//! Tokens chosen from logits, against the rules in f64 on a sorted vocabulary.

use super::super::sampling::{Choice, Edit, sample};
use super::*;

const GREEDY: Choice = Choice {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    uniform: 0.0,
};
const PLAIN: Choice = Choice {
    temperature: 1.0,
    ..GREEDY
};
const INFINITY: f32 = f32::INFINITY;
const NAN: f32 = f32::NAN;

/// Rows of one length, chosen from by the kernel; they lie in wider rows, at addresses that are not aligned.
fn choose(gpu: &Gpu, rows: &[Vec<f32>], choices: &[Choice], edits: &[Edit]) -> Vec<Option<u32>> {
    let (vocab, stride) = (rows[0].len(), rows[0].len() + 3);
    let mut all = vec![NAN; rows.len() * stride];
    for (to, row) in all.chunks_mut(stride).zip(rows) {
        to[1..=vocab].copy_from_slice(row);
    }
    let mut logits = gpu.upload(&all).expect("memory");
    let mut mat = logits.mat_mut(rows.len(), stride).cols(1..vocab + 1);
    let chosen = sample(gpu, &mut mat, choices, edits).expect("launched");
    let again = sample(gpu, &mut mat, choices, &[]).expect("launched");
    assert_eq!(chosen, again, "two runs");
    chosen
}

/// The tokens that are kept, by id, and where the share of each begins and ends.
fn shares(row: &[f32], choice: &Choice) -> Vec<(u32, f64, f64)> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |x: f32| ((f64::from(x) - f64::from(max)) / f64::from(choice.temperature)).exp();
    let mut kept: Vec<(f32, u32)> = row.iter().copied().zip(0..).collect();
    kept.retain(|&(x, _)| weight(x) >= f64::from(choice.min_p).max(f64::MIN_POSITIVE));
    kept.sort_by(|a, b| b.0.partial_cmp(&a.0).expect("no NaN").then(a.1.cmp(&b.1)));
    if choice.top_k > 0 {
        kept.truncate(choice.top_k as usize);
    }
    if choice.top_p < 1.0 {
        let goal = f64::from(choice.top_p) * kept.iter().map(|&(x, _)| weight(x)).sum::<f64>();
        let mut sum = 0.0;
        let last = kept.iter().position(|&(x, _)| {
            sum += weight(x);
            sum >= goal
        });
        kept.truncate(last.map_or(kept.len(), |last| last + 1));
    }
    kept.sort_by_key(|&(_, id)| id);
    let all: f64 = kept.iter().map(|&(x, _)| weight(x)).sum();
    let mut end = 0.0;
    let share = |&(x, id): &(f32, u32)| {
        let begin = end;
        end += weight(x) / all;
        (id, begin, end)
    };
    kept.iter().map(share).collect()
}

/// Draws all over `[0, 1)` from a row: each falls in the share of the token that is chosen.
#[track_caller]
fn shares_agree(gpu: &Gpu, row: &[f32], choice: Choice, draws: usize) {
    let shares = shares(row, &choice);
    let mut choices: Vec<Choice> = (0..draws)
        .map(|draw| Choice {
            uniform: draw as f32 / draws as f32,
            ..choice
        })
        .collect();
    choices.push(Choice {
        uniform: 1.0 - f32::EPSILON / 2.0,
        ..choice
    });
    let chosen = choose(gpu, &vec![row.to_vec(); choices.len()], &choices, &[]);
    for (chosen, Choice { uniform, .. }) in chosen.into_iter().zip(&choices) {
        let chosen = chosen.expect("a finite logit");
        let at = shares.binary_search_by_key(&chosen, |&(id, ..)| id);
        let (_, begin, end) = shares[at.unwrap_or_else(|_| {
            panic!(
                "token {chosen} was dropped, {} are kept: {choice:?}",
                shares.len()
            )
        })];
        let uniform = f64::from(*uniform);
        assert!(
            begin - 1e-5 <= uniform && uniform <= end + 1e-5,
            "token {chosen} has {begin}..{end}, the draw is {uniform}: {choice:?}"
        );
    }
    // What is less likely than 2⁻⁴¹ is never drawn, and what is less than an f32 tells apart not by its middle.
    let likely = shares.iter().all(|(_, begin, end)| end - begin > 1e-6);
    let few: Vec<u32> = shares.iter().map(|&(id, ..)| id).collect();
    if few.len() < 4 && likely {
        let middle = |&(_, begin, end): &(u32, f64, f64)| Choice {
            uniform: ((begin + end) / 2.0) as f32,
            ..choice
        };
        let choices: Vec<Choice> = shares.iter().map(middle).collect();
        let chosen = choose(gpu, &vec![row.to_vec(); choices.len()], &choices, &[]);
        assert_eq!(chosen, few.into_iter().map(Some).collect::<Vec<_>>());
    }
}

/// Logits of a vocabulary whose tail is long: a few likely tokens, most far below.
fn logits(vocab: usize, seed: u64) -> Vec<f32> {
    let flat = random::<f32>(vocab, seed);
    flat.iter().map(|x| 6.0 * x + 4.0 * x.powi(9)).collect()
}

#[test]
fn the_largest_logit_is_the_greedy_choice() {
    for gpu in gpus() {
        let vocab = 1003;
        let mut ties = logits(vocab, 1);
        for id in [17, 901, 400] {
            ties[id] = 20.0;
        }
        let mut one = vec![f32::NEG_INFINITY; vocab];
        one[77] = -3e38;
        let mut zeros = vec![-1.0; vocab];
        (zeros[5], zeros[1000]) = (-0.0, 0.0);
        let mut holes = logits(vocab, 2);
        (holes[0], holes[3], holes[1002]) = (NAN, -NAN, 9e9);
        let mut broken = logits(vocab, 3);
        broken[8] = INFINITY;
        let rows = [
            ties,
            one,
            zeros,
            holes,
            vec![NAN; vocab],
            vec![f32::NEG_INFINITY; vocab],
            broken,
        ];
        let expected = [Some(17), Some(77), Some(5), Some(1002), None, None, None];
        assert_eq!(choose(&gpu, &rows, &[GREEDY; 7], &[]), expected);
        let drawn = choose(&gpu, &rows, &[PLAIN; 7], &[]);
        let some = |chosen: &[Option<u32>]| chosen.iter().map(Option::is_some).collect::<Vec<_>>();
        assert_eq!(some(&drawn), some(&expected));
        assert_eq!(drawn[1], Some(77), "the only one there is");
        assert_eq!(drawn[3], Some(1002), "a weight of 0 beside it");
        for vocab in [1, 2, 31, 32, 33] {
            let row = logits(vocab, 4);
            let best = (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            let expected = best.map(|best| best as u32);
            assert_eq!(choose(&gpu, &[row], &[GREEDY], &[]), [expected], "{vocab}");
        }
    }
}

#[test]
fn draws_fall_in_the_shares_of_their_tokens() {
    for gpu in gpus() {
        for vocab in [1, 2, 33, 1501] {
            for temperature in [0.3, 1.0, 1.7] {
                let choice = Choice {
                    temperature,
                    ..PLAIN
                };
                shares_agree(&gpu, &logits(vocab, vocab as u64), choice, 11);
            }
        }
    }
}

#[test]
fn what_is_dropped_is_never_drawn() {
    for gpu in gpus() {
        let few = logits(77, 9);
        for top_k in [0, 1, 2, 40, u32::MAX] {
            for top_p in [0.0, 0.5, 0.93, 1.0] {
                for min_p in [0.0, 0.02, 1.0] {
                    let choice = Choice {
                        temperature: 0.7,
                        top_k,
                        top_p,
                        min_p,
                        uniform: 0.0,
                    };
                    shares_agree(&gpu, &few, choice, 3);
                }
            }
        }
        let many = logits(1203, 9);
        for (top_k, top_p, min_p) in [(1000, 1.0, 0.0), (0, 0.93, 0.0), (500, 0.999, 0.001)] {
            let choice = Choice {
                temperature: 1.3,
                top_k,
                top_p,
                min_p,
                uniform: 0.0,
            };
            shares_agree(&gpu, &many, choice, 7);
        }
    }
}

/// Too many tokens of one distance, and of one logit, to be compared each with each.
#[test]
fn crowds_are_told_apart_by_their_logits_and_then_by_their_ids() {
    for gpu in gpus() {
        let vocab = 1700;
        let flat = Choice {
            temperature: 1e6,
            ..PLAIN
        };
        for top_k in [1, 700, 1600] {
            shares_agree(&gpu, &logits(vocab, 5), Choice { top_k, ..flat }, 2);
        }
        for top_p in [0.1, 0.8] {
            shares_agree(&gpu, &logits(vocab, 5), Choice { top_p, ..flat }, 2);
        }
        let mut equal = vec![-2.5; vocab];
        for id in (0..vocab).step_by(13) {
            equal[id] = -1.0;
        }
        for (top_k, top_p) in [(1400, 1.0), (0, 0.75), (1500, 0.9), (3, 1.0)] {
            let choice = Choice {
                top_k,
                top_p,
                ..PLAIN
            };
            shares_agree(&gpu, &equal, choice, 4);
        }
    }
}

#[test]
fn edits_change_logits_before_anything_is_chosen() {
    for gpu in gpus() {
        let vocab = 40;
        let row = logits(vocab, 6);
        let edit = |row, id, bias, repetition, penalty| Edit {
            row,
            id,
            bias,
            repetition,
            penalty,
        };
        let edits = [
            edit(0, 3, 50.0, 1.0, 0.0),
            edit(1, 3, 50.0, 10.0, 0.0),
            edit(1, 4, 20.0, 1.0, 1.25),
            edit(2, 39, -50.0, 1.5, 0.5),
            edit(2, 40, 99.0, 1.0, 0.0), // none of the vocabulary, though of the buffer
            edit(2, u32::MAX, 99.0, 1.0, 0.0),
            edit(2, 7, 1.5, 1.25, INFINITY),
        ];
        let apply = |row: usize| {
            let mut changed = self::logits(vocab, 6);
            for edit in edits.iter().filter(|edit| edit.row as usize == row) {
                let Some(x) = changed.get_mut(edit.id as usize) else {
                    continue;
                };
                *x += edit.bias;
                *x = if *x > 0.0 {
                    *x / edit.repetition
                } else {
                    *x * edit.repetition
                };
                *x -= edit.penalty;
            }
            changed
        };
        let expected: Vec<f32> = (0..4).flat_map(apply).collect();
        let mut logits = gpu.upload(&row.repeat(4)).expect("memory");
        let mut mat = logits.mat_mut(4, vocab);
        let chosen = sample(&gpu, &mut mat, &[GREEDY; 4], &edits).expect("launched");
        assert_eq!(gpu.download(logits.view()).expect("finished"), expected);
        let best = |row: &[f32]| {
            let best = (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            best.map(|best| best as u32)
        };
        let expected: Vec<Option<u32>> = expected.chunks(vocab).map(best).collect();
        assert_eq!(chosen, expected);
        assert_eq!(chosen[0], Some(3));
        assert_eq!(chosen[1], Some(4));

        let forbid = |id| edit(0, id, 0.0, 1.0, INFINITY);
        let all: Vec<Edit> = (0..vocab as u32).map(forbid).collect();
        assert_eq!(
            choose(&gpu, std::slice::from_ref(&row), &[PLAIN], &all),
            [None]
        );
        let but_one: Vec<Edit> = (0..vocab as u32)
            .filter(|&id| id != 11)
            .map(forbid)
            .collect();
        assert_eq!(choose(&gpu, &[row], &[PLAIN], &but_one), [Some(11)]);
    }
}

/// A row's token does not depend on its neighbours, and no row is no work.
#[test]
fn rows_are_chosen_from_one_by_one() {
    for gpu in gpus() {
        let rows: Vec<Vec<f32>> = (0..5).map(|seed| logits(301, seed)).collect();
        let choices: Vec<Choice> = (0..5_u16)
            .map(|row| Choice {
                temperature: f32::from(row) * 0.5,
                top_k: u32::from(row % 2) * 20,
                top_p: 1.0 - f32::from(row / 3) * 0.1,
                min_p: 0.01,
                uniform: 0.2 * f32::from(row),
            })
            .collect();
        let together = choose(&gpu, &rows, &choices, &[]);
        let alone: Vec<_> = (0..5)
            .flat_map(|row| choose(&gpu, &rows[row..=row], &choices[row..=row], &[]))
            .collect();
        assert_eq!(together, alone);
        let mut none = gpu.zeros::<f32>(0).expect("memory");
        let chosen = sample(&gpu, &mut none.mat_mut(0, 301), &[], &[]);
        assert_eq!(chosen.expect("nothing to launch"), []);
    }
}

#[test]
#[cfg(feature = "cuda-emulator")]
#[should_panic(expected = "edits of the rows")]
fn an_edit_of_no_row_is_refused() {
    let gpu = Gpu::emulated();
    let mut logits = gpu.zeros::<f32>(4).expect("memory");
    let edit = Edit {
        row: 1,
        id: 0,
        bias: 0.0,
        repetition: 1.0,
        penalty: 0.0,
    };
    let _ = sample(&gpu, &mut logits.mat_mut(1, 4), &[GREEDY], &[edit]);
}
