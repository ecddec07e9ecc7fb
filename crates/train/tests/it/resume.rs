//! A run that stops and continues is the run that never stopped.

use std::sync::Arc;

use tokio::runtime::Runtime;
use updraft_model::{LoraConfig, ModelConfig};
use updraft_store::faults::{Fault, inject};
use updraft_store::{CancelToken, Store};
use updraft_train::{
    Checkpoints, Cursor, Error, ExampleSource, Observer, StepRecord, StepStats, TrainConfig,
    Trainer,
};

use crate::world::{adapter, adapter_of, config, decoder, decoder_in, lora, model, saving, source};

const DIR: &str = "done/tiny/world/0123456789abcdef/checkpoints";

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn checkpoints(store: &Store) -> Checkpoints {
    Checkpoints::new(store, DIR, 2)
}

/// What a run ends with, to the bit.
#[derive(Debug, PartialEq)]
struct End {
    log: Vec<StepRecord>,
    adapter: Vec<u32>,
    optimizer: updraft_train::optim::OptimizerState<'static>,
}

/// Starts, or continues from the store's newest checkpoint, and goes on until
/// `step`; then the process is gone.
fn life(store: &Store, config: &TrainConfig, step: u64) -> Result<End, Error> {
    life_of(&lora(), store, config, step)
}

fn life_of(
    lora: &LoraConfig,
    store: &Store,
    config: &TrainConfig,
    step: u64,
) -> Result<End, Error> {
    let (runtime, source) = (runtime(), source(26));
    let decoder = decoder_in(config.dtype(), 2);
    let mut trainer = Trainer::new(&decoder, adapter_of(lora), &source, config.clone())?
        .with_checkpoints(checkpoints(store), runtime.handle().clone());
    if let Some(checkpoint) = runtime.block_on(checkpoints(store).latest(&model()))? {
        trainer = trainer.resume(checkpoint)?;
    }
    trainer.run_until(step)?;
    let optimizer = trainer.checkpoint()?.optimizer;
    let (adapter, log) = trainer.into_parts();
    let adapter = adapter
        .values()?
        .iter()
        .map(|value| value.to_bits())
        .collect();
    Ok(End {
        log,
        adapter,
        optimizer,
    })
}

fn configs() -> [TrainConfig; 3] {
    [
        config(),
        TrainConfig {
            bf16: true,
            ..config()
        },
        TrainConfig {
            packing: true,
            packing_window: 8,
            per_device_train_batch_size: 1,
            ..config()
        },
    ]
}

#[test]
fn ten_steps_are_five_and_a_kill_and_five_twice_in_a_row() {
    for config in configs() {
        let whole = life(&Store::memory(), &config, 10).expect("ten steps");
        assert_eq!(whole.log.len(), 10);
        for _ in 0..2 {
            let store = Store::memory();
            life(&store, &config, 5).expect("five steps");
            assert_eq!(life(&store, &config, 10).expect("five more"), whole);
        }
    }
}

#[test]
fn whole_weights_stop_and_continue_to_the_bit_too() {
    for lora in [saving(), LoraConfig::full_fine_tuning()] {
        let whole = life_of(&lora, &Store::memory(), &config(), 10).expect("ten steps");
        assert!(whole.log[9].loss < whole.log[1].loss, "it learns");
        for _ in 0..2 {
            let store = Store::memory();
            life_of(&lora, &store, &config(), 5).expect("five steps");
            assert_eq!(
                life_of(&lora, &store, &config(), 10).expect("five more"),
                whole
            );
        }
        let store = Store::memory();
        life_of(&lora, &store, &config(), 5).expect("five steps");
        let error = life(&store, &config(), 10).expect_err("other parameters");
        let foreign = matches!(
            error,
            Error::ForeignCheckpoint {
                what: "LoraConfig",
                ..
            }
        );
        assert!(foreign, "{error}");
    }
}

