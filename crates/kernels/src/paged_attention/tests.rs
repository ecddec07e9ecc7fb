//! Paged attention against packed attention, and what the bits of a row may not depend on.

use super::*;
use crate::attention::{self, Qkv};
use crate::kv_scatter;
use crate::testing::{check_close, random, thread_counts};

/// Sequences in a paged cache, fed a few tokens at a time.
struct Feed<F> {
    heads: Heads<F>,
    block_size: usize,
    keys: Vec<F>,
    values: Vec<F>,
    block_tables: Vec<Vec<u32>>,
    context_lens: Vec<u32>,
}

impl<F: Float> Feed<F> {
    /// `table_of(s)` are the blocks of sequence `s`.
    fn new(heads: Heads<F>, block_size: usize, block_tables: Vec<Vec<u32>>) -> Self {
        let num_blocks = 1 + *block_tables.iter().flatten().max().expect("a block") as usize;
        // What no sequence has written must not matter.
        let garbage = vec![
            F::from_f64(f64::NAN);
            num_blocks * block_size * heads.num_kv_heads * heads.head_dim
        ];
        let context_lens = vec![0; block_tables.len()];
        Self {
            heads,
            block_size,
            keys: garbage.clone(),
            values: garbage,
            block_tables,
            context_lens,
        }
    }

    /// The newest tokens of each sequence, `(q, k, v)`, to their outputs.
    fn step(&mut self, threads: &Threads, new: &[[&[F]; 3]]) -> Vec<Vec<F>> {
        let (d, kv_width) = (
            self.heads.head_dim,
            self.heads.num_kv_heads * self.heads.head_dim,
        );
        let width = self.heads.num_heads * d;
        let (mut q, mut seq_starts) = (Vec::new(), vec![0]);
        for (s, [new_q, k, v]) in new.iter().enumerate() {
            let first = self.context_lens[s] as usize;
            let rows = k.len() / kv_width;
            let slots: Vec<u32> = (first..first + rows)
                .map(|j| {
                    self.block_tables[s][j / self.block_size] * self.block_size as u32
                        + (j % self.block_size) as u32
                })
                .collect();
            kv_scatter::forward(Mat::new(k, rows, kv_width), &slots, &mut self.keys);
            kv_scatter::forward(Mat::new(v, rows, kv_width), &slots, &mut self.values);
            self.context_lens[s] += rows as u32;
            q.extend_from_slice(new_q);
            seq_starts.push((q.len() / width) as u32);
        }
        let rows = q.len() / width;
        let mut out = vec![F::from_f64(f64::NAN); q.len()];
        let sequences = Sequences {
            seq_starts: &seq_starts,
            context_lens: &self.context_lens,
            block_tables: &self.block_tables,
        };
        let pages = Pages {
            keys: &self.keys,
            values: &self.values,
            block_size: self.block_size,
        };
        let (q, view) = (
            Mat::new(&q, rows, width),
            MatMut::new(&mut out, rows, width),
        );
        forward(threads, &self.heads, &sequences, &pages, q, view);
        let rows = seq_starts
            .windows(2)
            .map(|seq| seq[0] as usize * width..seq[1] as usize * width);
        rows.map(|range| out[range].to_vec()).collect()
    }
}

const WIDTH: usize = 6 * 20;
const KV_WIDTH: usize = 2 * 20;

fn heads<F: Float>() -> Heads<F> {
    Heads {
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 20,
        scale: F::from_f64(0.4),
    }
}

fn tokens<F: Float>(len: usize, seed: u64) -> [Vec<F>; 3] {
    [
        random(len * WIDTH, seed),
        random(len * KV_WIDTH, seed + 1),
        random(len * KV_WIDTH, seed + 2),
    ]
}

fn cut<F>([q, k, v]: &[Vec<F>; 3], from: usize, to: usize) -> [&[F]; 3] {
    [
        &q[from * WIDTH..to * WIDTH],
        &k[from * KV_WIDTH..to * KV_WIDTH],
        &v[from * KV_WIDTH..to * KV_WIDTH],
    ]
}

fn check_against_packed<F: Float>(tolerance: f64) {
    let (a, b) = (tokens::<F>(37, 1), tokens::<F>(5, 11));
    let packed: [Vec<F>; 3] = std::array::from_fn(|i| [a[i].clone(), b[i].clone()].concat());
    let (mut expected, mut lse) = (vec![F::ZERO; 42 * WIDTH], vec![F::ZERO; 42 * 6]);
    let qkv = Qkv {
        q: Mat::new(&packed[0], 42, WIDTH),
        k: Mat::new(&packed[1], 42, KV_WIDTH),
        v: Mat::new(&packed[2], 42, KV_WIDTH),
    };
    let view = MatMut::new(&mut expected, 42, WIDTH);
    attention::forward(
        &Threads::single(),
        &heads(),
        &[0, 37, 42],
        qkv,
        view,
        &mut lse,
    );
    for threads in &thread_counts() {
        let tables = vec![vec![3, 9, 0, 4, 2, 6, 1, 7, 12, 5], vec![8, 10]];
        let mut feed = Feed::new(heads(), 4, tables);
        let out = feed
            .step(threads, &[cut(&a, 0, 37), cut(&b, 0, 5)])
            .concat();
        check_close("out", &out, &expected, tolerance);
    }
}

#[test]
fn equals_packed_attention() {
    check_against_packed::<f64>(1e-14);
    check_against_packed::<f32>(1e-6);
}

/// Whole or in chunks, alone or with company, in these blocks or those, on one thread or three: the same bits.
#[test]
fn the_bits_of_a_row_are_its_own() {
    let len = 71;
    let (own, other) = (tokens::<f32>(len, 1), tokens::<f32>(len, 11));
    let mut alone = Feed::new(heads(), 16, vec![(0..5).collect()]);
    let expected = alone
        .step(&Threads::single(), &[cut(&own, 0, len)])
        .concat();
    for threads in &thread_counts() {
        for chunk in [1, 2, 5, 16, 17, 64] {
            let mut feed = Feed::new(
                heads(),
                7,
                vec![(0..11).rev().collect(), (11..22).collect()],
            );
            let mut out = Vec::new();
            for start in (0..len).step_by(chunk) {
                let end = len.min(start + chunk);
                let company = (start / 2, end / 2); // fewer rows at a time, sometimes none
                let outs = feed.step(
                    threads,
                    &[cut(&own, start, end), cut(&other, company.0, company.1)],
                );
                out.extend_from_slice(&outs[0]);
            }
            assert_eq!(out, expected, "chunks of {chunk}");
        }
    }
}

#[test]
#[should_panic(expected = "a block for every 4 tokens")]
fn a_short_block_table_is_refused() {
    let own = tokens::<f32>(5, 1);
    let pages = vec![0.0; 4 * KV_WIDTH];
    let mut out = vec![0.0; 5 * WIDTH];
    forward(
        &Threads::single(),
        &heads(),
        &Sequences {
            seq_starts: &[0, 5],
            context_lens: &[5],
            block_tables: &[vec![0]],
        },
        &Pages {
            keys: &pages,
            values: &pages,
            block_size: 4,
        },
        Mat::new(&own[0], 5, WIDTH),
        MatMut::new(&mut out, 5, WIDTH),
    );
}
