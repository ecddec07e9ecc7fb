//! Products with a weight: forward, the two backward products, and the bias.
//!
//! A weight is stored as checkpoints store it, `w: [N, K]` for `K` inputs and `N` outputs. `alpha` and `beta` make the
//! low-rank updates cheap: LoRA's `y += s · (x·Aᵀ)·Bᵀ` is [`forward`] with `alpha = s, beta = 1` on the saved `x·Aᵀ`.

mod bf16;
mod invariant;
mod product;

pub(crate) use bf16::{Along, product as product_bf16};
pub use invariant::forward_invariant;
pub(crate) use product::{normal, product, product_block, transposed};

use crate::simd::{Op, Simd, dispatch};
use crate::{Float, Mat, MatMut, Threads, Weight};

/// `y = alpha · x·wᵀ + beta · y`. With `beta = 0`, what `y` held does not matter.
///
/// The fast product for training. Its rounding may depend on the number of rows; see [`forward_invariant`]. With a
/// weight kept in `bf16` the input is rounded to `bf16` too, which halves the time on machines that multiply `bf16`.
///
/// # Shapes
/// `x: [T, K]`, `w: [N, K]` → `y: [T, N]`
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<F: Float, W: Weight<F>>(
    threads: &Threads,
    alpha: F,
    x: Mat<'_, F>,
    w: Mat<'_, W>,
    beta: F,
    y: MatMut<'_, F>,
) {
    W::forward(threads, alpha, x, w, beta, y);
}

/// `dx = alpha · dy·w + beta · dx`, the gradient of [`forward`]'s input; `dy` is rounded as `x` is there.
///
/// # Shapes
/// `dy: [T, N]`, `w: [N, K]` → `dx: [T, K]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_input<F: Float, W: Weight<F>>(
    threads: &Threads,
    alpha: F,
    dy: Mat<'_, F>,
    w: Mat<'_, W>,
    beta: F,
    dx: MatMut<'_, F>,
) {
    W::backward_input(threads, alpha, dy, w, beta, dx);
}

/// `dw = alpha · dyᵀ·x + beta · dw`, the gradient of [`forward`]'s weight; `beta = 1` accumulates over micro-batches.
///
/// # Shapes
/// `dy: [T, N]`, `x: [T, K]` → `dw: [N, K]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_weight<F: Float>(
    threads: &Threads,
    alpha: F,
    dy: Mat<'_, F>,
    x: Mat<'_, F>,
    beta: F,
    dw: MatMut<'_, F>,
) {
    product(threads, alpha, transposed(dy), normal(x), beta, dw);
}

/// `y += bias` on every row.
///
/// # Shapes
/// `bias: [N]`, `y: [T, N]`
///
/// # Panics
/// If the shapes do not agree.
pub fn add_bias<F: Float>(threads: &Threads, bias: &[F], y: MatMut<'_, F>) {
    assert_eq!(bias.len(), y.num_cols(), "one bias for each column");
    threads.split(y, 256, |y| dispatch(AddBias { bias, y }));
}

/// `dbias += Σ_t dy_t`, the gradient of [`add_bias`].
///
/// # Shapes
/// `dy: [T, N]` → `dbias: [N]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_bias<F: Float>(dy: Mat<'_, F>, dbias: &mut [F]) {
    assert_eq!(dbias.len(), dy.num_cols(), "one bias for each column");
    for row in 0..dy.num_rows() {
        for (sum, &d) in dbias.iter_mut().zip(dy.row(row)) {
            *sum += d;
        }
    }
}

struct AddBias<'a, F> {
    bias: &'a [F],
    y: MatMut<'a, F>,
}

impl<F: Float> Op for AddBias<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in 0..self.y.num_rows() {
            for (y, &bias) in self.y.row_mut(row).iter_mut().zip(self.bias) {
                *y += bias;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_close, check_gradient, narrow, random, thread_counts, weighted};

