//! Attention over packed sequences.

use super::super::attention;
use super::*;

/// Head dims of tensor cores and others, groups of heads, lengths around the tiles' own.
pub(super) fn attention_agrees<T: Number>(gpu: &Gpu) {
    for (head_dim, num_heads, num_kv_heads) in [(64, 4, 2), (128, 2, 1), (24, 2, 1)] {
        let heads = heads(head_dim, num_heads, num_kv_heads);
        for lengths in [&[1_usize, 15, 16][..], &[17, 63], &[64, 65], &[0, 129]] {
            let case = AttentionCase::<T>::new(gpu, &heads, lengths);
            let (out, lse, dqkv) = case.run(gpu);
            let (expected_out, expected_lse, expected_dqkv) = case.expect();
            let what = format!("head dim {head_dim}, lengths {lengths:?}");
            close::<T>(&format!("out, {what}"), &out, &expected_out);
            close::<T>(&format!("lse, {what}"), &lse, &expected_lse);
            let (q, kv) = (num_heads * head_dim, num_kv_heads * head_dim);
            for (name, cols) in [("dq", 0..q), ("dk", q..q + kv), ("dv", q + kv..q + 2 * kv)] {
                let part = |all: &[f64]| -> Vec<f64> {
                    all.chunks(q + 2 * kv)
                        .flat_map(|row| row[cols.clone()].to_vec())
                        .collect()
                };
                close::<T>(
                    &format!("{name}, {what}"),
                    &part(&dqkv),
                    &part(&expected_dqkv),
                );
            }
        }
    }
}

/// What a sequence gets, and its gradients, have the same bits beside any other sequence of the same length.
pub(super) fn attention_of_a_sequence_ignores_its_neighbours<T: Number>(gpu: &Gpu) {
    for head_dim in [64, 16] {
        let heads = heads(head_dim, 2, 1);
        let lengths = [37_usize, 70];
        let mut case = AttentionCase::<T>::new(gpu, &heads, &lengths);
        let (out, lse, dqkv) = case.run(gpu);
        let width = 4 * head_dim;
        let mut changed: Vec<f32> = case.qkv.host.iter().map(|&x| x as f32).collect();
        for value in &mut changed[..lengths[0] * width] {
            *value = -3.0 * *value + 1.0;
        }
        case.qkv = of_values(gpu, &changed);
        let (out_after, lse_after, dqkv_after) = case.run(gpu);
        assert_eq!(
            out[lengths[0] * 2 * head_dim..],
            out_after[lengths[0] * 2 * head_dim..]
        );
        assert_eq!(lse[lengths[0] * 2..], lse_after[lengths[0] * 2..]);
        assert_eq!(dqkv[lengths[0] * width..], dqkv_after[lengths[0] * width..]);
        assert_ne!(
            out[..lengths[0] * 2 * head_dim],
            out_after[..lengths[0] * 2 * head_dim]
        );
    }
}

pub(super) fn heads(head_dim: usize, num_heads: usize, num_kv_heads: usize) -> Heads<f32> {
    Heads {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
    }
}

struct AttentionCase<T> {
    heads: Heads<f32>,
    seq_starts: Vec<u32>,
    qkv: Input<T>,
    dout: Input<T>,
}

impl<T: Number> AttentionCase<T> {
    fn new(gpu: &Gpu, heads: &Heads<f32>, lengths: &[usize]) -> Self {
        let mut seq_starts = vec![0_u32];
        for &length in lengths {
            seq_starts.push(seq_starts[seq_starts.len() - 1] + length as u32);
        }
        let rows = *seq_starts.last().expect("a sequence") as usize;
        let width = heads.num_heads * heads.head_dim;
        let all = width + 2 * heads.num_kv_heads * heads.head_dim;
        Self {
            heads: *heads,
            seq_starts,
            qkv: input(gpu, rows * all, 1),
            dout: input(gpu, rows * width, 2),
        }
    }

    fn rows(&self) -> usize {
        *self.seq_starts.last().expect("a sequence") as usize
    }

    fn widths(&self) -> (usize, usize) {
        let d = self.heads.head_dim;
        (self.heads.num_heads * d, self.heads.num_kv_heads * d)
    }

    fn run(&self, gpu: &Gpu) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let (rows, (q, kv)) = (self.rows(), self.widths());
        let sequences = attention::Sequences::new(gpu, &self.seq_starts).expect("memory");
        let all = self.qkv.device.mat(rows, q + 2 * kv);
        let qkv = attention::Qkv {
            q: all.cols(0..q),
            k: all.cols(q..q + kv),
            v: all.cols(q + kv..q + 2 * kv),
        };
        // Room behind each row of the output, none behind those of its gradient.
        let stride = q + 8;
        let mut out = poison::<T>(gpu, rows * stride);
        let mut lse = poison::<f32>(gpu, rows * self.heads.num_heads);
        let (out_mat, lse_view) = (out.mat_mut(rows, stride).cols(0..q), lse.view_mut());
        attention::forward(gpu, &self.heads, &sequences, qkv, &out_mat, &lse_view)
            .expect("launched");
        let mut dqkv = poison::<T>(gpu, rows * (q + 2 * kv));
        let (dq, rest) = dqkv.mat_mut(rows, q + 2 * kv).split_cols(q);
        let (dk, dv) = rest.split_cols(kv);
        let saved = attention::Saved {
            out: out.mat(rows, stride).cols(0..q),
            lse: lse.view(),
        };
        let dout = self.dout.device.mat(rows, q);
        let grads = attention::QkvGrads { dq, dk, dv };
        attention::backward(gpu, &self.heads, &sequences, qkv, saved, dout, &grads)
            .expect("launched");
        let out = together(&values(gpu, &out), q, stride);
        (out, values(gpu, &lse), values(gpu, &dqkv))
    }

    fn expect(&self) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let (rows, (q, kv)) = (self.rows(), self.widths());
        let threads = Threads::single();
        let heads = Heads {
            num_heads: self.heads.num_heads,
            num_kv_heads: self.heads.num_kv_heads,
            head_dim: self.heads.head_dim,
            scale: 1.0 / (self.heads.head_dim as f64).sqrt(),
        };
        let all = Mat::new(&self.qkv.host, rows, q + 2 * kv);
        let qkv = crate::attention::Qkv {
            q: all.cols(0..q),
            k: all.cols(q..q + kv),
            v: all.cols(q + kv..q + 2 * kv),
        };
        let mut out = vec![0.0; rows * q];
        let mut lse = vec![0.0; rows * heads.num_heads];
        let out_mat = MatMut::new(&mut out, rows, q);
        crate::attention::forward(&threads, &heads, &self.seq_starts, qkv, out_mat, &mut lse);
        let mut dqkv = vec![0.0; rows * (q + 2 * kv)];
        let (dq, rest) = MatMut::new(&mut dqkv, rows, q + 2 * kv).split_cols(q);
        let (dk, dv) = rest.split_cols(kv);
        let saved = crate::attention::Saved {
            out: Mat::new(&out, rows, q),
            lse: &lse,
        };
        let dout = Mat::new(&self.dout.host, rows, q);
        let grads = crate::attention::QkvGrads { dq, dk, dv };
        crate::attention::backward(&threads, &heads, &self.seq_starts, qkv, saved, dout, grads);
        (out, lse, dqkv)
    }
}