/// A disk that is full refuses every write from some call on, in the middle of a checkpoint too,
/// and goes on refusing.
#[test]
fn a_disk_that_fills_up_leaves_the_last_checkpoint_as_it_was() {
    let config = TrainConfig {
        save_steps: 2,
        ..config()
    };
    let whole = life(&Store::memory(), &config, 10).expect("ten steps");
    let (store, runtime) = (Store::memory(), runtime());
    let (counted, calls) = updraft_store::faults::count(&store);
    life(&counted, &config, 4).expect("four steps");
    let to_the_middle_of_the_third = calls.total() + 4;
    let store = Store::memory();
    let (full, injected) = inject(&store, Fault::KillBefore, to_the_middle_of_the_third);
    let error = life(&full, &config, 10).expect_err("the disk is full");
    assert!(
        matches!(error, Error::Store(_)) && injected.struck(),
        "{error}"
    );
    let latest = runtime
        .block_on(checkpoints(&store).latest(&model()))
        .expect("the store can be read")
        .expect("the last good checkpoint");
    assert_eq!(latest.state.cursor.step, 4);
    assert_eq!(life(&store, &config, 10).expect("with room again"), whole);
}

#[test]
fn dying_between_checkpoints_repeats_the_steps_since_the_last() {
    let config = TrainConfig {
        save_steps: 2,
        ..config()
    };
    let whole = life(&Store::memory(), &config, 10).expect("ten steps");
    let store = Store::memory();
    for step in [1, 3, 5, 9] {
        life(&store, &config, step).expect("some steps");
    }
    assert_eq!(life(&store, &config, 10).expect("the rest"), whole);
}

/// Meets the run with each fault at every store call, from the first look for a checkpoint to the
/// last pruning.
#[test]
fn dying_at_any_store_call_ends_the_same() {
    let config = TrainConfig {
        max_steps: Some(5),
        save_steps: 2,
        save_total_limit: 1,
        ..config()
    };
    let (counted, calls) = updraft_store::faults::count(&Store::memory());
    let whole = life(&counted, &config, 5).expect("five steps");
    let calls = calls.total();
    assert!(
        calls >= 15,
        "{calls} calls hold two checkpoints and a pruning"
    );
    for fault in Fault::ALL {
        for at in 1..=calls {
            let store = Store::memory();
            let (faulty, injected) = inject(&store, fault, at);
            let outcome = life(&faulty, &config, 5);
            assert!(injected.struck(), "{fault:?} at {at}");
            if let Ok(end) = outcome {
                assert_eq!(end, whole, "{fault:?} at {at} was survived");
            }
            let second = life(&store, &config, 5).expect("a second life");
            assert_eq!(second, whole, "{fault:?} at {at}");
        }
    }
}

/// Throws the switch after some steps.
#[derive(Debug)]
struct CancelAfter(u64, CancelToken);

impl Observer for CancelAfter {
    fn on_step(&mut self, stats: &StepStats<'_>) {
        if stats.record.step == self.0 {
            self.1.cancel();
        }
    }
}

