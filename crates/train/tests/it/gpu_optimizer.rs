//! With the optimizer on the GPU a run is what it is with the optimizer on the host, and may go on there or here.

use candle_core::DType;
use updraft_kernels::Threads;
#[cfg(feature = "cuda-emulator")]
use updraft_model::Gpu;
use updraft_model::{Adapter, tiny};
use updraft_train::optim::{AdamW, OptimizerState};
use updraft_train::{Optimizer, OptimizerKind, Result, StepRecord, TrainConfig, Trainer};

use crate::gpu::on_gpu;
use crate::world::{adapter, config, decoder, source};

/// AdamW without its power to work on a GPU, as a user's own optimizer may be.
#[derive(Debug)]
struct OnTheHost(AdamW);

impl OnTheHost {
    fn new(config: &TrainConfig) -> Self {
        Self(AdamW::new(config, &Threads::single()))
    }
}

impl Optimizer for OnTheHost {
    fn begin_step(&mut self, learning_rate: f64) {
        self.0.begin_step(learning_rate);
    }
    fn update(&mut self, name: &str, values: &mut [f32], gradient: &[f32]) -> Result<()> {
        self.0.update(name, values, gradient)
    }
    fn state(&self) -> Result<OptimizerState<'_>> {
        self.0.state()
    }
    fn restore(&mut self, state: OptimizerState<'_>) -> Result<()> {
        self.0.restore(state)
    }
}

/// Everything that a step does to parameters: warm-up, decay, LoRA+, clipping.
fn settings() -> TrainConfig {
    TrainConfig {
        loraplus_lr_ratio: Some(4.0),
        learning_rate: 5e-3,
        ..config()
    }
}

struct End {
    log: Vec<StepRecord>,
    adapter: Vec<f32>,
    /// Of both moments of all parameters.
    moments: Vec<f32>,
}

fn end(trainer: Trainer<'_>) -> End {
    let state = trainer.checkpoint().expect("readable").optimizer;
    let moments = state.tensors.values().flat_map(|values| values.to_vec());
    let moments = moments.collect();
    let (adapter, log) = trainer.into_parts();
    let adapter = adapter.values().expect("readable");
    End {
        log,
        adapter,
        moments,
    }
}

fn check_close(end: &End, reference: &End, tolerance: f64) {
    assert_eq!(end.log.len(), reference.log.len());
    for (step, expected) in end.log.iter().zip(&reference.log) {
        let what = format!("{step:?} {expected:?}");
        assert!(
            (step.loss / expected.loss - 1.0).abs() < tolerance,
            "{what}"
        );
        let norms = step.grad_norm / expected.grad_norm.max(1e-300) - 1.0;
        assert!(norms.abs() < 10.0 * tolerance, "{what}");
        assert_eq!(step.learning_rate, expected.learning_rate);
        assert_eq!(step.overflowed, expected.overflowed);
    }
    let largest = |a: &[f32], b: &[f32]| {
        assert_eq!(a.len(), b.len());
        let differences = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
        differences.fold(0.0, f64::max)
    };
    let adapter = largest(&end.adapter, &reference.adapter);
    assert!(adapter < tolerance, "{adapter}");
    let moments = largest(&end.moments, &reference.moments);
    assert!(moments < tolerance, "{moments}");
}

#[test]
fn a_run_is_the_one_with_the_optimizer_on_the_host() {
    for gpu in tiny::gpus() {
        let decoder = on_gpu(DType::F32, &gpu);
        for (max_grad_norm, steps) in [(0.5, 4), (0.0, 2)] {
            let config = TrainConfig {
                max_grad_norm,
                ..settings()
            };
            let source = source(12);
            let run = |optimizer: Option<OnTheHost>| {
                let mut trainer =
                    Trainer::new(&decoder, adapter(), &source, config.clone()).expect("a run");
                if let Some(optimizer) = optimizer {
                    trainer = trainer.with_optimizer(optimizer);
                }
                trainer.run_until(steps).expect("steps");
                end(trainer)
            };
            let there = run(None);
            assert_eq!(there.log.len() as u64, steps);
            check_close(&there, &run(Some(OnTheHost::new(&config))), 1e-6);
        }
    }
}

/// Bits end where they would have without a stop, and on another kind of machine close to that.
#[test]
fn a_run_stops_on_one_and_goes_on_on_the_other() {
    for gpu in tiny::gpus() {
        let (there, here) = (on_gpu(DType::F32, &gpu), decoder(1));
        let (config, source) = (settings(), source(12));
        let start = |decoder| Trainer::new(decoder, adapter(), &source, config.clone());
        let begin = |decoder| {
            let mut trainer = start(decoder).expect("a run");
            trainer.run_until(2).expect("steps");
            trainer
        };
        let go_on = |mut trainer: Trainer<'_>| {
            trainer.run_until(4).expect("steps");
            end(trainer)
        };
        let resumed = |of: &Trainer<'_>, decoder| {
            let checkpoint = of.checkpoint().expect("readable");
            let second = start(decoder).expect("a run");
            go_on(second.resume(checkpoint).expect("the same run"))
        };
        let (began_there, began_here) = (begin(&there), begin(&here));
        let stopped_there = resumed(&began_there, &there);
        let from_there_to_here = resumed(&began_there, &here);
        let from_here_to_there = resumed(&began_here, &there);
        let (on_there, on_here) = (go_on(began_there), go_on(began_here));
        assert_eq!(stopped_there.adapter, on_there.adapter);
        assert_eq!(stopped_there.moments, on_there.moments);
        assert_eq!(stopped_there.log, on_there.log);
        for end in [on_there, from_there_to_here, from_here_to_there] {
            check_close(&end, &on_here, 1e-5);
        }
    }
}

