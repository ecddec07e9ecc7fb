//! Evaluation on held-out examples: its figure, what it stops, what it keeps.

use updraft_model::Adapter;
use updraft_store::{CancelToken, Store};
use updraft_train::{
    Checkpoints, Error, EvalRecord, ExamplePlan, ExampleSource, ExampleStream, MemorySource,
    TrainConfig, Trainer, evaluate, parts,
};

use crate::world::{adapter, config, decoder, examples, model, source};

fn held_out() -> MemorySource {
    MemorySource::new("held-out", examples(9).split_off(4))
}

fn every_two_steps() -> TrainConfig {
    TrainConfig {
        eval_steps: Some(2),
        ..config()
    }
}

fn bits(adapter: &Adapter) -> Vec<u32> {
    let values = adapter.values().expect("f32");
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn the_loss_is_the_mean_over_tokens_whatever_the_batches() {
    let (decoder, source, adapter) = (decoder(2), held_out(), adapter());
    let all: Vec<_> = source
        .open(0, 0)
        .and_then(Iterator::collect)
        .expect("in memory");
    let whole = parts(&all, 1, model().vocab_size).expect("sound");
    let sum = decoder.loss(&whole, Some(&adapter)).expect("a loss");
    let tokens: u32 = all.iter().map(updraft_chat::Example::trained_tokens).sum();
    for batch_size in [1, 2, 5, 8] {
        let (loss, counted) =
            evaluate(&decoder, Some(&adapter), &source, batch_size, &[]).expect("a loss");
        assert_eq!(counted, u64::from(tokens));
        assert!(
            (loss - sum / f64::from(tokens)).abs() < 1e-6,
            "{batch_size}"
        );
    }
}

#[test]
fn it_comes_every_eval_steps_and_at_the_end_and_changes_nothing() {
    let (decoder, source, held_out) = (decoder(2), source(26), held_out());
    let config = TrainConfig {
        eval_steps: Some(4),
        ..config()
    };
    let mut with = Trainer::new(&decoder, adapter(), &source, config.clone())
        .expect("a run")
        .with_evaluation(&held_out);
    let report = with.run().expect("trained");
    let steps: Vec<u64> = with.evals().iter().map(|eval| eval.step).collect();
    assert_eq!(steps, [4, 8, 10]);
    assert_eq!(report.eval, with.evals().last().copied());
    let mut without = Trainer::new(&decoder, adapter(), &source, config).expect("a run");
    without.run().expect("trained");
    assert_eq!(bits(with.adapter()), bits(without.adapter()));
}

/// A run that memorises until it no longer helps the held-out examples.
fn stopped(store: Option<&Store>, until: u64) -> (Vec<EvalRecord>, u64, Vec<u32>, Vec<u32>) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (decoder, source, held_out) = (decoder(1), source(6), held_out());
    let config = TrainConfig {
        learning_rate: 0.1,
        max_steps: Some(60),
        warmup_steps: 0,
        save_steps: 3,
        load_best_model_at_end: true,
        early_stopping_patience: Some(3),
        ..every_two_steps()
    };
    let mut trainer = Trainer::new(&decoder, adapter(), &source, config)
        .expect("a run")
        .with_evaluation(&held_out);
    if let Some(store) = store {
        let checkpoints = Checkpoints::new(store, "checkpoints", 2);
        if let Some(checkpoint) = runtime
            .block_on(checkpoints.latest(&model()))
            .expect("read")
        {
            trainer = trainer.resume(checkpoint).expect("its own");
        }
        trainer = trainer.with_checkpoints(checkpoints, runtime.handle().clone());
    }
    let report = trainer.run_until(until).expect("trained");
    let evals = trainer.evals().to_vec();
    let last = bits(trainer.adapter());
    (evals, report.steps, last, bits(&trainer.into_parts().0))
}

#[test]
fn a_run_stops_when_patience_is_out_and_keeps_the_best_adapter() {
    let (evals, steps, last, kept) = stopped(None, 60);
    assert!(steps < 60, "it never overfitted: {evals:?}");
    assert_eq!(evals.last().map(|eval| eval.step), Some(steps));
    let best = updraft_train::best(&evals).expect("evaluated");
    assert_eq!(best.step + 6, steps, "three evaluations later: {evals:?}");
    assert_ne!(last, kept);
    let (_, _, at_best, _) = stopped(None, best.step);
    assert_eq!(kept, at_best);
}

