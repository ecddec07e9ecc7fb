//! Ways to compute the same thing that must agree.

use candle_core::Device;
use updraft_model::{Adapter, LoraConfig};
use updraft_train::{StepRecord, TrainConfig, Trainer};

use crate::world::{adapter, config, decoder, lora, model, source};

/// Trains and returns the log and the adapter's values.
fn run(config: TrainConfig, num_threads: usize) -> (Vec<StepRecord>, Vec<f32>) {
    run_adapter(adapter(), config, num_threads)
}

fn run_adapter(
    adapter: Adapter,
    config: TrainConfig,
    num_threads: usize,
) -> (Vec<StepRecord>, Vec<f32>) {
    let (decoder, source) = (decoder(num_threads), source(24));
    let mut trainer = Trainer::new(&decoder, adapter, &source, config).expect("a run");
    trainer.run().expect("it trains");
    let (adapter, log) = trainer.into_parts();
    (log, adapter.values().expect("f32"))
}

fn check_close(left: &(Vec<StepRecord>, Vec<f32>), right: &(Vec<StepRecord>, Vec<f32>)) {
    assert_eq!(left.0.len(), right.0.len());
    for (left, right) in left.0.iter().zip(&right.0) {
        assert_eq!(
            (left.step, left.trained_tokens),
            (right.step, right.trained_tokens)
        );
        assert!(
            (left.loss - right.loss).abs() < 1e-5,
            "{left:?} against {right:?}"
        );
        assert!(
            (left.grad_norm / right.grad_norm - 1.0).abs() < 1e-4,
            "{left:?} against {right:?}"
        );
    }
    let worst = left
        .1
        .iter()
        .zip(&right.1)
        .map(|(l, r)| (l - r).abs())
        .fold(0.0, f32::max);
    assert!(worst < 1e-4, "adapters differ by {worst:e}");
}

#[test]
fn accumulation_four_times_two_equals_one_times_eight() {
    let split = |batch, accumulate| TrainConfig {
        per_device_train_batch_size: batch,
        gradient_accumulation_steps: accumulate,
        max_steps: Some(6),
        ..config()
    };
    check_close(&run(split(2, 4), 2), &run(split(8, 1), 2));
}

#[test]
fn dropout_and_noise_do_not_depend_on_how_a_step_is_cut() {
    let lora = LoraConfig {
        lora_dropout: 0.2,
        ..lora()
    };
    let noisy = |batch, accumulate, threads| {
        let config = TrainConfig {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulate,
            max_steps: Some(4),
            neftune_noise_alpha: Some(5.0),
            ..config()
        };
        let adapter = Adapter::init(&lora, &model(), 7, &Device::Cpu).expect("an adapter");
        run_adapter(adapter, config, threads)
    };
    let whole = noisy(8, 1, 1);
    check_close(&noisy(2, 4, 2), &whole);
    let calm = run(
        TrainConfig {
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            max_steps: Some(4),
            ..config()
        },
        1,
    );
    assert_ne!(calm.0[0].loss, whole.0[0].loss);
}

/// One step holds all examples, so packing only changes how they are laid out.
#[test]
fn packed_equals_unpacked() {
    let whole = TrainConfig {
        per_device_train_batch_size: 24,
        gradient_accumulation_steps: 1,
        ..config()
    };
    let packed = TrainConfig {
        packing: true,
        ..whole.clone()
    };
    check_close(&run(whole, 2), &run(packed, 2));
}

#[test]
fn one_thread_equals_two_within_rounding() {
    check_close(&run(config(), 1), &run(config(), 2));
}

#[test]
fn recomputed_equals_stored() {
    let recomputed = TrainConfig {
        gradient_checkpointing: true,
        ..config()
    };
    assert_eq!(run(config(), 2), run(recomputed, 2));
}

#[test]
fn the_same_run_twice_is_the_same_to_the_bit() {
    assert_eq!(run(config(), 2), run(config(), 2));
}

#[test]
fn training_learns() {
    let config = TrainConfig {
        max_steps: Some(150),
        max_grad_norm: 1.0,
        ..config()
    };
    let (log, _) = run(config, 2);
    let (first, last) = (log[0].loss, log[149].loss);
    assert!(last < 0.5 * first, "loss {first} to {last}");
}
