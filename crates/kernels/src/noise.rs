//! Random numbers that are a function of where they fall: dropout and uniform noise that come out the same however the
//! rows are divided, and again on the way back.

use crate::simd::{Op, Simd, dispatch};
use crate::{Float, Mat, MatMut, Threads};

/// Rows that a thread takes at least.
const MIN_ROWS: usize = 8;

/// A key for each of many uses of one: SplitMix64's step.
///
/// # Source
/// Steele et al. 2014, <https://doi.org/10.1145/2714064.2660195>
#[must_use]
pub fn derive(key: u64, use_: u64) -> u64 {
    let mut z = key.wrapping_add(use_.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 32 random bits for a column under a row's key: two rounds of a mixing function whose every output bit depends on every
/// input bit. Multiplications, shifts and exclusive ors alone, so that a loop over columns vectorizes.
///
/// # Source
/// Wellons 2018, "Prospecting for hash functions", <https://nullprogram.com/blog/2018/07/31/>
#[inline(always)]
fn bits(key: u64, col: u32) -> u32 {
    let mix = |mut x: u32| {
        x ^= x >> 16;
        x = x.wrapping_mul(0x7feb_352d);
        x ^= x >> 15;
        x = x.wrapping_mul(0x846c_a68b);
        x ^ (x >> 16)
    };
    mix(mix(col ^ key as u32) ^ (key >> 32) as u32)
}

/// `out = x · keep / (1 − p)`, where each `keep` is 0 with probability `p` and else 1.
///
/// Key and column decide, so the same keys drop the same numbers.
///
/// # Shapes
/// `keys: [T]`, `x`, `out: [T, C]`
///
/// # Panics
/// If the shapes do not agree.
pub fn dropout<F: Float>(
    threads: &Threads,
    p: f64,
    keys: &[u64],
    x: Mat<'_, F>,
    out: MatMut<'_, F>,
) {
    run(threads, p, F::ZERO, keys, x, out);
}

/// `dx += dout · keep / (1 − p)`, the gradient of [`dropout`]'s input, with its keys.
///
/// # Shapes
/// `keys: [T]`, `dout`, `dx: [T, C]`
///
/// # Panics
/// If the shapes do not agree.
pub fn dropout_backward<F: Float>(
    threads: &Threads,
    p: f64,
    keys: &[u64],
    dout: Mat<'_, F>,
    dx: MatMut<'_, F>,
) {
    run(threads, p, F::ONE, keys, dout, dx);
}

fn run<F: Float>(
    threads: &Threads,
    p: f64,
    beta: F,
    keys: &[u64],
    x: Mat<'_, F>,
    out: MatMut<'_, F>,
) {
    assert_eq!(keys.len(), x.num_rows(), "one key for each row");
    assert_eq!(
        (x.num_rows(), x.num_cols()),
        (out.num_rows(), out.num_cols()),
        "the output's shape"
    );
    let (threshold, scale) = threshold_and_scale(p);
    let scale = F::from_f64(scale);
    threads.split((keys, x, out), MIN_ROWS, |(keys, x, out)| {
        dispatch(Dropout {
            threshold,
            scale,
            beta,
            keys,
            x,
            out,
        });
    });
}

/// Random bits below the one drop a number; the other takes their place in what is kept.
pub(crate) fn threshold_and_scale(p: f64) -> (u32, f64) {
    ((p * f64::from(u32::MAX)) as u32, 1.0 / (1.0 - p))
}

/// `out = x · keep · scale + beta · out`
struct Dropout<'a, F> {
    threshold: u32,
    scale: F,
    beta: F,
    keys: &'a [u64],
    x: Mat<'a, F>,
    out: MatMut<'a, F>,
}

impl<F: Float> Op for Dropout<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for (row, &key) in self.keys.iter().enumerate() {
            let out = self.out.row_mut(row).iter_mut();
            for ((out, &x), col) in out.zip(self.x.row(row)).zip(0..) {
                let kept = if bits(key, col) < self.threshold {
                    F::ZERO
                } else {
                    x * self.scale
                };
                *out = if self.beta == F::ZERO {
                    kept
                } else {
                    *out + kept
                };
            }
        }
    }
}

