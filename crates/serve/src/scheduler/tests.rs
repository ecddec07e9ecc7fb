//! Scenarios for the scheduler, with a model that is only arithmetic.

use super::*;

fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 8,
        num_blocks: 16,
        block_size: 4,
        max_queued_requests: 8,
        max_queued_tokens: 100,
    }
}

fn scheduler(config: SchedulerConfig) -> Scheduler {
    Scheduler::new(config).expect("a valid config")
}

fn slice(id: SequenceId, start: u32, len: u32, is_last: bool) -> Slice {
    Slice {
        id,
        start,
        len,
        is_last,
    }
}

/// Admits a sequence whose tokens do not matter.
fn admit(s: &mut Scheduler, id: SequenceId, prompt_tokens: u32, max_tokens: u32) -> Result<()> {
    s.admit(id, &vec![0; prompt_tokens as usize], max_tokens, None)
}

/// Runs one step and appends a token to each sequence that reached its end.
fn step(scheduler: &mut Scheduler) -> Step {
    let step = scheduler.schedule();
    scheduler.computed(&step);
    step.slices
        .iter()
        .filter(|slice| slice.is_last)
        .for_each(|slice| scheduler.appended(slice.id, 0));
    step
}

#[test]
fn a_long_prompt_is_cut_and_decodes_go_on_beside_it() {
    let mut s = scheduler(config());
    admit(&mut s, 1, 3, 10).expect("admitted");
    assert_eq!(step(&mut s).slices, [slice(1, 0, 3, true)]);
    admit(&mut s, 2, 12, 10).expect("admitted");
    assert_eq!(
        step(&mut s).slices,
        [slice(1, 3, 1, true), slice(2, 0, 7, false)]
    );
    assert_eq!(
        step(&mut s).slices,
        [slice(1, 4, 1, true), slice(2, 7, 5, true)]
    );
    assert_eq!(
        step(&mut s).slices,
        [slice(1, 5, 1, true), slice(2, 12, 1, true)]
    );
}

#[test]
fn arrival_order_is_kept_and_the_batch_is_bounded() {
    let mut s = scheduler(SchedulerConfig {
        max_num_seqs: 2,
        ..config()
    });
    for id in 1..=3 {
        admit(&mut s, id, 2, 4).expect("admitted");
    }
    let ids = |step: &Step| step.slices.iter().map(|slice| slice.id).collect::<Vec<_>>();
    assert_eq!(ids(&step(&mut s)), [1, 2]);
    assert!(s.finish(1));
    assert_eq!(ids(&step(&mut s)), [2, 3]);
}

#[test]
fn a_full_queue_refuses_with_a_time_to_retry() {
    let mut s = scheduler(SchedulerConfig {
        max_queued_requests: 2,
        ..config()
    });
    admit(&mut s, 1, 2, 1).expect("admitted");
    admit(&mut s, 2, 2, 1).expect("admitted");
    assert!(
        matches!(admit(&mut s, 3, 2, 1), Err(Error::Overloaded { retry_after }) if !retry_after.is_zero())
    );
    s.schedule();
    admit(&mut s, 3, 2, 1).expect("the queue has moved");
}

#[test]
fn queued_tokens_are_bounded_but_one_long_prompt_may_wait() {
    let mut s = scheduler(SchedulerConfig {
        max_queued_tokens: 10,
        ..config()
    });
    admit(&mut s, 1, 40, 1).expect("nothing else waits");
    assert!(matches!(
        admit(&mut s, 2, 2, 1),
        Err(Error::Overloaded { .. })
    ));
}

#[test]
fn what_can_never_fit_is_refused() {
    let mut s = scheduler(config());
    assert!(matches!(
        admit(&mut s, 1, 60, 5),
        Err(Error::ContextLength {
            max_model_len: 64,
            ..
        })
    ));
    admit(&mut s, 1, 60, 4).expect("exactly the cache");
}

#[test]
fn the_youngest_is_preempted_and_computed_again() {
    let mut s = scheduler(SchedulerConfig {
        num_blocks: 4,
        ..config()
    });
    admit(&mut s, 1, 4, 12).expect("admitted");
    admit(&mut s, 2, 4, 12).expect("admitted");
    step(&mut s); // Both prompts: one block each, both full.
    step(&mut s); // Each takes a second block.
    for _ in 0..3 {
        step(&mut s);
    }
    let crowded = step(&mut s); // 1 needs a third block; 2 gives way.
    assert_eq!(crowded.preempted, [2]);
    assert_eq!(crowded.slices, [slice(1, 8, 1, true)]);
    assert_eq!(
        (s.num_running(), s.num_waiting(), s.counts().preemptions),
        (1, 1, 1)
    );
    s.finish(1);
    // All nine tokens of 2 come back: eight fit the budget, then the ninth.
    assert_eq!(step(&mut s).slices, [slice(2, 0, 8, false)]);
    assert_eq!(step(&mut s).slices, [slice(2, 8, 1, true)]);
}

