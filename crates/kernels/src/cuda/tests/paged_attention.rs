//! Attention over pages whose unused slots hold NaNs.

use super::super::paged_attention::{Pages, Sequences, forward, kv_scatter};
use super::attention::heads;
use super::*;

/// Tokens of a sequence, and how many of them are new.
type Lengths = (u32, u32);

/// Sequences whose blocks lie in the pages from the last to the first, with keys and values of the old tokens.
struct Case<T> {
    heads: Heads<f32>,
    block_size: usize,
    lengths: Vec<Lengths>,
    block_tables: Vec<Vec<u32>>,
    keys: Input<T>,
    values: Input<T>,
}

impl<T: Number> Case<T> {
    fn new(gpu: &Gpu, heads: Heads<f32>, block_size: usize, lengths: &[Lengths]) -> Self {
        let blocks_of = |len: u32| (len as usize).div_ceil(block_size);
        let needed: usize = lengths.iter().map(|&(len, _)| blocks_of(len)).sum();
        let num_blocks = needed + 3;
        let mut order = (0..num_blocks as u32).rev();
        let block_tables: Vec<Vec<u32>> = lengths
            .iter()
            .map(|&(len, _)| order.by_ref().take(blocks_of(len)).collect())
            .collect();
        let width = heads.num_kv_heads * heads.head_dim;
        let mut case = Self {
            heads,
            block_size,
            lengths: lengths.to_vec(),
            block_tables,
            keys: of_values(gpu, &[]),
            values: of_values(gpu, &[]),
        };
        let olds = lengths.iter().enumerate();
        let olds: Vec<usize> = olds
            .flat_map(|(s, &(len, new))| case.slots(s, 0..len - new))
            .collect();
        let pages = |seed| {
            let mut pages = vec![f32::NAN; num_blocks * block_size * width];
            for (t, slot) in olds.iter().enumerate() {
                let row = random::<f32>(width, seed + t as u64);
                pages[slot * width..(slot + 1) * width].copy_from_slice(&row);
            }
            of_values(gpu, &pages)
        };
        case.keys = pages(1000);
        case.values = pages(2000);
        case
    }

    /// Where the tokens of a sequence lie.
    fn slots(&self, s: usize, tokens: std::ops::Range<u32>) -> Vec<usize> {
        let slot = |token: usize| {
            let block = self.block_tables[s][token / self.block_size] as usize;
            block * self.block_size + token % self.block_size
        };
        tokens.map(|token| slot(token as usize)).collect()
    }

    fn num_rows(&self) -> usize {
        self.lengths.iter().map(|&(_, new)| new as usize).sum()
    }

    /// Writes the new tokens' keys and values, and attends: what the device says, and what the CPU says.
    fn run(&mut self, gpu: &Gpu, q: &Input<T>, new: &Input<T>) -> (Vec<f64>, Vec<f64>) {
        let (rows, d) = (self.num_rows(), self.heads.head_dim);
        let (width, kv_width) = (self.heads.num_heads * d, self.heads.num_kv_heads * d);
        let slots: Vec<u32> = (0..self.lengths.len())
            .flat_map(|s| {
                let (len, new) = self.lengths[s];
                self.slots(s, len - new..len)
            })
            .map(|slot| slot as u32)
            .collect();
        let device_slots = gpu.upload(&slots).expect("memory");
        let new_mat = new.device.mat(rows, 2 * kv_width);
        let host_new = Mat::new(&new.host, rows, 2 * kv_width);
        let both = [
            (0..kv_width, &mut self.keys),
            (kv_width..2 * kv_width, &mut self.values),
        ];
        for (cols, pages) in both {
            let from = new_mat.cols(cols.clone());
            kv_scatter(gpu, from, device_slots.view(), &pages.device.view_mut()).expect("launched");
            crate::kv_scatter::forward(host_new.cols(cols), &slots, &mut pages.host);
            let equal = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
            let written = values(gpu, &pages.device);
            assert!(written.iter().zip(&pages.host).all(equal), "scattered");
        }

        let mut seq_starts = vec![0_u32];
        for &(_, new) in &self.lengths {
            seq_starts.push(seq_starts[seq_starts.len() - 1] + new);
        }
        let context_lens: Vec<u32> = self.lengths.iter().map(|&(len, _)| len).collect();
        let host = crate::paged_attention::Sequences {
            seq_starts: &seq_starts,
            context_lens: &context_lens,
            block_tables: &self.block_tables,
        };
        let sequences = Sequences::new(gpu, &host, self.block_size).expect("memory");
        let pages = Pages {
            keys: self.keys.device.view(),
            values: self.values.device.view(),
            block_size: self.block_size,
        };
        let attend = || {
            let mut out = poison::<T>(gpu, rows * width);
            let (q, out_mat) = (q.device.mat(rows, width), out.mat_mut(rows, width));
            forward(gpu, &self.heads, &sequences, &pages, q, &out_mat).expect("launched");
            values(gpu, &out)
        };
        let out = attend();
        assert_eq!(out, attend(), "two runs");

        let heads = Heads {
            num_heads: self.heads.num_heads,
            num_kv_heads: self.heads.num_kv_heads,
            head_dim: d,
            scale: 1.0 / (d as f64).sqrt(),
        };
        let mut expected = vec![0.0; rows * width];
        let pages = crate::paged_attention::Pages {
            keys: &self.keys.host,
            values: &self.values.host,
            block_size: self.block_size,
        };
        crate::paged_attention::forward(
            &Threads::single(),
            &heads,
            &host,
            &pages,
            Mat::new(&q.host, rows, width),
            MatMut::new(&mut expected, rows, width),
        );
        (out, expected)
    }
}

