//! A run on a GPU is the run on the CPU, and goes on after a stop to the bit; on the emulator where that is compiled, and
//! on the first GPU where there is one.

use candle_core::DType;
use updraft_chat::Example;
use updraft_model::{Architecture, Decoder, Gpu, Threads, tiny};
#[cfg(feature = "cuda-emulator")]
use updraft_train::{Error, ExampleSource, check_gpu_memory, estimate_gpu_memory};
use updraft_train::{MemorySource, TrainConfig, Trainer};

#[cfg(feature = "cuda-emulator")]
use crate::world::lora;
use crate::world::{adapter, config, decoder, model, source, span};

pub(crate) fn on_gpu(dtype: DType, gpu: &Gpu) -> Decoder {
    let weights = tiny::weights(&tiny::config(Architecture::Qwen2), 1);
    let threads = Threads::single();
    Decoder::load_on_gpu(&model(), &weights, dtype, gpu, &threads).expect("the tiny model")
}

/// The loss of each of the first steps.
fn losses(decoder: &Decoder, config: &TrainConfig, steps: u64) -> Vec<f64> {
    let source = source(12);
    let mut trainer = Trainer::new(decoder, adapter(), &source, config.clone()).expect("a run");
    trainer.run_until(steps).expect("steps");
    let (_, log) = trainer.into_parts();
    log.iter().map(|record| record.loss).collect()
}

#[test]
fn losses_are_those_of_the_cpu() {
    for gpu in tiny::gpus() {
        let config = config();
        let expected = losses(&decoder(1), &config, 3);
        let wide = losses(&on_gpu(DType::F32, &gpu), &config, 3);
        let narrow = losses(&on_gpu(DType::BF16, &gpu), &config, 3);
        assert_eq!((wide.len(), narrow.len()), (3, 3));
        for ((expected, wide), narrow) in expected.iter().zip(&wide).zip(&narrow) {
            assert!((wide / expected - 1.0).abs() < 1e-5, "{wide}, {expected}");
            assert!(
                (narrow / expected - 1.0).abs() < 1e-2,
                "{narrow}, {expected}"
            );
        }
    }
}

#[test]
fn a_run_that_stopped_goes_on_to_the_bit() {
    for gpu in tiny::gpus() {
        let (config, source) = (config(), source(12));
        let decoder = on_gpu(DType::BF16, &gpu);
        let bits = |trainer: Trainer<'_>| -> Vec<u32> {
            let (adapter, _) = trainer.into_parts();
            let values = adapter.values().expect("readable");
            values.iter().map(|value| value.to_bits()).collect()
        };
        let start = || Trainer::new(&decoder, adapter(), &source, config.clone()).expect("a run");
        let mut whole = start();
        whole.run_until(4).expect("steps");
        let mut first = start();
        first.run_until(2).expect("steps");
        let checkpoint = first.checkpoint().expect("a checkpoint");
        assert_eq!(checkpoint.state.machine.gpu, gpu.name().ok());
        let mut second = start().resume(checkpoint).expect("the same run");
        second.run_until(4).expect("steps");
        assert_eq!(bits(second), bits(whole));
    }
}

/// One token is learned in each step, so that a loss of 65,536 times its size overflows.
#[test]
fn f16_steps_that_overflow_change_nothing_and_halve_the_scale() {
    for gpu in tiny::gpus() {
        let example = |i: u32| Example {
            input_ids: (0..8).map(|t| (i * 31 + t * t * 5) % 96).collect(),
            loss_spans: span(7..8),
        };
        let source = MemorySource::new("one token", (0..12).map(example).collect());
        let settings = |fp16| TrainConfig {
            fp16,
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 1,
            warmup_steps: 0,
            ..config()
        };
        let decoder = on_gpu(DType::F16, &gpu);
        let mut trainer =
            Trainer::new(&decoder, adapter(), &source, settings(true)).expect("a run");
        let mut overflows = 0;
        for step in 1..=6 {
            let before = trainer.adapter().values().expect("readable");
            trainer.run_until(step).expect("no error");
            let record = trainer.log()[step as usize - 1];
            let after = trainer.adapter().values().expect("readable");
            assert_eq!(record.overflowed, before == after, "step {step}");
            overflows += usize::from(record.overflowed);
        }
        assert!((1..6).contains(&overflows), "{overflows} steps overflowed");

        // Stopped and continued, the scale is what it was.
        let mut first = Trainer::new(&decoder, adapter(), &source, settings(true)).expect("a run");
        first.run_until(3).expect("no error");
        let checkpoint = first.checkpoint().expect("a checkpoint");
        let mut second = Trainer::new(&decoder, adapter(), &source, settings(true)).expect("a run");
        second = second.resume(checkpoint).expect("the same run");
        second.run_until(6).expect("no error");
        assert_eq!(second.log(), trainer.log());
        let bits = |trainer: &Trainer<'_>| trainer.adapter().values().expect("readable");
        assert_eq!(bits(&second), bits(&trainer));

        let both = TrainConfig {
            bf16: true,
            ..settings(true)
        };
        let refused = Trainer::new(&decoder, adapter(), &source, both).err();
        assert!(refused.expect("both").to_string().contains("fp16"));
    }
}

/// As much memory as three rows take: twelve are refused before anything is loaded, fail with what fits when insisted on,
/// and what was said to fit does.
#[cfg(feature = "cuda-emulator")] // which has as much memory as is wanted
#[test]
fn out_of_memory_names_the_estimate_and_a_micro_batch_that_fits() {
    let data = source(26);
    let settings = |rows| TrainConfig {
        bf16: true,
        per_device_train_batch_size: rows,
        gradient_accumulation_steps: 1,
        max_steps: Some(2),
        ..config()
    };
    let estimate = |rows| estimate_gpu_memory(&model(), &lora(), data.plan(), &settings(rows));
    let limit = estimate(3).total();
    let gpu = Gpu::emulated_with(limit);
    let check = |config| check_gpu_memory(&model(), &lora(), data.plan(), config, &gpu);
    let refused = check(&settings(12)).expect_err("too much");
    let Error::OutOfMemory {
        free_bytes, fits, ..
    } = refused
    else {
        panic!("{refused}");
    };
    assert_eq!((free_bytes, fits.batch_size), (limit, Some(3)));

    let decoder = on_gpu(DType::BF16, &gpu);
    let run = |rows| {
        Trainer::new(&decoder, adapter(), &data, settings(rows))
            .expect("a run")
            .run()
    };
    let error = run(12).expect_err("too much");
    assert!(
        error
            .to_string()
            .contains("per_device_train_batch_size 3 fits"),
        "{error}"
    );
    let Error::GpuOutOfMemory {
        asked_bytes,
        estimate_bytes,
        available_bytes,
        fits: then,
    } = error
    else {
        panic!("{error}");
    };
    assert!(asked_bytes > 0);
    assert_eq!(
        (estimate_bytes, available_bytes),
        (estimate(12).total(), limit)
    );
    assert_eq!(then, fits);
    let report = run(3).expect("it fits");
    let peak = report.peak_gpu_memory_bytes.expect("on a GPU");
    assert!(peak <= limit, "{peak} of {limit}");
}
