//! What every [`Collective`] promises.

use std::thread;

use crate::{Collective, Error};

/// Turns the suite into tests; `$group` makes the workers of a group of some size.
#[macro_export]
macro_rules! collective_tests {
    ($group:expr) => {
        mod conformance {
            #[test]
            fn messages_come_in_the_order_of_ranks() {
                $crate::conformance::collective::messages_come_in_the_order_of_ranks($group);
            }
            #[test]
            fn sums_are_the_same_bits_everywhere() {
                $crate::conformance::collective::sums_are_the_same_bits_everywhere($group);
            }
            #[test]
            fn a_worker_that_goes_away_is_an_error_on_all() {
                $crate::conformance::collective::a_worker_that_goes_away_is_an_error_on_all($group);
            }
            #[test]
            fn workers_out_of_step_are_an_error() {
                $crate::conformance::collective::workers_out_of_step_are_an_error($group);
            }
        }
    };
}

/// Runs each worker of a group on a thread of its own.
fn run<C: Collective, R: Send>(workers: Vec<C>, work: impl Fn(C) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let running: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(move || work(worker)))
            .collect();
        let ended = running.into_iter().map(thread::ScopedJoinHandle::join);
        ended
            .map(|worker| worker.expect("no worker panics"))
            .collect()
    })
}

/// Numbers whose sum depends on the order in which they are added.
fn numbers(rank: usize, len: usize) -> Vec<f32> {
    let number =
        |i: usize| ((i * 31 + rank * 17) % 101) as f32 * 10.0_f32.powi(rank as i32 * 3 - 4);
    (0..len).map(number).collect()
}

#[expect(missing_docs, reason = "the name is the promise")]
pub fn messages_come_in_the_order_of_ranks<C: Collective>(group: impl Fn(usize) -> Vec<C>) {
    for num_workers in 1..5 {
        let heard = run(group(num_workers), |mut worker| {
            let own = (worker.rank(), worker.num_workers());
            let long = vec![own.0 as u8; 50_000];
            let short = worker.exchange(&[own.0 as u8]).expect("all are there");
            (own, short, worker.exchange(&long).expect("all are there"))
        });
        for (rank, (own, short, long)) in heard.into_iter().enumerate() {
            assert_eq!(own, (rank, num_workers));
            let expected: Vec<Vec<u8>> = (0..num_workers).map(|rank| vec![rank as u8]).collect();
            assert_eq!(short, expected);
            let expected: Vec<_> = expected.iter().map(|byte| byte.repeat(50_000)).collect();
            assert_eq!(long, expected);
        }
    }
}

#[expect(missing_docs, reason = "the name is the promise")]
pub fn sums_are_the_same_bits_everywhere<C: Collective>(group: impl Fn(usize) -> Vec<C>) {
    for num_workers in 1..5 {
        for len in [0, 1, 3, 1000, 300_000] {
            let mut expected = numbers(0, len);
            for rank in 1..num_workers {
                for (sum, value) in expected.iter_mut().zip(numbers(rank, len)) {
                    *sum += value;
                }
            }
            let sums = run(group(num_workers), |mut worker| {
                let mut values = numbers(worker.rank(), len);
                worker.sum(&mut values).expect("all are there");
                worker.sum(&mut []).expect("nothing to add");
                values
            });
            for sum in sums {
                assert!(
                    sum.iter()
                        .zip(&expected)
                        .all(|(a, b)| a.to_bits() == b.to_bits())
                );
            }
        }
    }
}

#[expect(missing_docs, reason = "the name is the promise")]
pub fn a_worker_that_goes_away_is_an_error_on_all<C: Collective>(group: impl Fn(usize) -> Vec<C>) {
    for gone in 0..3 {
        let ended = run(group(3), |mut worker| {
            worker.exchange(b"here").expect("all are there");
            if worker.rank() == gone {
                return Ok(());
            }
            let first = worker.sum(&mut numbers(0, 100_000));
            let second = worker.exchange(b"still there?").map(|_| ());
            assert!(second.is_err(), "no call succeeds after an error");
            first
        });
        for (rank, ended) in ended.into_iter().enumerate() {
            assert_eq!(ended.is_ok(), rank == gone);
            if let Err(error) = ended {
                assert!(matches!(error, Error::Worker { .. }), "{error}");
                assert!(error.is_retryable());
            }
        }
    }
}

#[expect(missing_docs, reason = "the name is the promise")]
pub fn workers_out_of_step_are_an_error<C: Collective>(group: impl Fn(usize) -> Vec<C>) {
    let ended = run(group(2), |mut worker| match worker.rank() {
        0 => worker.sum(&mut [1.0, 2.0]).is_err(),
        _ => worker.exchange(b"something else").is_err(),
    });
    assert_eq!(ended, [true, true]);
    let ended = run(group(2), |mut worker| {
        let mut values = vec![1.0; 10 + 10 * worker.rank()];
        worker.sum(&mut values).is_err()
    });
    assert_eq!(ended, [true, true]);
}
