//! How fast requests end, and so when a refused one may come again.

use std::time::{Duration, Instant};

/// Never sooner: a client that polls is load too.
const LEAST: Duration = Duration::from_secs(1);
/// Never later: clients ignore what is longer.
const MOST: Duration = Duration::from_secs(120);

/// The mean time between two ends while there is work.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last_end: Option<Instant>,
    mean_gap: Option<Duration>,
}

impl Pace {
    /// A request has ended.
    pub(super) fn ended(&mut self, now: Instant) {
        if let Some(last) = self.last_end.replace(now) {
            let gap = now.saturating_duration_since(last);
            // Of about the last eight.
            self.mean_gap = Some(self.mean_gap.map_or(gap, |mean| (mean * 7 + gap) / 8));
        }
    }

    /// There is no work: the time until the next end says nothing.
    pub(super) fn idle(&mut self) {
        self.last_end = None;
    }

    /// When everything that waits now will have left the queue.
    pub(super) fn retry_after(&self, num_waiting: usize) -> Duration {
        let gap = self.mean_gap.unwrap_or_default();
        let waiting = u32::try_from(num_waiting).unwrap_or(u32::MAX);
        gap.saturating_mul(waiting).clamp(LEAST, MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_queue_and_slower_requests_mean_a_longer_wait() {
        let mut pace = Pace::default();
        let start = Instant::now();
        assert_eq!(pace.retry_after(1000), LEAST, "nothing is known yet");
        for second in 0..4 {
            pace.ended(start + Duration::from_secs(2 * second));
        }
        assert_eq!(pace.retry_after(0), LEAST);
        assert_eq!(pace.retry_after(10), Duration::from_secs(20));
        assert_eq!(pace.retry_after(1000), MOST);
        pace.idle();
        pace.ended(start + Duration::from_secs(3600));
        assert_eq!(
            pace.retry_after(10),
            Duration::from_secs(20),
            "an idle hour"
        );
    }
}
