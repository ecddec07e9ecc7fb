//! When a node has been idle long enough to end itself: a pure decision.

use crate::provider::Lease;
use crate::resources::WaitFor;

impl Lease {
    /// Whether what goes on now keeps the node alive.
    pub(super) fn is_busy(&self, unfinished_jobs: bool, sessions: bool) -> bool {
        match self.wait_for {
            WaitFor::None => false,
            WaitFor::Jobs => unfinished_jobs,
            WaitFor::JobsAndSsh => unfinished_jobs || sessions,
        }
    }

    /// Whether the node has been idle for as long as it may, in seconds since 1970.
    ///
    /// A clock that was set back is no idleness.
    pub(super) fn is_over(&self, last_active: i64, now: i64) -> bool {
        let idle = u64::try_from(now - last_active).unwrap_or(0);
        self.idle.is_some_and(|limit| idle >= limit.as_secs())
    }
}

/// Whether somebody is logged in at a terminal over ssh.
pub(super) fn has_sessions() -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return false;
    };
    processes.flatten().any(|process| {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.starts_with("sshd") && line.contains("@pts/")
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn lease(wait_for: WaitFor) -> Lease {
        Lease {
            idle: Some(Duration::from_secs(600)),
            down: true,
            wait_for,
        }
    }

    #[test]
    fn what_keeps_a_node_alive() {
        for (wait_for, jobs, sessions, busy) in [
            (WaitFor::JobsAndSsh, true, false, true),
            (WaitFor::JobsAndSsh, false, true, true),
            (WaitFor::JobsAndSsh, false, false, false),
            (WaitFor::Jobs, false, true, false),
            (WaitFor::Jobs, true, false, true),
            (WaitFor::None, true, true, false),
        ] {
            assert_eq!(
                lease(wait_for).is_busy(jobs, sessions),
                busy,
                "{wait_for:?}"
            );
        }
    }

    #[test]
    fn the_time_counts_from_the_last_activity() {
        let lease = lease(WaitFor::Jobs);
        assert!(!lease.is_over(1000, 1599));
        assert!(lease.is_over(1000, 1600));
        assert!(!lease.is_over(1000, 10), "a clock set back");
        let never = Lease {
            idle: None,
            ..lease
        };
        assert!(!never.is_over(0, i64::MAX));
    }
}
