//! Several workers that train one run together.

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use tokio::runtime::Runtime;
use updraft_store::{CancelToken, Store};
use updraft_train::{
    Checkpoints, Collective, Error, EvalRecord, Launch, Observer, StepRecord, StepStats,
    TcpCollective, TrainConfig, Trainer, local_group,
};

use crate::world::{adapter, config, decoder, model, source};

const DIR: &str = "done/tiny/world/0123456789abcdef/checkpoints";

/// What a worker ends with.
#[derive(Debug, PartialEq)]
struct End {
    log: Vec<StepRecord>,
    evals: Vec<EvalRecord>,
    adapter: Vec<u32>,
}

impl End {
    fn values(&self) -> impl Iterator<Item = f32> {
        self.adapter.iter().map(|&bits| f32::from_bits(bits))
    }
}

/// Six micro-batches a step, with everything that is random in training.
fn six() -> TrainConfig {
    TrainConfig {
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 6,
        neftune_noise_alpha: Some(3.0),
        eval_steps: Some(4),
        ..config()
    }
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let builder = builder.worker_threads(1).enable_all();
    builder.build().expect("a runtime")
}

fn checkpoints(store: &Store) -> Checkpoints {
    Checkpoints::new(store, DIR, 2)
}

/// One worker's life: from the newest checkpoint until `step`, and then it is gone.
fn life(
    worker: impl Collective,
    store: &Store,
    config: &TrainConfig,
    step: u64,
    cancel: Option<(u64, CancelToken)>,
) -> Result<End, Error> {
    let (runtime, decoder) = (runtime(), decoder(1));
    let (source, held_out) = (source(26), source(5));
    let mut trainer = Trainer::new(&decoder, adapter(), &source, config.clone())?
        .with_evaluation(&held_out)
        .with_checkpoints(checkpoints(store), runtime.handle().clone())
        .with_workers(worker);
    if let Some((at, token)) = cancel {
        trainer = trainer
            .with_cancel(token.clone())
            .with_observer(CancelAt(at, token));
    }
    if let Some(checkpoint) = runtime.block_on(checkpoints(store).latest(&model()))? {
        trainer = trainer.resume(checkpoint)?;
    }
    trainer.run_until(step)?;
    let evals = trainer.evals().to_vec();
    let (adapter, log) = trainer.into_parts();
    let values = adapter.values()?;
    let adapter = values.iter().map(|value| value.to_bits()).collect();
    Ok(End {
        log,
        evals,
        adapter,
    })
}

#[derive(Debug)]
struct CancelAt(u64, CancelToken);

impl Observer for CancelAt {
    fn on_step(&mut self, stats: &StepStats<'_>) {
        if stats.record.step == self.0 {
            self.1.cancel();
        }
    }
}

/// Runs each worker on a thread of its own.
fn together<C: Collective, R: Send>(workers: Vec<C>, work: impl Fn(C) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let workers: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(move || work(worker)))
            .collect();
        let ends = workers.into_iter().map(thread::ScopedJoinHandle::join);
        ends.map(|end| end.expect("no worker panics")).collect()
    })
}

fn alone(config: &TrainConfig, step: u64) -> End {
    let worker = local_group(1).remove(0);
    life(worker, &Store::memory(), config, step, None).expect("one worker")
}

fn check_close(end: &End, reference: &End) {
    for (step, expected) in end.log.iter().zip(&reference.log) {
        assert!(
            (step.loss - expected.loss).abs() < 1e-6,
            "{step:?} {expected:?}"
        );
        assert_eq!(step.trained_tokens, expected.trained_tokens);
        assert_eq!(step.learning_rate, expected.learning_rate);
    }
    for (eval, expected) in end.evals.iter().zip(&reference.evals) {
        assert!((eval.eval_loss - expected.eval_loss).abs() < 1e-5);
    }
    let differences = end
        .values()
        .zip(reference.values())
        .map(|(a, b)| (a - b).abs());
    let largest = differences.fold(0.0, f32::max);
    assert!(largest < 1e-4, "{largest}");
}

