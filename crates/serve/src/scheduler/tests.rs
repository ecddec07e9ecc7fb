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

/// Runs one step and appends a token to each sequence that reached its end.
fn step(scheduler: &mut Scheduler) -> Step {
    let step = scheduler.schedule();
    scheduler.computed(&step);
    step.slices
        .iter()
        .filter(|slice| slice.is_last)
        .for_each(|slice| scheduler.appended(slice.id));
    step
}

#[test]
fn a_long_prompt_is_cut_and_decodes_go_on_beside_it() {
    let mut s = scheduler(config());
    s.admit(1, 3, 10).expect("admitted");
    assert_eq!(step(&mut s).slices, [slice(1, 0, 3, true)]);
    s.admit(2, 12, 10).expect("admitted");
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
        s.admit(id, 2, 4).expect("admitted");
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
    s.admit(1, 2, 1).expect("admitted");
    s.admit(2, 2, 1).expect("admitted");
    assert!(
        matches!(s.admit(3, 2, 1), Err(Error::Overloaded { retry_after }) if !retry_after.is_zero())
    );
    s.schedule();
    s.admit(3, 2, 1).expect("the queue has moved");
}

#[test]
fn queued_tokens_are_bounded_but_one_long_prompt_may_wait() {
    let mut s = scheduler(SchedulerConfig {
        max_queued_tokens: 10,
        ..config()
    });
    s.admit(1, 40, 1).expect("nothing else waits");
    assert!(matches!(s.admit(2, 2, 1), Err(Error::Overloaded { .. })));
}

#[test]
fn what_can_never_fit_is_refused() {
    let mut s = scheduler(config());
    assert!(matches!(
        s.admit(1, 60, 5),
        Err(Error::ContextLength {
            max_model_len: 64,
            ..
        })
    ));
    s.admit(1, 60, 4).expect("exactly the cache");
}

#[test]
fn the_youngest_is_preempted_and_computed_again() {
    let mut s = scheduler(SchedulerConfig {
        num_blocks: 4,
        ..config()
    });
    s.admit(1, 4, 12).expect("admitted");
    s.admit(2, 4, 12).expect("admitted");
    step(&mut s); // Both prompts: one block each, both full.
    step(&mut s); // Each takes a second block.
    for _ in 0..3 {
        step(&mut s);
    }
    let crowded = step(&mut s); // 1 needs a third block; 2 gives way.
    assert_eq!(crowded.preempted, [2]);
    assert_eq!(crowded.slices, [slice(1, 8, 1, true)]);
    assert_eq!(
        (s.num_running(), s.num_waiting(), s.preemptions()),
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
        s.admit(id, 9, 4).expect("admitted");
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
            s.admit(id, prompt, completion).expect("fits");
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
                    s.appended(slice.id);
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