    /// Of the input, the weight and the bias, in sizes that no tile divides.
    #[test]
    fn gradients_match_finite_differences() {
        let threads = Threads::single();
        for (t, k, n) in [(1, 3, 2), (5, 19, 11), (9, 4, 23)] {
            let alpha = 0.75;
            let (x, w) = (random::<f64>(t * k, 1), random::<f64>(n * k, 2));
            let (bias, dy) = (random::<f64>(n, 3), random::<f64>(t * n, 4));
            let loss = |x: &[f64], w: &[f64], bias: &[f64]| {
                let mut y = vec![f64::NAN; t * n];
                let (x, w) = (Mat::new(x, t, k), Mat::new(w, n, k));
                forward(&threads, alpha, x, w, 0.0, MatMut::new(&mut y, t, n));
                add_bias(&threads, bias, MatMut::new(&mut y, t, n));
                weighted(&y, &dy)
            };
            let upstream = Mat::new(&dy, t, n);
            let mut dx = vec![f64::NAN; t * k];
            let into = MatMut::new(&mut dx, t, k);
            backward_input(&threads, alpha, upstream, Mat::new(&w, n, k), 0.0, into);
            check_gradient("dx", &x, &dx, |x| loss(x, &w, &bias));
            let mut dw = vec![f64::NAN; n * k];
            let into = MatMut::new(&mut dw, n, k);
            backward_weight(&threads, alpha, upstream, Mat::new(&x, t, k), 0.0, into);
            check_gradient("dw", &w, &dw, |w| loss(&x, w, &bias));
            let mut dbias = vec![0.0; n];
            backward_bias(upstream, &mut dbias);
            check_gradient("dbias", &bias, &dbias, |bias| loss(&x, &w, bias));
        }
    }

    /// `alpha · a·b + beta · out` by the definition.
    fn naive(
        alpha: f64,
        a: impl Fn(usize, usize) -> f64,
        b: impl Fn(usize, usize) -> f64,
        inner: usize,
        beta: f64,
        out: &mut [f64],
        cols: usize,
    ) {
        for (i, out) in out.iter_mut().enumerate() {
            let sum: f64 = (0..inner).map(|k| a(i / cols, k) * b(k, i % cols)).sum();
            *out = alpha * sum + beta * *out;
        }
    }

    #[test]
    fn products_follow_their_definition() {
        for threads in &thread_counts() {
            for (t, k, n) in [
                (1, 1, 1),
                (1, 33, 7),
                (5, 16, 3),
                (17, 40, 70),
                (130, 65, 67),
            ] {
                let (x, w) = (random::<f64>(t * k, 1), random::<f64>(n * k, 2));
                let (y, dy) = (random::<f64>(t * n, 3), random::<f64>(t * n, 4));
                let (mx, mw, mdy) = (Mat::new(&x, t, k), Mat::new(&w, n, k), Mat::new(&dy, t, n));
                for beta in [0.0, 1.0, -0.5] {
                    let (mut expected, mut actual) = (y.clone(), y.clone());
                    naive(
                        0.7,
                        |i, j| x[i * k + j],
                        |i, j| w[j * k + i],
                        k,
                        beta,
                        &mut expected,
                        n,
                    );
                    forward(threads, 0.7, mx, mw, beta, MatMut::new(&mut actual, t, n));
                    check_close("y", &actual, &expected, 1e-13);

                    actual.clone_from(&y);
                    forward_invariant(threads, 0.7, mx, mw, beta, MatMut::new(&mut actual, t, n));
                    check_close("y, invariant", &actual, &expected, 1e-13);

                    let mut single = narrow(&y);
                    let (x, w) = (narrow(&x), narrow(&w));
                    let (mx, mw) = (Mat::new(&x, t, k), Mat::new(&w, n, k));
                    forward(
                        threads,
                        0.7,
                        mx,
                        mw,
                        beta as f32,
                        MatMut::new(&mut single, t, n),
                    );
                    check_close("y, f32", &single, &expected, 1e-5);
                }
                let (mut expected, mut actual) = (x.clone(), x.clone());
                naive(
                    0.7,
                    |i, j| dy[i * n + j],
                    |i, j| w[i * k + j],
                    n,
                    1.0,
                    &mut expected,
                    k,
                );
                backward_input(threads, 0.7, mdy, mw, 1.0, MatMut::new(&mut actual, t, k));
                check_close("dx", &actual, &expected, 1e-13);

                let (mut expected, mut actual) = (w.clone(), w.clone());
                naive(
                    0.7,
                    |i, j| dy[j * n + i],
                    |i, j| x[i * k + j],
                    t,
                    1.0,
                    &mut expected,
                    k,
                );
                backward_weight(threads, 0.7, mdy, mx, 1.0, MatMut::new(&mut actual, n, k));
                check_close("dw", &actual, &expected, 1e-13);
            }
        }
    }

