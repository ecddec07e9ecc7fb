//! How close do the kernels come to what the GPU can do?
//!
//! Qwen2.5-0.5B's shapes in bf16. What only moves memory is measured against the bandwidth of a copy, what multiplies
//! against the rate of a large product by cuBLAS, both measured in the same run. `benches/peers/torch_kernels.py` asks torch for
//! the same. Prints a table for `benches/NOTES.md`:
//!
//! ```sh
//! cargo bench -p updraft-kernels --features cuda --bench cuda
//! ```

#![expect(clippy::print_stdout, reason = "its output is the table")]

use std::time::Instant;

use half::bf16;
use updraft_kernels::adamw::AdamW;
use updraft_kernels::attention::Heads;
use updraft_kernels::cuda::{
    Buffer, Error, Gpu, adamw, attention, linear, linear_cross_entropy, paged_attention, rms_norm,
    rope, sampling, swiglu,
};

const HIDDEN: usize = 896;
const INNER: usize = 4864;
const HEADS: Heads<f32> = Heads {
    num_heads: 14,
    num_kv_heads: 2,
    head_dim: 64,
    scale: 0.125,
};
const VOCAB: usize = 151_936;
/// Enough that nothing stays in the caches.
const TOKENS: usize = 65_536;
const REPEATS: u32 = 20;

fn main() -> Result<(), Error> {
    let gpu = Gpu::new(0)?;
    let bench = Bench::new(gpu)?;
    bench.row_wise()?;
    bench.attention(1024)?;
    bench.attention(4096)?;
    bench.head()?;
    bench.pages(256, 2048, 1)?;
    bench.pages(1, 131_072, 1)?;
    bench.pages(4, 4096, 4096)?;
    bench.sampling()?;
    bench.optimizer()
}

struct Bench {
    gpu: Gpu,
    /// Bytes read and written by a copy, per second.
    bandwidth: f64,
    /// Operations of a large product, per second.
    rate: f64,
}

impl Bench {
    fn new(gpu: Gpu) -> Result<Self, Error> {
        let mut new = Self {
            gpu,
            bandwidth: 1.0,
            rate: 1.0,
        };
        let bytes = 1 << 30;
        let (from, mut to) = (new.gpu.zeros::<u8>(bytes)?, new.gpu.zeros::<u8>(bytes)?);
        let gpu = new.gpu.clone();
        let copied = new.seconds(|| gpu.copy(from.view(), &to.view_mut()))?;
        new.bandwidth = 2.0 * bytes as f64 / copied;
        drop((from, to));
        let size = 8192;
        let (a, b) = (new.numbers(size * size)?, new.numbers(size * size)?);
        let mut c = gpu.zeros::<bf16>(size * size)?;
        let multiplied = new.seconds(|| {
            let (a, b) = (a.mat(size, size), b.mat(size, size));
            linear::forward(&gpu, 1.0, a, b, 0.0, &c.mat_mut(size, size))
        })?;
        new.rate = 2.0 * (size as f64).powi(3) / multiplied;
        println!(
            "{}: copies {:.2} TB/s, products {:.0} TFLOP/s\n",
            gpu.name()?,
            new.bandwidth / 1e12,
            new.rate / 1e12
        );
        println!("| kernel | µs | | share |\n| --- | --- | --- | --- |");
        Ok(new)
    }

