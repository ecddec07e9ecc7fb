//! The learning rate as a pure function of the steps already done.

use serde::{Deserialize, Serialize};

/// Shapes of the learning rate over a run, by their `lr_scheduler_type` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Rises over the warm-up, then falls in a straight line to zero.
    Linear,
    /// Rises over the warm-up, then falls along half a cosine to zero.
    Cosine,
    /// The same from the first step to the last.
    Constant,
    /// Rises over the warm-up, then stays.
    ConstantWithWarmup,
}

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The shape.
    pub kind: SchedulerType,
    /// The peak.
    pub learning_rate: f64,
    /// Steps over which the rate rises from zero.
    pub warmup_steps: u64,
    /// Optimizer steps in the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// The learning rate of the step that follows `completed` steps.
    ///
    /// With `w` warm-up steps and `N` in total, `linear` is
    /// `t / max(1, w)` while `t < w`, then `max(0, (N - t) / max(1, N - w))`:
    /// the first step of a warm-up has learning rate zero.
    ///
    /// # Source
    /// transformers 5, `optimization.py`, `get_*_schedule_with_warmup`.
    pub fn learning_rate(&self, completed: u64) -> f64 {
        self.learning_rate * self.factor(completed)
    }

    fn factor(&self, t: u64) -> f64 {
        let w = self.warmup_steps;
        if self.kind == SchedulerType::Constant {
            return 1.0;
        }
        if t < w {
            return t as f64 / w.max(1) as f64;
        }
        let span = self.total_steps.saturating_sub(w).max(1) as f64;
        match self.kind {
            SchedulerType::Linear => self.total_steps.saturating_sub(t) as f64 / span,
            SchedulerType::Cosine => {
                let progress = (t - w) as f64 / span;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
            SchedulerType::Constant | SchedulerType::ConstantWithWarmup => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: SchedulerType, warmup_steps: u64, total_steps: u64) -> Vec<f64> {
        let schedule = Schedule {
            kind,
            learning_rate: 1.0,
            warmup_steps,
            total_steps,
        };
        (0..=total_steps)
            .map(|t| schedule.learning_rate(t))
            .collect()
    }

    #[test]
    fn linear_starts_at_zero_and_ends_at_zero() {
        let expected = [
            0.0,
            0.5,
            1.0,
            5.0 / 6.0,
            4.0 / 6.0,
            3.0 / 6.0,
            2.0 / 6.0,
            1.0 / 6.0,
            0.0,
        ];
        assert_eq!(rates(SchedulerType::Linear, 2, 8), expected);
    }

    #[test]
    fn without_warmup_the_first_step_is_the_peak() {
        assert_eq!(
            rates(SchedulerType::Linear, 0, 4),
            [1.0, 0.75, 0.5, 0.25, 0.0]
        );
    }

    #[test]
    fn cosine_is_half_way_down_in_the_middle() {
        let rates = rates(SchedulerType::Cosine, 2, 10);
        assert_eq!(rates[..3], [0.0, 0.5, 1.0]);
        assert!((rates[6] - 0.5).abs() < 1e-15 && rates[10].abs() < 1e-15);
    }

    #[test]
    fn constants_stay() {
        assert_eq!(rates(SchedulerType::Constant, 2, 3), [1.0; 4]);
        assert_eq!(
            rates(SchedulerType::ConstantWithWarmup, 2, 3),
            [0.0, 0.5, 1.0, 1.0]
        );
    }

    #[test]
    fn a_warmup_longer_than_the_run_is_no_division_by_zero() {
        assert_eq!(rates(SchedulerType::Linear, 10, 2), [0.0, 0.1, 0.2]);
    }
}
