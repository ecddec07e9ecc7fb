//! Attention against its definition, finite differences, and what each sequence may not notice.

use super::*;
use crate::testing::{check_close, check_gradient, narrow, random, thread_counts, weighted};

struct Case {
    heads: Heads<f64>,
    lens: Vec<usize>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

impl Case {
    fn new(num_heads: usize, num_kv_heads: usize, head_dim: usize, lens: &[usize]) -> Self {
        let tokens: usize = lens.iter().sum();
        Self {
            heads: Heads {
                num_heads,
                num_kv_heads,
                head_dim,
                scale: 0.6,
            },
            lens: lens.to_vec(),
            q: random(tokens * num_heads * head_dim, 1),
            k: random(tokens * num_kv_heads * head_dim, 2),
            v: random(tokens * num_kv_heads * head_dim, 3),
        }
    }

    fn run(&self, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        run(&Threads::single(), &self.heads, &self.lens, q, k, v).0
    }

    /// By the definition.
    fn naive(&self) -> (Vec<f64>, Vec<f64>) {
        let Heads {
            num_heads,
            num_kv_heads,
            head_dim: d,
            scale,
        } = self.heads;
        let (mut out, mut lse) = (vec![0.0; self.q.len()], vec![0.0; self.q.len() / d]);
        for tokens in sequences(&starts(&self.lens)) {
            for (t, h) in tokens
                .clone()
                .flat_map(|t| (0..num_heads).map(move |h| (t, h)))
            {
                let q = &self.q[(t * num_heads + h) * d..][..d];
                let kv = |j: usize| (j * num_kv_heads + h * num_kv_heads / num_heads) * d;
                let exps: Vec<f64> = (tokens.start..=t)
                    .map(|j| (scale * weighted(q, &self.k[kv(j)..][..d])).exp())
                    .collect();
                let sum: f64 = exps.iter().sum();
                lse[t * num_heads + h] = sum.ln();
                for (j, p) in (tokens.start..).zip(exps) {
                    for i in 0..d {
                        out[(t * num_heads + h) * d + i] += p / sum * self.v[kv(j) + i];
                    }
                }
            }
        }
        (out, lse)
    }
}

fn starts(lens: &[usize]) -> Vec<u32> {
    let mut end = 0;
    std::iter::once(0)
        .chain(lens.iter().map(|&len| {
            end += len as u32;
            end
        }))
        .collect()
}

fn views<'a, F: Float>(heads: &Heads<F>, q: &'a [F], k: &'a [F], v: &'a [F]) -> Qkv<'a, F> {
    let (width, kv_width) = (
        heads.num_heads * heads.head_dim,
        heads.num_kv_heads * heads.head_dim,
    );
    let tokens = q.len() / width;
    Qkv {
        q: Mat::new(q, tokens, width),
        k: Mat::new(k, tokens, kv_width),
        v: Mat::new(v, tokens, kv_width),
    }
}

fn run<F: Float>(
    threads: &Threads,
    heads: &Heads<F>,
    lens: &[usize],
    q: &[F],
    k: &[F],
    v: &[F],
) -> (Vec<F>, Vec<F>) {
    let qkv = views(heads, q, k, v);
    let (mut out, mut lse) = (
        vec![F::ZERO; q.len()],
        vec![F::ZERO; q.len() / heads.head_dim],
    );
    let view = MatMut::new(&mut out, qkv.q.num_rows(), qkv.q.num_cols());
    forward(threads, heads, &starts(lens), qkv, view, &mut lse);
    (out, lse)
}

/// `(dq, dk, dv)`, written over numbers that must not matter.
fn run_backward<F: Float>(
    threads: &Threads,
    heads: &Heads<F>,
    lens: &[usize],
    [q, k, v, dout]: [&[F]; 4],
) -> (Vec<F>, Vec<F>, Vec<F>) {
    let (out, lse) = run(threads, heads, lens, q, k, v);
    let qkv = views(heads, q, k, v);
    let poison = F::from_f64(f64::NAN);
    let (mut dq, mut dk, mut dv) = (
        vec![poison; q.len()],
        vec![poison; k.len()],
        vec![poison; v.len()],
    );
    let (tokens, width, kv_width) = (qkv.q.num_rows(), qkv.q.num_cols(), qkv.k.num_cols());
    backward(
        threads,
        heads,
        &starts(lens),
        qkv,
        Saved {
            out: Mat::new(&out, tokens, width),
            lse: &lse,
        },
        Mat::new(dout, tokens, width),
        QkvGrads {
            dq: MatMut::new(&mut dq, tokens, width),
            dk: MatMut::new(&mut dk, tokens, kv_width),
            dv: MatMut::new(&mut dv, tokens, kv_width),
        },
    );
    (dq, dk, dv)
}