    /// Numbers that are not zeros, which some GPUs multiply faster.
    fn numbers(&self, len: usize) -> Result<Buffer<bf16>, Error> {
        let number = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 8) % 2001) as f32 / 1000.0 - 1.0;
        let values: Vec<bf16> = (0..len).map(|i| bf16::from_f32(number(i))).collect();
        self.gpu.upload(&values)
    }

    /// Of one launch, when many follow each other.
    fn seconds(&self, mut launch: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
        for _ in 0..3 {
            launch()?;
        }
        self.gpu.synchronize()?;
        let started = Instant::now();
        for _ in 0..REPEATS {
            launch()?;
        }
        self.gpu.synchronize()?;
        Ok(started.elapsed().as_secs_f64() / f64::from(REPEATS))
    }

    fn moves(
        &self,
        what: &str,
        bytes: usize,
        launch: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let seconds = self.seconds(launch)?;
        let achieved = bytes as f64 / seconds;
        println!(
            "| {what} | {:.1} | {:.2} TB/s | {:.0}% |",
            seconds * 1e6,
            achieved / 1e12,
            100.0 * achieved / self.bandwidth
        );
        Ok(())
    }

    fn multiplies(
        &self,
        what: &str,
        operations: f64,
        launch: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let seconds = self.seconds(launch)?;
        let achieved = operations / seconds;
        println!(
            "| {what} | {:.1} | {:.0} TFLOP/s | {:.0}% |",
            seconds * 1e6,
            achieved / 1e12,
            100.0 * achieved / self.rate
        );
        Ok(())
    }

    fn row_wise(&self) -> Result<(), Error> {
        let gpu = &self.gpu;
        let row = TOKENS * HIDDEN * 2;
        let (x, weight) = (self.numbers(TOKENS * HIDDEN)?, self.numbers(HIDDEN)?);
        let mut residual = self.numbers(TOKENS * HIDDEN)?;
        let mut y = gpu.zeros::<bf16>(TOKENS * HIDDEN)?;
        let mut inv_rms = gpu.zeros::<f32>(TOKENS)?;
        self.moves("residual + RMSNorm", 4 * row, || {
            let (residual, inv_rms) = (residual.view_mut(), inv_rms.view_mut());
            let (x, weight) = (x.view(), weight.view());
            let y = y.mat_mut(TOKENS, HIDDEN);
            rms_norm::add_forward(gpu, x, residual, weight, 1e-6, &y, &inv_rms)
        })?;
        self.moves("RMSNorm backward", 4 * row, || {
            let (x, dy) = (x.mat(TOKENS, HIDDEN), y.view());
            let dx = residual.mat_mut(TOKENS, HIDDEN);
            rms_norm::backward(gpu, x, weight.view(), inv_rms.view(), dy, &dx)
        })?;
        drop((residual, y));

        let frequencies: Vec<f32> = (0..32).map(|i| 1e6_f32.powf(-(i as f32) / 32.0)).collect();
        let table = updraft_kernels::rope::Table::<f32>::new(&frequencies, 4096, 1.0);
        let table = rope::Table::new(gpu, &table)?;
        let positions: Vec<u32> = (0..TOKENS as u32).map(|t| t % 4096).collect();
        let positions = gpu.upload(&positions)?;
        let mut q = self.numbers(TOKENS * HIDDEN)?;
        self.moves("RoPE of q", 2 * row, || {
            rope::forward(gpu, &table, positions.view(), &q.mat_mut(TOKENS, HIDDEN))
        })?;
        drop(q);

        let tokens = TOKENS / 4;
        let row = tokens * INNER * 2;
        let mut gate_up = self.numbers(tokens * 2 * INNER)?;
        let mut h = gpu.zeros::<bf16>(tokens * INNER)?;
        self.moves("SwiGLU", 3 * row, || {
            swiglu::forward(
                gpu,
                gate_up.mat(tokens, 2 * INNER),
                &h.mat_mut(tokens, INNER),
            )
        })?;
        self.moves("SwiGLU backward", 6 * row, || {
            let gate_up = gate_up.mat_mut(tokens, 2 * INNER);
            swiglu::backward_recompute(gpu, &gate_up, &h.mat_mut(tokens, INNER))
        })
    }

    /// 16,384 tokens in sequences of one length, forward and backward.
    fn attention(&self, length: usize) -> Result<(), Error> {
        let gpu = &self.gpu;
        let tokens = 16_384;
        let (q, kv) = (
            HEADS.num_heads * HEADS.head_dim,
            HEADS.num_kv_heads * HEADS.head_dim,
        );
        let starts: Vec<u32> = (0..=tokens / length).map(|s| (s * length) as u32).collect();
        let sequences = attention::Sequences::new(gpu, &starts)?;
        let all = self.numbers(tokens * (q + 2 * kv))?;
        let all = all.mat(tokens, q + 2 * kv);
        let qkv = attention::Qkv {
            q: all.cols(0..q),
            k: all.cols(q..q + kv),
            v: all.cols(q + kv..q + 2 * kv),
        };
        let mut out = gpu.zeros::<bf16>(tokens * q)?;
        let mut lse = gpu.zeros::<f32>(tokens * HEADS.num_heads)?;
        // Two products of `L²/2` scores each for every head; five in the backward pass.
        let product = (tokens * length) as f64 * q as f64;
        self.multiplies(&format!("attention, {length}"), 2.0 * product, || {
            let out = out.mat_mut(tokens, q);
            attention::forward(gpu, &HEADS, &sequences, qkv, &out, &lse.view_mut())
        })?;
        let dout = self.numbers(tokens * q)?;
        let mut dqkv = gpu.zeros::<bf16>(tokens * (q + 2 * kv))?;
        self.multiplies(
            &format!("attention backward, {length}"),
            5.0 * product,
            || {
                let (dq, rest) = dqkv.mat_mut(tokens, q + 2 * kv).split_cols(q);
                let (dk, dv) = rest.split_cols(kv);
                let saved = attention::Saved {
                    out: out.mat(tokens, q),
                    lse: lse.view(),
                };
                let grads = attention::QkvGrads { dq, dk, dv };
                attention::backward(
                    gpu,
                    &HEADS,
                    &sequences,
                    qkv,
                    saved,
                    dout.mat(tokens, q),
                    &grads,
                )
            },
        )
    }

    fn head(&self) -> Result<(), Error> {
        let gpu = &self.gpu;
        let tokens = 4096;
        let (hidden, head) = (
            self.numbers(tokens * HIDDEN)?,
            self.numbers(VOCAB * HIDDEN)?,
        );
        let labels = gpu.upload(&vec![7_u32; tokens])?;
        let rows = linear_cross_entropy::chunk_rows(tokens, VOCAB);
        let mut scratch = gpu.zeros::<bf16>(rows * VOCAB)?;
        let mut losses = gpu.zeros::<f32>(tokens)?;
        let mut dhidden = gpu.zeros::<bf16>(tokens * HIDDEN)?;
        let operations = 4.0 * (tokens * HIDDEN) as f64 * VOCAB as f64;
        self.multiplies("head and its loss, both ways", operations, || {
            linear_cross_entropy::forward_backward(
                gpu,
                hidden.mat(tokens, HIDDEN),
                head.mat(VOCAB, HIDDEN),
                labels.view(),
                1.0 / tokens as f32,
                &mut dhidden.mat_mut(tokens, HIDDEN),
                &losses.view_mut(),
                &mut scratch.view_mut(),
            )
        })
    }

    /// So many sequences of so many tokens, the newest of which attend: all keys and values are read once for one, and
    /// multiplied twice for many.
    fn pages(&self, sequences: usize, context: usize, new: usize) -> Result<(), Error> {
        let gpu = &self.gpu;
        let (rows, block_size) = (sequences * new, 16);
        let (q, kv) = (
            HEADS.num_heads * HEADS.head_dim,
            HEADS.num_kv_heads * HEADS.head_dim,
        );
        let numbers = sequences * context * kv;
        let (keys, values) = (self.numbers(numbers)?, self.numbers(numbers)?);
        let pages = paged_attention::Pages {
            keys: keys.view(),
            values: values.view(),
            block_size,
        };
        // A sequence's blocks do not lie side by side.
        let table = |s: usize| {
            let blocks = (0..context / block_size).map(|block| (block * sequences + s) as u32);
            blocks.collect::<Vec<_>>()
        };
        let block_tables: Vec<Vec<u32>> = (0..sequences).map(table).collect();
        let seq_starts: Vec<u32> = (0..=sequences).map(|s| (s * new) as u32).collect();
        let host = updraft_kernels::paged_attention::Sequences {
            seq_starts: &seq_starts,
            context_lens: &vec![context as u32; sequences],
            block_tables: &block_tables,
        };
        let on_device = paged_attention::Sequences::new(gpu, &host, block_size)?;
        let queries = self.numbers(rows * q)?;
        let mut out = gpu.zeros::<bf16>(rows * q)?;
        let mut attend = || {
            let (queries, out) = (queries.mat(rows, q), out.mat_mut(rows, q));
            paged_attention::forward(gpu, &HEADS, &on_device, &pages, queries, &out)
        };
        if new == 1 {
            let what = format!("decoding {sequences} after {context}");
            self.moves(&what, 2 * numbers * 2, &mut attend)
        } else {
            // As without pages.
            let product = (rows * context) as f64 * q as f64;
            let what = format!("prompts of {new} into pages");
            self.multiplies(&what, 2.0 * product, &mut attend)
        }
    }

    /// A token for each of 64 sequences; the share is that of reading the logits once.
    fn sampling(&self) -> Result<(), Error> {
        let rows = 64;
        let logits: Vec<f32> = (0..rows * VOCAB)
            .map(|i| ((i.wrapping_mul(2_654_435_761) >> 8) % 20_011) as f32 / 1000.0)
            .collect();
        let mut logits = self.gpu.upload(&logits)?;
        let greedy = sampling::Choice {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            uniform: 0.5,
        };
        let nucleus = sampling::Choice {
            temperature: 0.8,
            top_p: 0.95,
            ..greedy
        };
        for (what, choice) in [("greedy choice", greedy), ("nucleus sampling", nucleus)] {
            self.moves(what, rows * VOCAB * 4, || {
                let mut logits = logits.mat_mut(rows, VOCAB);
                sampling::sample(&self.gpu, &mut logits, &vec![choice; rows], &[]).map(drop)
            })?;
        }
        Ok(())
    }

    /// The adapter of rank 16: 336 tensors, 8.8 million numbers.
    fn optimizer(&self) -> Result<(), Error> {
        let gpu = &self.gpu;
        let lens = (0..336).map(|i| if i % 2 == 0 { 14_336 } else { 38_016 });
        let mut len = 0;
        let trained: Vec<adamw::Trained> = lens
            .map(|numbers| {
                len += numbers;
                let range = len - numbers..len;
                adamw::Trained { range, group: 0 }
            })
            .collect();
        let (mut param, grad) = (gpu.zeros::<f32>(len)?, gpu.zeros::<f32>(len)?);
        let (mut exp_avg, mut exp_avg_sq) = (gpu.zeros::<f32>(len)?, gpu.zeros::<f32>(len)?);
        let mut tensors = adamw::Tensors::new(gpu, &trained, len)?;
        let flat = adamw::Flat {
            param: param.view_mut(),
            grad: grad.view(),
            exp_avg: exp_avg.view_mut(),
            exp_avg_sq: exp_avg_sq.view_mut(),
        };
        let adamw = AdamW {
            learning_rate: 2e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
        };
        self.moves("clipping and AdamW", len * 4 * 8, || {
            tensors.clip(gpu, flat.grad, 1.0, 1.0)?;
            tensors.step(gpu, &[adamw], 1, &flat)
        })
    }
}