/// `x_t += magnitude_t · u`, `u` uniform between -1 and 1.
///
/// # Shapes
/// `keys`, `magnitudes: [T]`, `x: [T, C]`
///
/// # Panics
/// If the shapes do not agree.
pub fn add_uniform<F: Float>(keys: &[u64], magnitudes: &[f64], mut x: MatMut<'_, F>) {
    assert_eq!(keys.len(), x.num_rows(), "one key for each row");
    assert_eq!(magnitudes.len(), x.num_rows(), "one magnitude for each row");
    for (row, (&key, &magnitude)) in keys.iter().zip(magnitudes).enumerate() {
        for (x, col) in x.row_mut(row).iter_mut().zip(0..) {
            let unit = f64::from(bits(key, col)) / f64::from(u32::MAX);
            *x += F::from_f64(magnitude * (2.0 * unit - 1.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradient, random, thread_counts, weighted};

    const SHAPE: (usize, usize) = (40, 1000);

    fn keys() -> Vec<u64> {
        (0..SHAPE.0 as u64).map(|row| derive(7, row)).collect()
    }

    #[test]
    fn it_drops_the_asked_share_and_keeps_the_mean() {
        let (rows, cols) = SHAPE;
        let ones = vec![1.0_f32; rows * cols];
        for p in [0.05, 0.5, 0.9] {
            let mut out = vec![f32::NAN; rows * cols];
            let (x, y) = (
                Mat::new(&ones, rows, cols),
                MatMut::new(&mut out, rows, cols),
            );
            dropout(&Threads::single(), p, &keys(), x, y);
            let dropped = out.iter().filter(|&&x| x == 0.0).count() as f64;
            let share = dropped / (rows * cols) as f64;
            // Four standard deviations of a share of 40,000.
            assert!(
                (share - p).abs() < 4.0 * (p * (1.0 - p) / 4e4).sqrt(),
                "{share} of {p}"
            );
            let kept = (1.0 / (1.0 - p)) as f32;
            assert!(out.iter().all(|&x| x == 0.0 || x == kept));
            // Neighbours in a row, and in a column, do not know of each other.
            for step in [1, cols] {
                let both = out.iter().zip(&out[step..]);
                let both = both.filter(|(a, b)| **a == 0.0 && **b == 0.0).count() as f64;
                let share = both / (rows * cols - step) as f64;
                assert!((share - p * p).abs() < 0.01, "{share} of {}", p * p);
            }
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (rows, cols, keys) = (3, 19, [derive(1, 0), derive(1, 1), derive(1, 2)]);
        let (x, dout) = (random::<f64>(rows * cols, 1), random::<f64>(rows * cols, 2));
        let threads = Threads::single();
        let mut dx = vec![0.0; rows * cols];
        let into = MatMut::new(&mut dx, rows, cols);
        dropout_backward(&threads, 0.4, &keys, Mat::new(&dout, rows, cols), into);
        assert!(dx.contains(&0.0) && dx.iter().any(|&d| d != 0.0));
        check_gradient("dx of dropout", &x, &dx, |x| {
            let mut out = vec![0.0; rows * cols];
            let into = MatMut::new(&mut out, rows, cols);
            dropout(&threads, 0.4, &keys, Mat::new(x, rows, cols), into);
            weighted(&out, &dout)
        });
        // What is added does not depend on what it is added to: the gradient passes as it is.
        check_gradient("dx of noise", &x, &dout, |x| {
            let mut noisy = x.to_vec();
            add_uniform(&keys, &[0.3, 2.0, 0.0], MatMut::new(&mut noisy, rows, cols));
            weighted(&noisy, &dout)
        });
    }

    #[test]
    fn a_row_is_dropped_alike_wherever_it_lies_and_on_the_way_back() {
        let (rows, cols) = SHAPE;
        let (x, keys) = (random::<f64>(rows * cols, 1), keys());
        let mut whole = vec![0.0; rows * cols];
        let y = MatMut::new(&mut whole, rows, cols);
        dropout(&Threads::single(), 0.3, &keys, Mat::new(&x, rows, cols), y);
        for threads in &thread_counts() {
            let mut part = vec![0.0; 5 * cols];
            let (x, y) = (
                Mat::new(&x, rows, cols).rows(30..35),
                MatMut::new(&mut part, 5, cols),
            );
            dropout(threads, 0.3, &keys[30..35], x, y);
            assert_eq!(part, whole[30 * cols..35 * cols]);
        }
        // Dropout is linear, so its gradient is itself.
        let mut dx = vec![1.0; rows * cols];
        let out = MatMut::new(&mut dx, rows, cols);
        dropout_backward(
            &Threads::single(),
            0.3,
            &keys,
            Mat::new(&x, rows, cols),
            out,
        );
        assert!(dx.iter().zip(&whole).all(|(dx, y)| *dx == 1.0 + y));
    }

    #[test]
    fn uniform_noise_fills_its_range_evenly() {
        let (rows, cols) = SHAPE;
        let (mut x, magnitudes) = (vec![0.0_f32; rows * cols], vec![0.5; rows]);
        add_uniform(&keys(), &magnitudes, MatMut::new(&mut x, rows, cols));
        let mean: f32 = x.iter().sum::<f32>() / x.len() as f32;
        let variance: f32 = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        assert!(x.iter().all(|x| x.abs() <= 0.5));
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((variance - 0.25 / 3.0).abs() < 0.002, "{variance}");
    }
}
