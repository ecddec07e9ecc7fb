//! When a replica counts as ready or failed: a pure function of what its probes returned.

use std::time::Duration;

use super::ReadinessProbe;

/// What one probe saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// The replica answered 200.
    Ready,
    /// Anything else, in words.
    Failed(String),
}

/// What a replica is, after a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeVerdict {
    /// It may still start; probe again.
    Starting,
    /// It serves.
    Ready,
    /// It served and does not answer now; probe again.
    NotReady,
    /// It never answered in its initial delay, or stopped for too long. The reason is the last probe's.
    Failed(String),
}

/// The probes of one replica so far. Times are since the replica was started.
#[derive(Debug, Clone, Default)]
pub struct ProbeState {
    last_ready: Option<Duration>,
}

impl ProbeState {
    /// Whether a probe was ever answered.
    pub fn was_ready(&self) -> bool {
        self.last_ready.is_some()
    }

    /// Takes in one outcome seen at `elapsed` and says what the replica is now.
    pub fn observe(
        &mut self,
        probe: &ReadinessProbe,
        elapsed: Duration,
        outcome: ProbeOutcome,
    ) -> ProbeVerdict {
        let reason = match outcome {
            ProbeOutcome::Ready => {
                self.last_ready = Some(elapsed);
                return ProbeVerdict::Ready;
            }
            ProbeOutcome::Failed(reason) => reason,
        };
        match self.last_ready {
            None if elapsed < probe.initial_delay => ProbeVerdict::Starting,
            Some(ready) if elapsed.saturating_sub(ready) < probe.failure_threshold => {
                ProbeVerdict::NotReady
            }
            _ => ProbeVerdict::Failed(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn failed() -> ProbeOutcome {
        ProbeOutcome::Failed("refused".to_owned())
    }

    #[test]
    fn a_replica_has_its_initial_delay_to_start() {
        let probe = ReadinessProbe {
            initial_delay: at(60),
            ..ReadinessProbe::default()
        };
        let mut state = ProbeState::default();
        assert_eq!(
            state.observe(&probe, at(0), failed()),
            ProbeVerdict::Starting
        );
        assert_eq!(
            state.observe(&probe, at(59), failed()),
            ProbeVerdict::Starting
        );
        assert_eq!(
            state.observe(&probe, at(60), failed()),
            ProbeVerdict::Failed("refused".into())
        );
    }

    #[test]
    fn a_ready_replica_survives_a_short_fault() {
        let probe = ReadinessProbe {
            failure_threshold: at(30),
            ..ReadinessProbe::default()
        };
        let mut state = ProbeState::default();
        assert_eq!(
            state.observe(&probe, at(5), ProbeOutcome::Ready),
            ProbeVerdict::Ready
        );
        assert_eq!(
            state.observe(&probe, at(20), failed()),
            ProbeVerdict::NotReady
        );
        assert_eq!(
            state.observe(&probe, at(35), failed()),
            ProbeVerdict::Failed("refused".into())
        );
    }
}
