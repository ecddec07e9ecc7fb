//! Dynamic loss scaling: f16 cannot hold small gradients, so they are computed of a loss that is multiplied with a power
//! of two, as large as does not overflow.
//!
//! # Source
//! Micikevicius et al. 2017, §3.2, <https://arxiv.org/abs/1710.03740>; the numbers are those of `torch.amp.GradScaler`

use crate::StepRecord;

/// Where the scale begins.
const FIRST: f64 = 65_536.0;
/// Steps without an overflow after which it doubles.
const PATIENCE: u32 = 2000;

/// What the loss is multiplied with: a function of which steps before overflowed, so that a run that continues has it from
/// its log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LossScale {
    scale: f64,
    /// Steps since the last change.
    since: u32,
    overflows: u64,
}

impl LossScale {
    /// After the steps of a log.
    pub(crate) fn after(log: &[StepRecord]) -> Self {
        let mut scale = Self {
            scale: FIRST,
            since: 0,
            overflows: 0,
        };
        for record in log {
            scale.update(record.overflowed);
        }
        scale
    }

    /// The factor of the next step.
    pub(crate) fn factor(&self) -> f64 {
        self.scale
    }

    /// Steps that changed nothing so far; the schedule does not count them.
    pub(crate) fn overflows(&self) -> u64 {
        self.overflows
    }

    /// Goes on after a step.
    pub(crate) fn update(&mut self, overflowed: bool) {
        self.since += 1;
        if overflowed {
            self.overflows += 1;
            (self.scale, self.since) = (self.scale / 2.0, 0);
        } else if self.since == PATIENCE {
            (self.scale, self.since) = (self.scale * 2.0, 0);
        }
    }

    /// Whether it has fallen so low that no step will ever succeed.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.scale < 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_at_each_overflow_and_doubles_after_two_thousand_steps() {
        let mut scale = LossScale::after(&[]);
        assert_eq!(scale.factor(), 65_536.0);
        scale.update(true);
        scale.update(true);
        assert_eq!((scale.factor(), scale.overflows()), (16_384.0, 2));
        for _ in 0..1999 {
            scale.update(false);
        }
        assert_eq!(scale.factor(), 16_384.0);
        scale.update(false);
        assert_eq!(scale.factor(), 32_768.0);
        for _ in 0..16 {
            assert!(!scale.is_exhausted());
            scale.update(true);
        }
        assert!(scale.is_exhausted());
    }

    #[test]
    fn a_log_gives_back_the_scale() {
        let overflowed = [true, false, false, true, false];
        let mut scale = LossScale::after(&[]);
        overflowed
            .iter()
            .for_each(|&overflowed| scale.update(overflowed));
        let record = |(&overflowed, step): (&bool, u64)| StepRecord {
            overflowed,
            ..crate::testing::records(step)[step as usize - 1]
        };
        let log: Vec<_> = overflowed.iter().zip(1..).map(record).collect();
        assert_eq!(LossScale::after(&log), scale);
    }
}