#[test]
fn finishing_frees_every_block_at_once_in_any_state() {
    let mut s = scheduler(config());
    for id in 1..=6 {
        admit(&mut s, id, 9, 4).expect("admitted");
    }
    step(&mut s);
    step(&mut s);
    for id in 1..=6 {
        assert!(s.finish(id));
        assert!(!s.finish(id), "a second time is nothing");
    }
    assert_eq!(s.block_usage(), (16, 16));
    assert_eq!(s.schedule(), Step::default());
}

/// Random arrivals, cancellations and lengths: every sequence ends, positions are contiguous, no
/// budget is exceeded, and no block is lost or shared.
#[test]
fn a_thousand_random_histories_keep_every_promise() {
    for seed in 0..1000 {
        let mut draw = 0;
        let mut random = |below: u64| {
            draw += 1;
            (crate::rng::uniform(seed, draw) * below as f64) as u64
        };
        let config = SchedulerConfig {
            max_num_seqs: 1 + random(4) as usize,
            max_num_batched_tokens: 4 + random(8) as u32,
            num_blocks: 8 + random(8) as u32,
            block_size: 1 + random(4) as u32,
            max_queued_requests: 100,
            max_queued_tokens: 10_000,
        };
        let capacity = config.num_blocks * config.block_size;
        let mut s = scheduler(config.clone());
        let mut left = BTreeMap::new();
        let mut positions: BTreeMap<SequenceId, u32> = BTreeMap::new();
        for id in 0..10 {
            let prompt = 1 + random(u64::from(capacity) / 2) as u32;
            let completion = 1 + random(u64::from(capacity - prompt)) as u32;
            admit(&mut s, id, prompt, completion).expect("fits");
            left.insert(id, completion);
        }
        for _ in 0..10_000 {
            if left.is_empty() {
                break;
            }
            let step = s.schedule();
            assert!(!step.slices.is_empty(), "seed {seed}: no progress");
            let total: u32 = step.slices.iter().map(|slice| slice.len).sum();
            assert!(
                total <= config.max_num_batched_tokens && s.num_running() <= config.max_num_seqs
            );
            for id in &step.preempted {
                positions.insert(*id, 0);
            }
            let mut held: Vec<u32> = Vec::new();
            for slice in &step.slices {
                let position = positions.entry(slice.id).or_default();
                assert_eq!(slice.start, *position, "seed {seed}: a gap");
                *position += slice.len;
                let table = s.block_table(slice.id);
                assert!(
                    table.len() as u32 * config.block_size >= *position,
                    "no room for keys"
                );
                held.extend(table);
            }
            held.sort_unstable();
            assert!(
                held.windows(2).all(|pair| pair[0] != pair[1]),
                "seed {seed}: a shared block"
            );
            s.computed(&step);
            for slice in step.slices.iter().filter(|slice| slice.is_last) {
                let tokens = left.get_mut(&slice.id).expect("alive");
                *tokens -= 1;
                if *tokens == 0 || random(20) == 0 {
                    left.remove(&slice.id);
                    s.finish(slice.id);
                } else {
                    s.appended(slice.id, 0);
                }
            }
        }
        assert!(left.is_empty(), "seed {seed}: starved {left:?}");
        assert_eq!(
            s.block_usage().0,
            config.num_blocks as usize,
            "seed {seed}: a lost block"
        );
    }
}

fn root() -> Option<PrefixRoot> {
    Some(PrefixRoot::new(0, None))
}

