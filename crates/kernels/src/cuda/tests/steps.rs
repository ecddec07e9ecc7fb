//! Clipping and AdamW over several tensors.

use super::super::adamw::{Norm, Tensors, Trained};
use super::*;
use crate::adamw::AdamW;

/// Parameters of several chunks, their gradients and moments.
struct Run {
    device: Vec<[Buffer<f32>; 4]>,
    host: Vec<[Vec<f32>; 4]>,
}

const LENGTHS: [usize; 3] = [5, 4096, 9001];
const ADAMW: AdamW = AdamW {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
};

impl Run {
    fn new(gpu: &Gpu) -> Self {
        let host: Vec<[Vec<f32>; 4]> = LENGTHS
            .iter()
            .map(|&len| {
                let seed = len as u64;
                let squares = random::<f32>(len, seed + 3).iter().map(|x| x * x).collect();
                [
                    random(len, seed),
                    random(len, seed + 1),
                    random(len, seed + 2),
                    squares,
                ]
            })
            .collect();
        let upload =
            |values: &[Vec<f32>; 4]| [0, 1, 2, 3].map(|i| gpu.upload(&values[i]).expect("memory"));
        Self {
            device: host.iter().map(upload).collect(),
            host,
        }
    }

    fn step(&mut self, gpu: &Gpu, unscale: f64, max_norm: f64) -> Norm {
        let trained: Vec<Trained<'_>> = self
            .device
            .iter_mut()
            .map(|[param, grad, exp_avg, exp_avg_sq]| Trained {
                param: param.view_mut(),
                grad: grad.view(),
                exp_avg: exp_avg.view_mut(),
                exp_avg_sq: exp_avg_sq.view_mut(),
            })
            .collect();
        let mut tensors = Tensors::new(gpu, &trained).expect("memory");
        tensors.clip(gpu, unscale, max_norm).expect("launched");
        tensors.step(gpu, &ADAMW, 3).expect("launched");
        tensors.norm(gpu).expect("finished")
    }
}

#[test]
fn a_step_agrees_with_clipping_and_loss_scaling() {
    for gpu in gpus() {
        for (unscale, max_norm) in [(1.0, 1.0), (1.0, 0.0), (1.0, 1e9), (0.125, 0.5)] {
            let mut run = Run::new(&gpu);
            let norm = run.step(&gpu, unscale, max_norm);
            let squares: f64 = run
                .host
                .iter()
                .map(|of| crate::clip::sum_of_squares(&of[1]))
                .sum();
            let expected = squares.sqrt() * unscale;
            assert!(norm.is_finite && (norm.norm / expected - 1.0).abs() < 1e-12);
            let threads = Threads::single();
            let coefficient = unscale * crate::clip::coefficient(expected, max_norm);
            for (host, device) in run.host.iter_mut().zip(&run.device) {
                let [param, grad, exp_avg, exp_avg_sq] = host;
                crate::clip::scale(&threads, coefficient, grad);
                ADAMW.step(&threads, 3, param, grad, exp_avg, exp_avg_sq);
                for (i, host) in [(0, param), (2, exp_avg), (3, exp_avg_sq)] {
                    let host: Vec<f64> = host.iter().map(|&x| f64::from(x)).collect();
                    check("after the step", &gpu, &device[i], &host);
                }
            }
        }
    }
}

#[test]
fn a_step_whose_gradients_overflow_changes_nothing() {
    for gpu in gpus() {
        for bad in [f32::INFINITY, f32::NAN] {
            let mut run = Run::new(&gpu);
            run.host[1][1][7] = bad;
            run.device[1][1] = gpu.upload(&run.host[1][1]).expect("memory");
            assert!(!run.step(&gpu, 1.0, 1.0).is_finite);
            for (host, device) in run.host.iter().zip(&run.device) {
                for i in [0, 2, 3] {
                    assert_eq!(gpu.download(device[i].view()).expect("finished"), host[i]);
                }
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
            let bits = |of: &[Buffer<f32>; 4]| gpu.download(of[0].view()).expect("finished");
            run.device.iter().map(bits).collect::<Vec<_>>()
        };
        assert_eq!(after(), after());
    }
}