#[test]
fn a_killed_run_stops_where_the_calm_one_does() {
    let calm = stopped(None, 60);
    for killed_after in [2, 4, 7, calm.1] {
        let store = Store::memory();
        stopped(Some(&store), killed_after);
        assert_eq!(
            stopped(Some(&store), 60),
            calm,
            "killed after {killed_after}"
        );
    }
}

/// Held-out examples during the reading of which the switch is thrown.
#[derive(Debug)]
struct Switch(MemorySource, CancelToken);

impl ExampleSource for Switch {
    fn plan(&self) -> &ExamplePlan {
        self.0.plan()
    }

    fn row(&self, epoch: u64, index: u64) -> u64 {
        self.0.row(epoch, index)
    }

    fn open(&self, epoch: u64, index: u64) -> Result<ExampleStream<'_>, Error> {
        let throw = |_: &Result<_, _>| self.1.cancel();
        Ok(Box::new(self.0.open(epoch, index)?.inspect(throw)))
    }
}

#[test]
fn cancelled_while_it_evaluates_it_stops_and_evaluates_when_it_goes_on() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (decoder, source, held_out) = (decoder(1), source(26), held_out());
    let config = TrainConfig {
        per_device_eval_batch_size: 1,
        ..every_two_steps()
    };
    let run = || Trainer::new(&decoder, adapter(), &source, config.clone()).expect("a run");
    let mut calm = run().with_evaluation(&held_out);
    calm.run().expect("trained");

    let store = Store::memory();
    let checkpoints = || Checkpoints::new(&store, "checkpoints", 2);
    let cancel = CancelToken::new();
    let switch = Switch(held_out.clone(), cancel.clone());
    let mut stopped = run()
        .with_evaluation(&switch)
        .with_cancel(cancel)
        .with_checkpoints(checkpoints(), runtime.handle().clone());
    let error = stopped.run().expect_err("cancelled");
    assert!(matches!(error, Error::Cancelled { step: 2 }), "{error}");
    assert!(stopped.evals().is_empty());

    let checkpoint = runtime.block_on(checkpoints().latest(&model()));
    let checkpoint = checkpoint.expect("read").expect("one of step 2");
    let mut rest = run().with_evaluation(&held_out).resume(checkpoint);
    let rest = rest.as_mut().expect("its own");
    rest.run().expect("trained");
    assert_eq!(rest.evals(), calm.evals());
    assert_eq!(bits(rest.adapter()), bits(calm.adapter()));
}

#[test]
fn a_held_out_loss_that_is_no_number_is_an_error_and_no_record() {
    let (decoder, train, held_out) = (decoder(1), source(26), held_out());
    let config = TrainConfig {
        learning_rate: 1e30,
        optim: updraft_train::OptimizerKind::Sgd,
        max_grad_norm: 0.0,
        warmup_steps: 0,
        eval_steps: Some(1),
        ..config()
    };
    let trainer = Trainer::new(&decoder, adapter(), &train, config).expect("a run");
    let mut trainer = trainer.with_evaluation(&held_out);
    let error = trainer.run().expect_err("it explodes");
    assert!(
        matches!(error, Error::EvalLossNotFinite { step: 1, .. }),
        "{error}"
    );
    assert!(trainer.evals().is_empty());
}

#[test]
fn what_follows_from_evaluations_needs_some() {
    let (decoder, train, held_out) = (decoder(1), source(26), held_out());
    let wishes = [
        TrainConfig {
            early_stopping_patience: Some(2),
            ..config()
        },
        TrainConfig {
            load_best_model_at_end: true,
            ..config()
        },
    ];
    for (config, wish) in wishes
        .into_iter()
        .zip(["early_stopping_patience", "load_best_model_at_end"])
    {
        let refused = |mut trainer: Trainer<'_>| {
            let error = trainer.run().expect_err("nothing to follow");
            assert!(
                matches!(error, Error::Config { field, .. } if field == wish),
                "{error}"
            );
        };
        let run = |config| Trainer::new(&decoder, adapter(), &train, config).expect("a run");
        refused(run(config.clone()).with_evaluation(&held_out));
        let every_two = TrainConfig {
            eval_steps: Some(2),
            ..config
        };
        refused(run(every_two.clone()));
        let mut trainer = run(every_two).with_evaluation(&held_out);
        trainer.run_until(1).expect("both are there");
    }
}