#[test]
fn cancelling_writes_a_checkpoint_that_continues() {
    let whole = life(&Store::memory(), &config(), 10).expect("ten steps");
    let (store, runtime, decoder, source) = (Store::memory(), runtime(), decoder(2), source(26));
    let cancel = CancelToken::new();
    let mut trainer = Trainer::new(&decoder, adapter(), &source, config())
        .expect("a run")
        .with_checkpoints(checkpoints(&store), runtime.handle().clone())
        .with_cancel(cancel.clone())
        .with_observer(CancelAfter(3, cancel));
    let error = trainer.run().expect_err("cancelled");
    assert!(matches!(error, Error::Cancelled { step: 3 }), "{error}");
    let saved = runtime
        .block_on(checkpoints(&store).latest(&model()))
        .expect("the store")
        .expect("a checkpoint");
    assert_eq!(saved.state.cursor.step, 3);
    assert_eq!(life(&store, &config(), 10).expect("the rest"), whole);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_old_ones_are_deleted() {
    let (store, runtime) = (Store::memory(), runtime());
    let config = TrainConfig {
        save_steps: 2,
        ..config()
    };
    life(&store, &config, 9).expect("nine steps");
    let steps = || -> Vec<String> {
        let objects = runtime.block_on(store.list(DIR)).expect("a listing");
        let step = |path: &str| path.split('/').nth(5).map(str::to_owned);
        let mut steps: Vec<String> = objects
            .iter()
            .filter_map(|object| step(&object.path))
            .collect();
        steps.dedup();
        steps
    };
    assert_eq!(steps(), ["00000006", "00000008"]);

    let path = format!("{DIR}/00000008/optimizer.safetensors");
    let mut bytes = runtime
        .block_on(store.get(&path))
        .expect("the store")
        .expect("moments")
        .to_vec();
    *bytes.last_mut().expect("bytes") ^= 1;
    runtime
        .block_on(store.put(&path, bytes.into()))
        .expect("damage");
    let latest = runtime
        .block_on(checkpoints(&store).latest(&model()))
        .expect("the store")
        .expect("an older one");
    assert_eq!(latest.state.cursor.step, 6);

    runtime
        .block_on(checkpoints(&store).delete_all())
        .expect("deleted");
    assert!(steps().is_empty());
}

#[test]
fn another_runs_checkpoint_is_refused() {
    let store = Store::memory();
    life(&store, &config(), 5).expect("five steps");
    let error = life(
        &store,
        &TrainConfig {
            learning_rate: 1e-3,
            ..config()
        },
        10,
    )
    .expect_err("other settings");
    assert!(
        matches!(
            error,
            Error::ForeignCheckpoint {
                step: 5,
                what: "TrainConfig"
            }
        ),
        "{error}"
    );

    let (runtime, decoder) = (runtime(), decoder(2));
    let other: Arc<dyn ExampleSource> = Arc::new(source(25));
    let checkpoint = runtime
        .block_on(checkpoints(&store).latest(&model()))
        .expect("the store")
        .expect("a checkpoint");
    let trainer = Trainer::new(&decoder, adapter(), &*other, config()).expect("a run");
    let error = trainer.resume(checkpoint).expect_err("other data");
    assert!(
        matches!(
            error,
            Error::ForeignCheckpoint {
                what: "the data",
                ..
            }
        ),
        "{error}"
    );
    // How often checkpoints are written decides nothing.
    life(
        &store,
        &TrainConfig {
            save_steps: 3,
            ..config()
        },
        10,
    )
    .expect("the same run");
}

/// Every object of a store.
fn contents(store: &Store) -> Vec<(String, Vec<u8>)> {
    let runtime = runtime();
    let objects = runtime.block_on(store.list("")).expect("a listing");
    let read = |path: String| {
        let bytes = runtime.block_on(store.get(&path)).expect("the store");
        (path, bytes.expect("listed").to_vec())
    };
    objects
        .into_iter()
        .map(|object| read(object.path))
        .collect()
}

fn foreign(error: &Error) -> &'static str {
    let Error::ForeignCheckpoint { what, .. } = error else {
        panic!("{error}");
    };
    what
}

/// What a run over another base, or judged by other examples, finds: an error, and the checkpoint
/// stays as it was.
#[test]
fn another_base_or_other_held_out_examples_are_refused_and_nothing_is_lost() {
    let store = Store::memory();
    let runtime = runtime();
    let (decoder, train, held_out) = (decoder(2), source(26), source(5));
    let trainer = |base: &str| {
        let trainer = Trainer::new(&decoder, adapter(), &train, config()).expect("a run");
        trainer
            .with_base(base)
            .with_checkpoints(checkpoints(&store), runtime.handle().clone())
    };
    trainer("one").run_until(5).expect("five steps");
    let before = contents(&store);
    let latest = || runtime.block_on(checkpoints(&store).latest(&model()));
    let newest = || latest().expect("the store").expect("a checkpoint");
    let error = trainer("two").resume(newest()).expect_err("a base");
    assert_eq!(foreign(&error), "the base model");
    let judged = trainer("one").with_evaluation(&held_out);
    let error = judged.resume(newest()).expect_err("held out");
    assert_eq!(foreign(&error), "the held-out data");

    // Nor may it go on from another adapter than it began with.
    let mut other = adapter();
    other.update(|values| values[0] += 1.0).expect("f32");
    let other = Trainer::new(&decoder, other, &train, config()).expect("a run");
    let error = other
        .with_base("one")
        .resume(newest())
        .expect_err("another");
    assert_eq!(foreign(&error), "the adapter it began with");

    // Of another shape its tensors cannot even be read: that is no damage.
    let wider = ModelConfig {
        intermediate_size: 2 * model().intermediate_size,
        ..model()
    };
    let error = runtime
        .block_on(checkpoints(&store).latest(&wider))
        .expect_err("a wider model");
    assert_eq!(foreign(&error), "the base model's shape");
    // Nor is what another version wrote.
    assert_eq!(contents(&store), before);
    let path = format!("{DIR}/00000005/checkpoint.json");
    let manifest = runtime.block_on(store.get(&path)).expect("the store");
    let manifest = String::from_utf8(manifest.expect("there").to_vec()).expect("JSON");
    let newer = manifest.replace("\"format_version\": 2", "\"format_version\": 3");
    assert_ne!(newer, manifest);
    let put = store.put(&path, newer.into_bytes().into());
    runtime.block_on(put).expect("written");
    assert_eq!(foreign(&latest().expect_err("newer")), "the format");
}

