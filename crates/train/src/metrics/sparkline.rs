//! A curve as one line of text.

const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Draws `values` as a line of at most `width` block characters, each the mean
/// of its share of the values, the lowest `▁` and the highest `█`.
///
/// ```
/// assert_eq!(updraft_train::metrics::sparkline(&[8.0, 5.0, 3.0, 1.0], 4), "█▅▃▁");
/// ```
pub fn sparkline(values: &[f64], width: usize) -> String {
    let width = width.min(values.len());
    let mean = |column: usize| {
        let share = &values[column * values.len() / width..(column + 1) * values.len() / width];
        share.iter().sum::<f64>() / share.len() as f64
    };
    let means: Vec<f64> = (0..width).map(mean).collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let top = (LEVELS.len() - 1) as f64;
    let level = |value: f64| {
        let height = if high > low {
            (value - low) / (high - low)
        } else {
            0.0
        };
        LEVELS[(height * top).round() as usize]
    };
    means.into_iter().map(level).collect()
}

#[cfg(test)]
mod tests {
    use super::sparkline;

    #[test]
    fn many_values_share_few_columns() {
        let falling: Vec<f64> = (0..1000).map(|i| 1000.0 - f64::from(i)).collect();
        assert_eq!(sparkline(&falling, 8), "█▇▆▅▄▃▂▁");
    }

    #[test]
    fn edges() {
        assert_eq!(sparkline(&[], 10), "");
        assert_eq!(sparkline(&[1.0, 1.0], 10), "▁▁");
        assert_eq!(sparkline(&[1.0], 0), "");
    }
}