#[track_caller]
fn agrees<T: Number>(gpu: &Gpu, heads: Heads<f32>, block_size: usize, lengths: &[Lengths]) {
    agrees_for_queries_of::<T>(gpu, 1.0, heads, block_size, lengths);
}

#[track_caller]
fn agrees_for_queries_of<T: Number>(
    gpu: &Gpu,
    size: f32,
    heads: Heads<f32>,
    block_size: usize,
    lengths: &[Lengths],
) {
    let mut case = Case::<T>::new(gpu, heads, block_size, lengths);
    let (rows, d) = (case.num_rows(), heads.head_dim);
    let q = random::<f32>(rows * heads.num_heads * d, 3);
    let q: Vec<f32> = q.iter().map(|x| x * size).collect();
    let q = of_values(gpu, &q);
    let new = input(gpu, rows * 2 * heads.num_kv_heads * d, 4);
    let (out, expected) = case.run(gpu, &q, &new);
    let what = format!("{heads:?}, blocks of {block_size}, {lengths:?}");
    close::<T>(&what, &out, &expected);
    // A wrong row must not hide behind many right ones.
    let rows = out.chunks(d).zip(expected.chunks(d));
    for (row, (out, expected)) in rows.enumerate() {
        let distance = |(a, b): (&f64, &f64)| (a - b).powi(2);
        let error: f64 = out.iter().zip(expected).map(distance).sum();
        let size: f64 = expected.iter().map(|x| x * x).sum();
        let relative = (error / size.max(1e-30)).sqrt();
        assert!(
            relative <= 10.0 * tolerance::<T>(),
            "row {row}, {what}: {relative}"
        );
    }
}

/// Single tokens after contexts around the borders of blocks, turns and parts.
const DECODE: [Lengths; 11] = [
    (1, 1),
    (15, 1),
    (16, 1),
    (17, 1),
    (63, 1),
    (64, 1),
    (65, 1),
    (127, 1),
    (129, 1),
    (300, 1),
    (700, 1),
];

/// Head dims of tensor cores: decoding, prompts, chunks of prompts and few tokens at once, in one batch.
pub(super) fn paged_attention_agrees<T: Number>(gpu: &Gpu) {
    agrees::<T>(gpu, heads(64, 7, 1), 16, &DECODE);
    agrees::<T>(gpu, heads(128, 4, 1), 8, &DECODE);
    let mixed = [(1, 1), (65, 65), (129, 1), (127, 16), (17, 15), (300, 17)];
    agrees::<T>(gpu, heads(64, 4, 2), 16, &mixed);
    agrees::<T>(gpu, heads(128, 2, 2), 8, &mixed);
    agrees::<T>(gpu, heads(64, 1, 1), 128, &[(200, 16), (3, 1), (16, 16)]);
    agrees::<T>(gpu, heads(64, 4, 1), 5, &[(63, 20), (129, 1)]);
}

/// Heads that are not read sixteen bytes at once, large ones, and more of them than are taken at once.
pub(super) fn paged_attention_of_any_heads_agrees<T: Number>(gpu: &Gpu) {
    let lengths = [(1, 1), (40, 3), (17, 16), (300, 1)];
    agrees::<T>(gpu, heads(24, 2, 2), 5, &lengths);
    agrees::<T>(gpu, heads(10, 3, 1), 16, &lengths);
    agrees::<T>(gpu, heads(256, 2, 1), 8, &lengths);
    agrees::<T>(gpu, heads(8, 9, 1), 16, &lengths);
}

/// Scores whose exponentials no number holds.
pub(super) fn paged_attention_of_large_scores_agrees<T: Number>(gpu: &Gpu) {
    if T::NAME != "f32" {
        // A score of hundreds is not as exact in f32 as the tolerance for f32 asks of its exponential.
        let lengths = [(129, 1), (300, 1), (40, 17)];
        agrees_for_queries_of::<T>(gpu, 150.0, heads(64, 2, 1), 16, &lengths);
    }
}

pub(super) fn chunks_of_a_prompt_agree_with_all_of_it<T: Number>(gpu: &Gpu) {
    for head_dim in [64, 128] {
        let (heads, len) = (heads(head_dim, 2, 1), 150_u32);
        let (q, new) = (
            random::<f32>(len as usize * 2 * head_dim, 5),
            random::<f32>(len as usize * 2 * head_dim, 6),
        );
        // Each chunk goes on with the pages that the one before has written.
        let run = |ends: &[u32]| {
            let mut case = Case::<T>::new(gpu, heads, 16, &[(len, len)]);
            let (mut all, mut start) = (Vec::new(), 0);
            for &end in ends {
                case.lengths = vec![(end, end - start)];
                let row = 2 * head_dim;
                let rows = start as usize * row..end as usize * row;
                let (q, new) = (of_values(gpu, &q[rows.clone()]), of_values(gpu, &new[rows]));
                all.extend(case.run(gpu, &q, &new).0);
                start = end;
            }
            all
        };
        let whole = run(&[len]);
        close::<T>("chunks", &run(&[64, 83, 84, 150]), &whole);
    }
}
