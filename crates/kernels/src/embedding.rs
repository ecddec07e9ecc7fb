//! Rows of the embedding table, and their gradient.

use crate::{Float, Mat, MatMut, Stored, Threads};

/// `out_t = table[ids_t]`.
///
/// # Shapes
/// `table: [V, C]` (`[V, C / 32]` blocks in q8_0), `ids: [T]` → `out: [T, C]`
///
/// # Panics
/// If the shapes do not agree or an id is not in the table.
pub fn forward<F: Float, W: Stored<F>>(
    threads: &Threads,
    table: Mat<'_, W>,
    ids: &[u32],
    out: &mut [F],
) {
    let out = MatMut::new(out, ids.len(), table.num_cols() * W::NUMBERS);
    threads.split((ids, out), 256, |(ids, mut out)| {
        for (row, &id) in ids.iter().enumerate() {
            let out = out.row_mut(row).chunks_exact_mut(W::NUMBERS);
            for (out, stored) in out.zip(table.row(id as usize)) {
                stored.widen_into(out);
            }
        }
    });
}

/// `dtable[ids_t] += dout_t`, in the order of the tokens; for full fine-tuning.
///
/// # Shapes
/// `dout: [T, C]`, `ids: [T]` → `dtable: [V, C]`
///
/// # Panics
/// If the shapes do not agree or an id is not in the table.
pub fn backward<F: Float>(ids: &[u32], dout: Mat<'_, F>, mut dtable: MatMut<'_, F>) {
    assert_eq!(
        (ids.len(), dtable.num_cols()),
        (dout.num_rows(), dout.num_cols()),
        "dout's shape"
    );
    for (row, &id) in ids.iter().enumerate() {
        for (sum, &d) in dtable.row_mut(id as usize).iter_mut().zip(dout.row(row)) {
            *sum += d;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradient, random, weighted};

    /// Rows that come twice, once and never.
    #[test]
    fn gradients_match_finite_differences() {
        let (rows, cols, ids) = (5, 7, [3, 0, 3, 1]);
        let (table, dout) = (random::<f64>(rows * cols, 1), random::<f64>(4 * cols, 2));
        let mut dtable = vec![0.0; rows * cols];
        let out = MatMut::new(&mut dtable, rows, cols);
        backward(&ids, Mat::new(&dout, 4, cols), out);
        check_gradient("dtable", &table, &dtable, |table| {
            let mut out = vec![0.0; 4 * cols];
            let threads = Threads::single();
            forward(&threads, Mat::new(table, rows, cols), &ids, &mut out);
            weighted(&out, &dout)
        });
    }

    #[test]
    fn rows_are_gathered_and_their_gradients_added_up() {
        let table = [0.0, 1.0, 10.0, 11.0, 20.0, 21.0];
        let mut out = [0.0; 6];
        forward(
            &Threads::single(),
            Mat::new(&table, 3, 2),
            &[2, 0, 2],
            &mut out,
        );
        assert_eq!(out, [20.0, 21.0, 0.0, 1.0, 20.0, 21.0]);
        let mut dtable = [0.5; 6];
        backward(
            &[2, 0, 2],
            Mat::new(&out, 3, 2),
            MatMut::new(&mut dtable, 3, 2),
        );
        assert_eq!(dtable, [0.5, 1.5, 0.5, 0.5, 40.5, 42.5]);
    }

    #[test]
    #[should_panic(expected = "row 3 of 3")]
    fn an_id_outside_of_the_table_is_refused() {
        forward(
            &Threads::single(),
            Mat::new(&[0.0; 6], 3, 2),
            &[3],
            &mut [0.0; 2],
        );
    }
}