#[test]
fn workers_end_with_the_same_bits_and_the_losses_of_one() {
    let one = alone(&six(), 10);
    assert_eq!((one.log.len(), one.evals.len()), (10, 3));
    for num_workers in [2, 3, 4] {
        let ends = together(local_group(num_workers), |worker| {
            life(worker, &Store::memory(), &six(), 10, None).expect("ten steps")
        });
        assert!(
            ends.iter().all(|end| *end == ends[0]),
            "{num_workers} workers"
        );
        check_close(&ends[0], &one);
    }
}

#[test]
fn processes_over_tcp_are_the_same_as_threads() {
    let port = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let master = port.local_addr().expect("bound").to_string();
    drop(port);
    let ends = together(local_group(3), |worker| {
        let launch = Launch {
            rank: worker.rank(),
            num_workers: 3,
            master: master.clone(),
        };
        let worker = TcpCollective::join(&launch, Duration::from_secs(20)).expect("all came");
        life(worker, &Store::memory(), &six(), 10, None).expect("ten steps")
    });
    let threads = together(local_group(3), |worker| {
        life(worker, &Store::memory(), &six(), 10, None).expect("ten steps")
    });
    assert_eq!(ends, threads);
}

#[test]
fn when_one_worker_dies_all_end_and_the_rest_of_the_run_is_the_same_to_the_bit() {
    let config = TrainConfig {
        save_steps: 2,
        ..six()
    };
    let whole = together(local_group(3), |worker| {
        life(worker, &Store::memory(), &config, 10, None).expect("ten steps")
    });
    for dies in 0..3 {
        let store = Store::memory();
        let ends = together(local_group(3), |worker| {
            let last = if worker.rank() == dies { 5 } else { 10 };
            life(worker, &store, &config, last, None)
        });
        for (rank, end) in ends.iter().enumerate() {
            assert_eq!(end.is_ok(), rank == dies);
            let error = end.as_ref().err();
            assert!(error.is_none_or(|error| matches!(error, Error::Worker { .. })));
        }
        let ends = together(local_group(3), |worker| {
            life(worker, &store, &config, 10, None).expect("the rest")
        });
        assert_eq!(ends, whole);
    }
}

#[test]
fn another_number_of_workers_continues_within_tolerance() {
    let config = TrainConfig {
        save_steps: 4,
        ..six()
    };
    let store = Store::memory();
    for (num_workers, until) in [(3, 4), (1, 8), (2, 10)] {
        let ends = together(local_group(num_workers), |worker| {
            life(worker, &store, &config, until, None).expect("some steps")
        });
        assert_eq!(ends[0].log.len() as u64, until);
        check_close(&ends[0], &alone(&config, until));
    }
}

#[test]
fn cancelling_one_worker_stops_all_at_one_step_with_a_checkpoint() {
    let store = Store::memory();
    let ends = together(local_group(3), |worker| {
        let cancel = (worker.rank() == 2).then(|| (3, CancelToken::new()));
        life(worker, &store, &six(), 10, cancel)
    });
    for end in ends {
        let error = end.expect_err("cancelled");
        assert!(matches!(error, Error::Cancelled { step: 3 }), "{error}");
    }
    let saved = runtime().block_on(checkpoints(&store).latest(&model()));
    let saved = saved.expect("the store").expect("a checkpoint");
    assert_eq!(saved.state.cursor.step, 3);
}

#[test]
fn workers_with_other_settings_refuse_each_other() {
    let ends = together(local_group(2), |worker| {
        let config = TrainConfig {
            learning_rate: 1e-3 * (1 + worker.rank()) as f64,
            ..six()
        };
        life(worker, &Store::memory(), &config, 10, None)
    });
    for end in ends {
        let error = end.expect_err("refused").to_string();
        assert_eq!(
            error,
            "TrainConfig of worker 1 differs from the first worker's: start all of them alike"
        );
    }
}
