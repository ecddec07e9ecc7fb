//! New keys and values into the pages of the KV cache.

use crate::{Float, Mat};

/// Copies row `t` to slot `slots[t]` of the pages. Called once for the keys and once for the values.
///
/// A slot is a token's place in page memory: `block · block_size + offset` within the block.
///
/// # Shapes
/// `rows: [T, H_kv · D]`, `slots: [T]` → `pages: [num_blocks, block_size, H_kv, D]`
///
/// # Panics
/// If the shapes do not agree or a slot is outside of the pages.
pub fn forward<F: Float>(rows: Mat<'_, F>, slots: &[u32], pages: &mut [F]) {
    assert_eq!(slots.len(), rows.num_rows(), "one slot for each token");
    let width = rows.num_cols();
    for (row, &slot) in slots.iter().enumerate() {
        let start = slot as usize * width;
        pages[start..start + width].copy_from_slice(rows.row(row));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_land_in_their_slots() {
        let mut pages = [0.0_f32; 8]; // 2 blocks of 2 tokens of 2 numbers
        forward(
            Mat::strided(&[1.0, 2.0, 9.0, 3.0, 4.0], 2, 2, 3),
            &[3, 0],
            &mut pages,
        );
        assert_eq!(pages, [3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0]);
    }
}