/// In f16 with loss scaling: steps that overflow included.
#[test]
fn loss_scaling_is_taken_out_there_as_here() {
    for gpu in tiny::gpus() {
        let decoder = on_gpu(DType::F16, &gpu);
        let config = TrainConfig {
            fp16: true,
            ..settings()
        };
        let source = source(12);
        let run = |optimizer: Option<OnTheHost>| {
            let mut trainer =
                Trainer::new(&decoder, adapter(), &source, config.clone()).expect("a run");
            if let Some(optimizer) = optimizer {
                trainer = trainer.with_optimizer(optimizer);
            }
            trainer.run_until(3).expect("steps");
            end(trainer)
        };
        // An adapter that differs by a rounding in f32 may differ by one in f16, in which losses are computed.
        check_close(&run(None), &run(Some(OnTheHost::new(&config))), 1e-3);
    }
}

/// Those that work on the host, plain descent among them, and evaluations between the steps.
#[test]
fn evaluations_and_the_best_adapter_are_of_the_newest_values() {
    for gpu in tiny::gpus() {
        let (there, here) = (on_gpu(DType::F32, &gpu), decoder(1));
        for optim in [OptimizerKind::AdamwTorch, OptimizerKind::Sgd] {
            let config = TrainConfig {
                eval_steps: Some(2),
                load_best_model_at_end: true,
                optim,
                max_steps: Some(4),
                ..settings()
            };
            let (source, held_out) = (source(12), source(3));
            let run = |decoder| {
                let mut trainer = Trainer::new(decoder, adapter(), &source, config.clone())
                    .expect("a run")
                    .with_evaluation(&held_out);
                trainer.run().expect("four steps");
                let evals: Vec<f64> = trainer.evals().iter().map(|eval| eval.eval_loss).collect();
                let (adapter, _): (Adapter, _) = trainer.into_parts();
                (evals, adapter.values().expect("readable"))
            };
            let ((evals, values), (expected, best)) = (run(&there), run(&here));
            assert_eq!((evals.len(), values.len()), (2, best.len()));
            for (eval, expected) in evals.iter().zip(&expected) {
                assert!((eval - expected).abs() < 1e-4, "{eval} {expected}");
            }
            for (value, expected) in values.iter().zip(&best) {
                assert!((value - expected).abs() < 1e-4, "{value} {expected}");
            }
        }
    }
}

/// Nine tokens each, five of them trained.
#[cfg(feature = "cuda-emulator")]
fn of_one_length() -> updraft_train::MemorySource {
    let example = |i: u32| updraft_chat::Example {
        input_ids: (0..9).map(|t| (i * 31 + t * t * 5) % 96).collect(),
        loss_spans: crate::world::span(4..9),
    };
    updraft_train::MemorySource::new("of one length", (0..48).map(example).collect())
}

/// Of a step comes back the norm, and of each micro-batch its losses; what goes there is the batch.
#[cfg(feature = "cuda-emulator")] // which counts what is copied
#[test]
fn only_batches_go_there_and_losses_and_norms_come_back() {
    let source = of_one_length();
    let (rows, micro_batches) = (3, 2);
    // Ids, positions, rows and labels, and the borders of each sequence; as `nothing_is_copied_twice` in `model` counts.
    let batch = |tokens: u64, labels: u64| 4 * (2 * tokens + 2 * labels + 6 * rows);
    let (up, down) = (
        micro_batches * batch(9 * rows, 5 * rows),
        micro_batches * 4 * 5 * rows + 16,
    );
    for dtype in [DType::F32, DType::BF16] {
        let gpu = Gpu::emulated();
        let decoder = on_gpu(dtype, &gpu);
        let config = TrainConfig {
            fp16: false,
            bf16: dtype == DType::BF16,
            save_steps: 100,
            ..settings()
        };
        let mut trainer = Trainer::new(&decoder, adapter(), &source, config).expect("a run");
        trainer.run_until(1).expect("a step"); // on which adapter and tables go there
        for step in 2..=3 {
            let before = gpu.emulated_traffic();
            trainer.run_until(step).expect("a step");
            let after = gpu.emulated_traffic();
            assert_eq!(after.uploaded - before.uploaded, up, "{dtype:?}");
            assert_eq!(after.downloaded - before.downloaded, down, "{dtype:?}");
        }
    }
}

/// A run holds no more than was estimated, and not much less.
#[cfg(feature = "cuda-emulator")] // which counts what is held
#[test]
fn a_run_takes_what_was_estimated() {
    use crate::world::{lora, model};
    use updraft_train::{ExampleSource, estimate_gpu_memory};

    for (dtype, optim, rows) in [
        (DType::F32, OptimizerKind::AdamwTorch, 1),
        (DType::F32, OptimizerKind::AdamwTorch, 8),
        (DType::BF16, OptimizerKind::AdamwTorch, 1),
        (DType::BF16, OptimizerKind::AdamwTorch, 8),
        (DType::BF16, OptimizerKind::Sgd, 8),
    ] {
        let config = TrainConfig {
            bf16: dtype == DType::BF16,
            optim,
            per_device_train_batch_size: rows,
            ..settings()
        };
        let source = of_one_length();
        let gpu = Gpu::emulated();
        let decoder = on_gpu(dtype, &gpu);
        let mut trainer =
            Trainer::new(&decoder, adapter(), &source, config.clone()).expect("a run");
        let report = trainer.run_until(2).expect("steps");
        let estimate = estimate_gpu_memory(&model(), &lora(), source.plan(), &config);
        let held = report.peak_gpu_memory_bytes.expect("on a GPU");
        let share = held as f64 / estimate.total() as f64;
        assert!(
            (0.75..=1.0).contains(&share),
            "{dtype:?} {optim:?} {rows}: {share:.3} of {estimate:?}"
        );
    }
}