#[test]
fn a_prompt_seen_before_is_computed_from_its_last_block_on() {
    let mut s = scheduler(config());
    let prompt: Vec<u32> = (0..8).collect();
    s.admit(1, &prompt, 4, root()).expect("admitted");
    assert_eq!(step(&mut s).started, [(1, 0)]);
    let blocks = s.block_table(1).to_vec();
    // While the first still runs, and after it has gone: all but the last block is shared, and
    // that one is computed for its logits.
    for id in 2..4 {
        s.admit(id, &prompt, 4, root()).expect("admitted");
        let step = step(&mut s);
        assert_eq!(step.started, [(id, 4)]);
        assert!(step.slices.contains(&slice(id, 4, 4, true)));
        assert_eq!(s.block_table(id)[0], blocks[0]);
        assert_ne!(s.block_table(id)[1], blocks[1]);
        s.finish(1);
    }
    let counts = s.counts();
    assert_eq!(
        (counts.prefix_cache_queries, counts.prefix_cache_hits),
        (24, 8)
    );
    // Another root shares nothing, nor does a prompt that began otherwise.
    s.admit(8, &prompt, 4, Some(PrefixRoot::new(1, None)))
        .expect("admitted");
    s.admit(9, &[9, 1, 2, 3, 4, 5], 4, root())
        .expect("admitted");
    assert_eq!(step(&mut s).started, [(8, 0)]);
    assert_eq!(step(&mut s).started, [(9, 0)]);
}

#[test]
fn an_answer_is_part_of_the_next_question() {
    let mut s = scheduler(config());
    s.admit(1, &[7; 5], 8, root()).expect("admitted");
    for token in 0..4 {
        let step = s.schedule();
        s.computed(&step);
        s.appended(1, token);
    }
    s.finish(1);
    s.admit(2, &[7, 7, 7, 7, 7, 0, 1, 2, 3, 8], 4, root())
        .expect("admitted");
    assert_eq!(step(&mut s).started, [(2, 8)]);
}

/// Random prompts of few tokens, so that they often agree: what a slice builds on is always what
/// its own tokens would have left there, whoever computed it.
#[test]
fn a_shared_block_always_holds_what_its_sequence_would_have_computed() {
    let mut hits = 0;
    for seed in 0..400 {
        let mut draw = 0;
        let mut random = |below: u64| {
            draw += 1;
            (crate::rng::uniform(seed, draw) * below as f64) as u64
        };
        let mut s = scheduler(SchedulerConfig {
            max_num_seqs: 1 + random(4) as usize,
            max_num_batched_tokens: 4 + random(8) as u32,
            num_blocks: 8 + random(8) as u32,
            block_size: 1 + random(3) as u32,
            max_queued_requests: 100,
            max_queued_tokens: 10_000,
        });
        let block_size = s.config.block_size;
        let capacity = s.config.num_blocks * block_size;
        let mut sequences: BTreeMap<SequenceId, (u64, Vec<u32>)> = BTreeMap::new();
        // What lies in each slot: the root and all tokens up to the slot's own.
        let mut slots: BTreeMap<u32, (u64, Vec<u32>)> = BTreeMap::new();
        let mut next = 0;
        for _ in 0..200 {
            if random(3) == 0 && s.num_waiting() < 5 {
                let len = 1 + random(u64::from(capacity) / 2) as u32;
                let tokens: Vec<u32> = (0..len).map(|_| (random(8) == 0).into()).collect();
                let generation = random(2);
                let root = (random(4) > 0).then(|| PrefixRoot::new(generation, None));
                s.admit(next, &tokens, capacity - len, root).expect("fits");
                sequences.insert(next, (generation, tokens));
                next += 1;
            }
            let step = s.schedule();
            for slice in &step.slices {
                let (root, tokens) = &sequences[&slice.id];
                let table = s.block_table(slice.id);
                let slot =
                    |at: u32| table[(at / block_size) as usize] * block_size + at % block_size;
                for at in 0..slice.start {
                    let expected = (*root, tokens[..=at as usize].to_vec());
                    assert_eq!(slots.get(&slot(at)), Some(&expected), "seed {seed}");
                }
                for at in slice.start..slice.start + slice.len {
                    slots.insert(slot(at), (*root, tokens[..=at as usize].to_vec()));
                }
            }
            s.computed(&step);
            for slice in step.slices.iter().filter(|slice| slice.is_last) {
                let (_, tokens) = sequences.get_mut(&slice.id).expect("known");
                if random(6) == 0 || tokens.len() as u32 == capacity {
                    s.finish(slice.id);
                } else {
                    let token = (random(8) == 0).into();
                    tokens.push(token);
                    s.appended(slice.id, token);
                }
            }
        }
        hits += s.counts().prefix_cache_hits;
        for id in 0..next {
            s.finish(id);
        }
        assert_eq!(s.block_usage().0, s.block_usage().1, "a lost block");
    }
    assert!(hits > 1000, "the test would prove nothing: {hits}");
}
