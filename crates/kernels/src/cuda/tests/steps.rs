//! Clipping and AdamW over several tensors.

use super::super::adamw::{Flat, Norm, Tensors, Trained};
use super::*;
use crate::adamw::AdamW;

/// Parameters of several chunks, their gradients and moments, each in one buffer.
struct Run {
    device: [Buffer<f32>; 4],
    host: [Vec<f32>; 4],
}

/// Tensors of several chunks, with numbers before, between and after them that are nobody's.
const TENSORS: [(std::ops::Range<usize>, usize); 3] = [(3..8, 1), (8..4104, 0), (4107..13_108, 2)];
const LEN: usize = 13_110;
const ADAMW: AdamW = AdamW {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
};

/// The rule of each group: LoRA+ and no decay are others.
fn rules() -> [AdamW; 3] {
    let faster = AdamW {
        learning_rate: 4e-2,
        ..ADAMW
    };
    let undecayed = AdamW {
        weight_decay: 0.0,
        ..faster
    };
    [ADAMW, faster, undecayed]
}

impl Run {
    fn new(gpu: &Gpu) -> Self {
        let squares = random::<f32>(LEN, 4).iter().map(|x| x * x).collect();
        let host = [random(LEN, 1), random(LEN, 2), random(LEN, 3), squares];
        let device = [0, 1, 2, 3].map(|i: usize| gpu.upload(&host[i]).expect("memory"));
        Self { device, host }
    }

    fn step(&mut self, gpu: &Gpu, unscale: f64, max_norm: f64) -> Norm {
        let trained = TENSORS.map(|(range, group)| Trained { range, group });
        let mut tensors = Tensors::new(gpu, &trained, LEN).expect("memory");
        let [param, grad, exp_avg, exp_avg_sq] = &mut self.device;
        let flat = Flat {
            param: param.view_mut(),
            grad: grad.view(),
            exp_avg: exp_avg.view_mut(),
            exp_avg_sq: exp_avg_sq.view_mut(),
        };
        tensors
            .clip(gpu, flat.grad, unscale, max_norm)
            .expect("launched");
        tensors.step(gpu, &rules(), 3, &flat).expect("launched");
        tensors.norm(gpu).expect("finished")
    }
}

#[test]
fn a_step_agrees_with_clipping_and_loss_scaling() {
    for gpu in gpus() {
        for (unscale, max_norm) in [(1.0, 1.0), (1.0, 0.0), (1.0, 1e9), (0.125, 0.5)] {
            let mut run = Run::new(&gpu);
            let norm = run.step(&gpu, unscale, max_norm);
            let [param, grad, exp_avg, exp_avg_sq] = &mut run.host;
            let squares: f64 = TENSORS
                .iter()
                .map(|(range, _)| crate::clip::sum_of_squares(&grad[range.clone()]))
                .sum();
            let expected = squares.sqrt() * unscale;
            assert!(norm.is_finite && (norm.norm / expected - 1.0).abs() < 1e-12);
            let threads = Threads::single();
            let coefficient = unscale * crate::clip::coefficient(expected, max_norm);
            for (range, group) in TENSORS {
                let grad = &mut grad[range.clone()];
                crate::clip::scale(&threads, coefficient, grad);
                let (m, v) = (&mut exp_avg[range.clone()], &mut exp_avg_sq[range.clone()]);
                rules()[group].step(&threads, 3, &mut param[range], grad, m, v);
            }
            for i in [0, 2, 3] {
                let host: Vec<f64> = run.host[i].iter().map(|&x| f64::from(x)).collect();
                check("after the step", &gpu, &run.device[i], &host);
            }
        }
    }
}

#[test]
fn a_step_whose_gradients_overflow_changes_nothing() {
    for gpu in gpus() {
        for bad in [f32::INFINITY, f32::NAN] {
            let mut run = Run::new(&gpu);
            run.host[1][4207] = bad;
            run.device[1] = gpu.upload(&run.host[1]).expect("memory");
            assert!(!run.step(&gpu, 1.0, 1.0).is_finite);
            for i in [0, 2, 3] {
                let after = gpu.download(run.device[i].view()).expect("finished");
                assert_eq!(after, run.host[i]);
            }
        }
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    for gpu in gpus() {
        let after = || {
            let mut run = Run::new(&gpu);
            run.step(&gpu, 1.0, 1.0);
            gpu.download(run.device[0].view()).expect("finished")
        };
        assert_eq!(after(), after());
    }
}

#[cfg(feature = "cuda-emulator")]
#[test]
#[should_panic(expected = "tensors in the order of the buffers")]
fn tensors_that_overlap_are_refused() {
    let trained = [0..5, 4..8].map(|range| Trained { range, group: 0 });
    let _ = Tensors::new(&Gpu::emulated(), &trained, 8);
}

/// The order of the workers shows in the last bits.
#[test]
fn gathered_numbers_are_added_in_the_order_of_workers() {
    for gpu in gpus() {
        for (workers, len) in [(1, 5), (3, 0), (2, 1), (5, 300), (3, 70_001)] {
            let rows: Vec<Vec<f32>> = (0..workers)
                .map(|worker| {
                    let scale = 10.0_f32.powi(3 * worker as i32 - 4);
                    let numbers = random::<f32>(len, worker as u64);
                    numbers.iter().map(|number| number * scale).collect()
                })
                .collect();
            let mut expected = rows[0].clone();
            for row in &rows[1..] {
                expected.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            let gathered = gpu.upload(&rows.concat()).expect("memory");
            let mut sums = poison::<f32>(&gpu, len);
            super::super::gathered::sum(&gpu, gathered.mat(workers, len), &sums.view_mut())
                .expect("launched");
            let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
            let sums = gpu.download(sums.view()).expect("finished");
            assert_eq!(bits(&sums), bits(&expected), "{workers} of {len}");
        }
    }
}
