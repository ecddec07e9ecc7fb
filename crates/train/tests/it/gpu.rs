//! A run on a GPU is the run on the CPU, and goes on after a stop to the bit; on the emulator where that is compiled, and
//! on the first GPU where there is one.

use candle_core::DType;
use updraft_model::{Architecture, Decoder, Gpu, Threads, tiny};
use updraft_train::{TrainConfig, Trainer};

use crate::world::{adapter, config, decoder, model, source};

fn gpus() -> Vec<Gpu> {
    let mut gpus = Vec::new();
    #[cfg(feature = "cuda-emulator")]
    gpus.push(Gpu::emulated());
    #[cfg(feature = "cuda")]
    match Gpu::new(0) {
        Ok(gpu) => gpus.push(gpu),
        Err(error) => assert!(
            std::env::var_os("UPDRAFT_NEEDS_GPU").is_none(),
            "UPDRAFT_NEEDS_GPU is set: {error}"
        ),
    }
    gpus
}

fn on_gpu(dtype: DType, gpu: &Gpu) -> Decoder {
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
    for gpu in gpus() {
        let config = config();
        let expected = losses(&decoder(1), &config, 3);
        let wide = losses(&on_gpu(DType::F32, &gpu), &config, 3);
        let narrow = losses(&on_gpu(DType::BF16, &gpu), &config, 3);
        assert_eq!((wide.len(), narrow.len()), (3, 3));
        for ((expected, wide), narrow) in expected.iter().zip(&wide).zip(&narrow) {
            assert!((wide / expected - 1.0).abs() < 1e-5, "{wide}, {expected}");
            assert!((narrow / expected - 1.0).abs() < 1e-2, "{narrow}, {expected}");
        }
    }
}

#[test]
fn a_run_that_stopped_goes_on_to_the_bit() {
    for gpu in gpus() {
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
        let mut second = start().resume(checkpoint).expect("the same run");
        second.run_until(4).expect("steps");
        assert_eq!(bits(second), bits(whole));
    }
}