    #[test]
    fn a_block_of_a_wider_buffer_is_written_alone() {
        let (x, w) = (random::<f64>(3 * 4, 1), random::<f64>(2 * 4, 2));
        let mut dense = vec![0.0; 3 * 2];
        forward(
            &Threads::single(),
            1.0,
            Mat::new(&x, 3, 4),
            Mat::new(&w, 2, 4),
            0.0,
            MatMut::new(&mut dense, 3, 2),
        );
        let mut wide = vec![9.0; 3 * 5];
        let block = MatMut::new(&mut wide, 3, 5).block(0..3, 1..3);
        forward(
            &Threads::single(),
            1.0,
            Mat::new(&x, 3, 4),
            Mat::new(&w, 2, 4),
            0.0,
            block,
        );
        for row in 0..3 {
            assert_eq!(wide[row * 5 + 1..row * 5 + 3], dense[row * 2..row * 2 + 2]);
            assert_eq!((wide[row * 5], wide[row * 5 + 3]), (9.0, 9.0));
        }
    }

    #[test]
    fn beta_zero_ignores_what_was_there() {
        let mut y = [f32::NAN];
        forward(
            &Threads::single(),
            1.0,
            Mat::new(&[2.0], 1, 1),
            Mat::new(&[3.0], 1, 1),
            0.0,
            MatMut::new(&mut y, 1, 1),
        );
        assert_eq!(y, [6.0]);
        y = [f32::NAN];
        forward_invariant(
            &Threads::single(),
            1.0,
            Mat::new(&[2.0], 1, 1),
            Mat::new(&[3.0], 1, 1),
            0.0,
            MatMut::new(&mut y, 1, 1),
        );
        assert_eq!(y, [6.0]);
    }

    #[test]
    fn invariant_rows_do_not_see_their_company() {
        let (t, k, n) = (23, 75, 45);
        let (x, w) = (random::<f32>(t * k, 1), random::<f32>(n * k, 2));
        let w = Mat::new(&w, n, k);
        let mut alone = vec![0.0_f32; t * n];
        for (x, y) in x.chunks(k).zip(alone.chunks_mut(n)) {
            forward_invariant(
                &Threads::single(),
                1.5,
                Mat::new(x, 1, k),
                w,
                0.0,
                MatMut::new(y, 1, n),
            );
        }
        // Enough rows for a third thread, and more than one block of rows at a time.
        let big: Vec<f32> = (0..200).flat_map(|_| x.iter().copied()).collect();
        for threads in &thread_counts() {
            for rows in 1..=t {
                let mut y = vec![0.0; rows * n];
                let part = Mat::new(&x[(t - rows) * k..], rows, k);
                forward_invariant(threads, 1.5, part, w, 0.0, MatMut::new(&mut y, rows, n));
                assert_eq!(y, alone[(t - rows) * n..]);
            }
            let mut y = vec![0.0; 200 * t * n];
            forward_invariant(
                threads,
                1.5,
                Mat::new(&big, 200 * t, k),
                w,
                0.0,
                MatMut::new(&mut y, 200 * t, n),
            );
            assert!(y.chunks(t * n).all(|y| y == alone));
        }
    }

    #[test]
    fn a_weight_in_bf16_gives_the_bits_of_the_widened_weight() {
        for (t, k, n) in [(1, 75, 45), (1, 1024, 1100), (7, 33, 9), (23, 64, 13)] {
            let (x, w) = (random::<f32>(t * k, 1), random::<f32>(n * k, 2));
            let kept: Vec<half::bf16> = w.iter().map(|&w| half::bf16::from_f32(w)).collect();
            let widened: Vec<f32> = kept.iter().map(|w| w.to_f32()).collect();
            for threads in &thread_counts() {
                let x = Mat::new(&x, t, k);
                let (mut expected, mut actual) = (vec![1.0; t * n], vec![1.0; t * n]);
                let y = MatMut::new(&mut expected, t, n);
                forward_invariant(threads, 0.7, x, Mat::new(&widened, n, k), 0.5, y);
                let y = MatMut::new(&mut actual, t, n);
                forward_invariant(threads, 0.7, x, Mat::new(&kept, n, k), 0.5, y);
                assert_eq!(actual, expected);
            }
        }
    }

    #[test]
    fn bias_and_its_gradient() {
        let mut y = [1.0, 2.0, 3.0, 4.0];
        add_bias(&Threads::single(), &[10.0, 20.0], MatMut::new(&mut y, 2, 2));
        assert_eq!(y, [11.0, 22.0, 13.0, 24.0]);
        let mut dbias = [1.0, 1.0];
        backward_bias(Mat::new(&y, 2, 2), &mut dbias);
        assert_eq!(dbias, [25.0, 47.0]);
    }
}