/// A checkpoint that claims to stand where the run never does.
#[test]
fn a_cursor_out_of_range_is_an_error() {
    let store = Store::memory();
    let (decoder, train) = (decoder(2), source(26));
    life(&store, &config(), 5).expect("five steps");
    let moves: [fn(&mut Cursor); 4] = [
        |cursor| cursor.window = 1000,
        |cursor| cursor.micro_batch = 1000,
        |cursor| cursor.epoch = 1000,
        |cursor| cursor.step = 10, // The run would be over, untrained.
    ];
    for change in moves {
        let latest = runtime().block_on(checkpoints(&store).latest(&model()));
        let mut checkpoint = latest.expect("the store").expect("a checkpoint");
        change(&mut checkpoint.state.cursor);
        let trainer = Trainer::new(&decoder, adapter(), &train, config()).expect("a run");
        let error = trainer.resume(checkpoint).expect_err("nowhere");
        assert_eq!(foreign(&error), "the place in the data");
    }
}

/// A run whose parameters become so large that no loss follows: the checkpoint before that is kept,
/// though it is the second newest and one is all that is asked for.
#[test]
fn a_run_that_explodes_leaves_a_good_checkpoint() {
    let store = Store::memory();
    let config = TrainConfig {
        save_steps: 1,
        save_total_limit: 1,
        ..config()
    };
    let calm = source(26);
    let decoder = decoder(2);
    let runtime = runtime();
    let one = Checkpoints::new(&store, DIR, 1);
    let mut trainer = Trainer::new(&decoder, adapter(), &calm, config.clone())
        .expect("a run")
        .with_checkpoints(one.clone(), runtime.handle().clone());
    trainer.run_until(4).expect("four steps");
    drop(trainer);
    let kept = || -> Vec<u64> {
        let objects = runtime.block_on(store.list(DIR)).expect("a listing");
        let manifests = objects.iter().filter_map(|object| {
            let folder = object.path.strip_suffix("/checkpoint.json")?;
            folder.rsplit('/').next()?.parse().ok()
        });
        manifests.collect()
    };
    // The newest has not been gone on from.
    assert_eq!(kept(), [3, 4]);
    let latest = || {
        let latest = runtime.block_on(one.latest(&model())).expect("the store");
        latest.expect("a checkpoint")
    };
    let mut exploded = latest();
    let finite = |values: &mut [f32]| values.fill(1e30);
    exploded.adapter.update(finite).expect("f32");
    let trainer = Trainer::new(&decoder, adapter(), &calm, config.clone()).expect("a run");
    let mut trainer = trainer
        .with_checkpoints(one.clone(), runtime.handle().clone())
        .resume(exploded)
        .expect("its own");
    let error = trainer.run().expect_err("no loss");
    assert!(
        matches!(error, Error::LossNotFinite { step: 5, .. }),
        "{error}"
    );
    assert_eq!(kept(), [3, 4]);

    // What is not even finite is not written.
    let mut broken = latest();
    let infinite = |values: &mut [f32]| values[0] = f32::INFINITY;
    broken.adapter.update(infinite).expect("f32");
    let cancel = CancelToken::new();
    cancel.cancel();
    let trainer = Trainer::new(&decoder, adapter(), &calm, config).expect("a run");
    let mut trainer = trainer
        .with_checkpoints(one.clone(), runtime.handle().clone())
        .with_cancel(cancel)
        .resume(broken)
        .expect("its own");
    let before = contents(&store);
    let error = trainer.run().expect_err("not to be saved");
    assert!(
        matches!(error, Error::ParametersNotFinite { step: 4 }),
        "{error}"
    );
    assert_eq!(contents(&store), before);
}
