//! One training example: token ids, and which of them the loss counts.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The label of a token that the loss skips, as in PyTorch.
pub const IGNORE_INDEX: i64 = -100;

/// Token ids and the ranges of them that are trained.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// The conversation's tokens.
    pub input_ids: Vec<u32>,
    /// Ranges of `input_ids` to train, ascending and apart.
    pub loss_spans: Vec<Range<u32>>,
}

impl Example {
    /// How many tokens.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// How many labels count once they are shifted: the first token of a
    /// sequence follows nothing, so nothing predicts it.
    pub fn trained_tokens(&self) -> u32 {
        self.loss_spans
            .iter()
            .map(|span| span.end.saturating_sub(span.start.max(1)))
            .sum()
    }

    /// The labels, unshifted: a token's own id where it is trained, else
    /// [`IGNORE_INDEX`].
    pub fn labels(&self) -> Vec<i64> {
        let mut labels = vec![IGNORE_INDEX; self.input_ids.len()];
        for span in &self.loss_spans {
            let range = span.start as usize..span.end as usize;
            for (label, &id) in labels[range.clone()].iter_mut().zip(&self.input_ids[range]) {
                *label = i64::from(id);
            }
        }
        labels
    }

    /// The part of an example in a window of its tokens, as a dataset stores
    /// it when it splits or truncates.
    ///
    /// # Panics
    /// If the window reaches past the tokens.
    #[must_use]
    pub fn window(&self, window: Range<usize>) -> Example {
        let clip = |at: u32| (at as usize).clamp(window.start, window.end) - window.start;
        let spans = self.loss_spans.iter().filter_map(|span| {
            let (start, end) = (clip(span.start), clip(span.end));
            (start < end).then_some(start as u32..end as u32)
        });
        Example {
            loss_spans: spans.collect(),
            input_ids: self.input_ids[window.clone()].to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Example {
        Example {
            input_ids: (10..20).collect(),
            loss_spans: vec![0..3, 5..7],
        }
    }

    #[test]
    fn labels_are_the_ids_inside_spans() {
        assert_eq!(
            example().labels(),
            [10, 11, 12, -100, -100, 15, 16, -100, -100, -100]
        );
    }

    #[test]
    fn the_first_token_is_never_trained() {
        assert_eq!(example().trained_tokens(), 4);
        assert_eq!(Example::default().trained_tokens(), 0);
    }

    #[test]
    fn a_window_keeps_what_it_covers() {
        let window = example().window(2..6);
        assert_eq!(window.input_ids, [12, 13, 14, 15]);
        assert_eq!(window.loss_spans, vec![0..1, 3..4]);
        let whole = example().window(0..10);
        assert_eq!(whole, example());
    }
}
