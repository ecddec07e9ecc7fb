//! Packing: best-fit-decreasing over the lengths of a window of examples.

use std::collections::BTreeSet;

/// Puts items of these lengths into as few rows of `capacity` as best fit
/// finds: longest first, each into the fullest row that still has room.
///
/// A row lists the positions of its items in ascending order, and rows come in
/// the order of their first item, so a shuffled input stays shuffled. The
/// result depends on the arguments alone. An item longer than `capacity` gets
/// a row of its own.
pub fn best_fit_decreasing(lengths: &[u32], capacity: u32) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..lengths.len()).collect();
    longest_first.sort_by_key(|&item| (std::cmp::Reverse(lengths[item]), item));

    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut by_room: BTreeSet<(u32, usize)> = BTreeSet::new();
    for item in longest_first {
        let length = lengths[item];
        let fullest = by_room.range((length, 0)..).next().copied();
        let (room, row) = match fullest {
            Some(found) => {
                by_room.remove(&found);
                found
            }
            None => {
                rows.push(Vec::new());
                (capacity.max(length), rows.len() - 1)
            }
        };
        rows[row].push(item);
        by_room.insert((room - length, row));
    }
    for row in &mut rows {
        row.sort_unstable();
    }
    rows.sort_unstable();
    rows
}

/// The share of `rows` × `capacity` that `tokens` fill.
pub fn fill_rate(tokens: u64, rows: u64, capacity: u32) -> f64 {
    tokens as f64 / (rows.max(1) * u64::from(capacity)) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    #[test]
    fn the_fullest_row_with_room_wins() {
        // 7 opens a row with room for 3, 6 one with room for 4: the 3 goes to
        // the first although the second would take it too.
        assert_eq!(
            best_fit_decreasing(&[6, 3, 7, 4], 10),
            [vec![0, 3], vec![1, 2]]
        );
    }

    #[test]
    fn rows_keep_the_order_of_the_input() {
        assert_eq!(
            best_fit_decreasing(&[5, 5, 5, 5], 10),
            [vec![0, 1], vec![2, 3]]
        );
        assert_eq!(
            best_fit_decreasing(&[1, 9, 9, 1], 10),
            [vec![0, 1], vec![2, 3]]
        );
    }

    #[test]
    fn edges() {
        assert!(best_fit_decreasing(&[], 10).is_empty());
        assert_eq!(best_fit_decreasing(&[12, 0, 3], 10), [vec![0, 1], vec![2]]);
    }

    #[test]
    fn every_item_lands_in_one_row_and_no_row_overflows() {
        let mut random = SplitMix64::new(7);
        for capacity in [64, 512] {
            let lengths: Vec<u32> = (0..500)
                .map(|_| 1 + (random.next_u64() % 64) as u32)
                .collect();
            let rows = best_fit_decreasing(&lengths, capacity);
            let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..500).collect::<Vec<_>>());
            for row in &rows {
                assert!(row.iter().map(|&item| lengths[item]).sum::<u32>() <= capacity);
            }
            assert_eq!(
                rows,
                best_fit_decreasing(&lengths, capacity),
                "the same plan twice"
            );
        }
    }

    #[test]
    fn short_items_fill_rows_almost_entirely() {
        let mut random = SplitMix64::new(3);
        let lengths: Vec<u32> = (0..4096)
            .map(|_| 20 + (random.next_u64() % 1000) as u32)
            .collect();
        let rows = best_fit_decreasing(&lengths, 4096);
        let tokens = lengths.iter().copied().map(u64::from).sum();
        let fill = fill_rate(tokens, rows.len() as u64, 4096);
        assert!(fill > 0.99, "fill rate {fill}");
    }
}