#[test]
fn follows_its_definition_on_ragged_lengths() {
    for lens in [
        vec![1],
        vec![15, 1, 16, 17],
        vec![63, 64, 65],
        vec![129, 0, 2],
    ] {
        let case = Case::new(7, 1, 5, &lens);
        let (expected, expected_lse) = case.naive();
        for threads in &thread_counts() {
            let (out, lse) = run(threads, &case.heads, &lens, &case.q, &case.k, &case.v);
            check_close("out", &out, &expected, 1e-13);
            check_close("lse", &lse, &expected_lse, 1e-13);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for case in [Case::new(4, 2, 6, &[1, 5, 3]), Case::new(1, 1, 2, &[66])] {
        let dout = random::<f64>(case.q.len(), 4);
        let (dq, dk, dv) = run_backward(
            &Threads::single(),
            &case.heads,
            &case.lens,
            [&case.q, &case.k, &case.v, &dout],
        );
        check_gradient("dq", &case.q, &dq, |q| {
            weighted(&case.run(q, &case.k, &case.v), &dout)
        });
        check_gradient("dk", &case.k, &dk, |k| {
            weighted(&case.run(&case.q, k, &case.v), &dout)
        });
        check_gradient("dv", &case.v, &dv, |v| {
            weighted(&case.run(&case.q, &case.k, v), &dout)
        });
    }
}

#[test]
fn f32_follows_f64() {
    let case = Case::new(6, 2, 32, &[100, 37]);
    let dout = random::<f64>(case.q.len(), 4);
    let (out, lse) = case.naive();
    let (dq, dk, dv) = run_backward(
        &Threads::single(),
        &case.heads,
        &case.lens,
        [&case.q, &case.k, &case.v, &dout],
    );
    let heads = Heads {
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 32,
        scale: 0.6_f32,
    };
    let [q, k, v, dout] = [&case.q, &case.k, &case.v, &dout].map(|x| narrow(x));
    for threads in &thread_counts() {
        let (out32, lse32) = run(threads, &heads, &case.lens, &q, &k, &v);
        check_close("out", &out32, &out, 2e-6);
        check_close("lse", &lse32, &lse, 1e-6);
        let (dq32, dk32, dv32) = run_backward(threads, &heads, &case.lens, [&q, &k, &v, &dout]);
        check_close("dq", &dq32, &dq, 5e-6);
        check_close("dk", &dk32, &dk, 5e-6);
        check_close("dv", &dv32, &dv, 5e-6);
    }
}

/// Another neighbour, of another length, on another number of threads: not a bit changes.
#[test]
fn a_sequence_does_not_see_its_neighbours() {
    let heads = Heads {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        scale: 0.25_f32,
    };
    let (width, kv_width, len) = (64, 32, 133);
    let own: [Vec<f32>; 4] =
        [width, kv_width, kv_width, width].map(|width| random(len * width, 100 + width as u64));
    let mut seen = Vec::new();
    for threads in &thread_counts() {
        for neighbour in [0, 1, 31, 70] {
            let mut seed = neighbour as u64;
            let packed = [0, 1, 2, 3].map(|i| {
                let width = own[i].len() / len;
                seed += 1;
                [
                    random(neighbour * width, seed),
                    own[i].clone(),
                    random(3 * width, seed),
                ]
                .concat()
            });
            let [q, k, v, dout] = &packed;
            let lens = [neighbour, len, 3];
            let (out, lse) = run(threads, &heads, &lens, q, k, v);
            let (dq, dk, dv) = run_backward(threads, &heads, &lens, [q, k, v, dout]);
            let cut =
                |x: &[f32], width: usize| x[neighbour * width..(neighbour + len) * width].to_vec();
            seen.push([
                cut(&out, width),
                cut(&lse, 4),
                cut(&dq, width),
                cut(&dk, kv_width),
                cut(&dv, kv_width),
            ]);
        }
    }
    assert!(seen.iter().all(|seen_here| *seen_here == seen[0]));
}

#[test]
#[should_panic(expected = "the last sequence ends at the last token")]
fn sequences_must_cover_the_batch() {
    let case = Case::new(1, 1, 2, &[4]);
    run(
        &Threads::single(),
        &case.heads,
        &[3],
        &case.q,
        &case.k,
        &case.v,
    );
}
