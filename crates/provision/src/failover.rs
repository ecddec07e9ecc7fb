//! What to try next when a candidate could not be had: a pure state machine without clock or calls.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::error::Error;
use crate::offer::Offer;
use crate::planner::Plan;

/// How long to go on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FailoverPolicy {
    /// When every candidate has been tried: wait this long and begin again, for ever. `None` gives up.
    pub retry_until_up: Option<Duration>,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Try to create this.
    Try(Offer),
    /// Wait, then ask again.
    Wait(Duration),
    /// There is nothing left to try.
    GiveUp,
}

/// One try and how it failed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Attempt {
    /// The provider that was asked.
    pub provider: String,
    /// The machine type that was asked for.
    pub instance_type: String,
    /// The region.
    pub region: String,
    /// The zone, where there are zones.
    pub zone: Option<String>,
    /// Whether it was a spot offer.
    pub spot: bool,
    /// What the provider said.
    pub error: String,
    /// What is not tried any more because of it.
    pub blocked: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.zone.as_deref().unwrap_or(&self.region);
        let market = if self.spot { " spot" } else { "" };
        write!(
            f,
            "  {} {}{market} in {place}: {} (no more {})",
            self.provider, self.instance_type, self.error, self.blocked
        )
    }
}

/// A part of the world that is not tried any more; what is `None` matches everything.
#[derive(Debug, Clone)]
struct Block {
    provider: String,
    instance_type: Option<String>,
    region: Option<String>,
    zone: Option<String>,
    spot: Option<bool>,
    /// Whether waiting can lift it.
    passing: bool,
}

impl Block {
    fn covers(&self, offer: &Offer) -> bool {
        let is = |wanted: &Option<String>, offered: Option<&str>| {
            wanted
                .as_deref()
                .is_none_or(|wanted| offered == Some(wanted))
        };
        self.provider == offer.provider
            && is(&self.instance_type, Some(&offer.instance_type))
            && is(&self.region, Some(&offer.region))
            && is(&self.zone, offer.zone.as_deref())
            && self.spot.is_none_or(|spot| spot == offer.spot)
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.provider)?;
        let parts = [&self.instance_type, &self.zone];
        parts
            .into_iter()
            .flatten()
            .try_for_each(|part| write!(f, " {part}"))?;
        if let (None, Some(region)) = (&self.zone, &self.region) {
            write!(f, " in {region}")?;
        }
        match self.spot {
            Some(true) => f.write_str(" spot"),
            _ => Ok(()),
        }
    }
}

/// The candidates of a plan, tried in order, with what errors have taught.
#[derive(Debug, Clone)]
pub struct Failover {
    plan: Vec<Offer>,
    waiting: VecDeque<Offer>,
    blocks: Vec<Block>,
    attempts: Vec<Attempt>,
    policy: FailoverPolicy,
    /// A provider that asked to be left alone for a while.
    pause: Option<Duration>,
}

impl Failover {
    /// Begins with a plan's candidates.
    pub fn new(plan: Plan, policy: FailoverPolicy) -> Self {
        Self {
            waiting: plan.candidates.iter().cloned().collect(),
            plan: plan.candidates,
            blocks: Vec::new(),
            attempts: Vec::new(),
            policy,
            pause: None,
        }
    }

    /// What to do now.
    pub fn step(&mut self) -> Step {
        if let Some(pause) = self.pause.take() {
            return Step::Wait(pause);
        }
        while let Some(offer) = self.waiting.pop_front() {
            if !self.blocks.iter().any(|block| block.covers(&offer)) {
                return Step::Try(offer);
            }
        }
        // Waiting helps only where something passes.
        match self.policy.retry_until_up {
            Some(pause) if self.blocks.iter().any(|block| block.passing) => {
                self.blocks.retain(|block| !block.passing);
                self.waiting = self.plan.iter().cloned().collect();
                Step::Wait(pause)
            }
            _ => Step::GiveUp,
        }
    }

    /// Takes in that `offer` failed with `error`; returns the error when trying others is wrong.
    ///
    /// Capacity blocks the type in its zone, or in its region where there are no zones; quota blocks
    /// the type in its region; credentials block the provider; a rate limit blocks nothing and waits.
    /// Any other passing fault blocks the zone. What is the caller's own fault is returned.
    ///
    /// # Errors
    /// The error itself, when no other candidate would do better.
    pub fn failed(&mut self, offer: &Offer, error: Error) -> Result<(), Error> {
        let everywhere = Block {
            provider: offer.provider.clone(),
            instance_type: None,
            region: None,
            zone: None,
            spot: None,
            passing: false,
        };
        let block = match &error {
            Error::NoCapacity { .. } => Some(Block {
                instance_type: Some(offer.instance_type.clone()),
                region: Some(offer.region.clone()),
                zone: offer.zone.clone(),
                spot: Some(offer.spot),
                passing: true,
                ..everywhere
            }),
            Error::Quota { .. } => Some(Block {
                instance_type: Some(offer.instance_type.clone()),
                region: Some(offer.region.clone()),
                spot: Some(offer.spot),
                ..everywhere
            }),
            Error::Unauthenticated { .. } => Some(everywhere),
            Error::RateLimited { retry_after, .. } => {
                self.pause = Some(*retry_after);
                self.waiting.push_front(offer.clone());
                None
            }
            Error::Unavailable { .. } => Some(Block {
                region: Some(offer.region.clone()),
                zone: offer.zone.clone(),
                passing: true,
                ..everywhere
            }),
            _ => return Err(error),
        };
        let Some(block) = block else { return Ok(()) };
        let attempt = Attempt {
            provider: offer.provider.clone(),
            instance_type: offer.instance_type.clone(),
            region: offer.region.clone(),
            zone: offer.zone.clone(),
            spot: offer.spot,
            error: error.to_string(),
            blocked: block.to_string(),
        };
        tracing::warn!("{}", attempt.to_string().trim_start());
        self.attempts.push(attempt);
        self.blocks.push(block);
        Ok(())
    }

    /// What was tried so far.
    pub fn attempts(&self) -> &[Attempt] {
        &self.attempts
    }

    /// The error of having given up.
    pub fn exhausted(self) -> Error {
        Error::Exhausted {
            attempts: self.attempts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(name: &str, zone: &str, usd_per_hour: f64) -> Offer {
        let (provider, zone) = zone.split_once('/').expect("provider/zone");
        Offer {
            provider: provider.into(),
            instance_type: name.into(),
            region: zone[..zone.len() - 1].into(),
            zone: Some(zone.into()),
            cpus: 4.0,
            memory_gib: 16.0,
            disk_gib: None,
            accelerator: None,
            spot: false,
            usd_per_hour,
        }
    }

    fn failover(offers: &[Offer], retry_until_up: Option<Duration>) -> Failover {
        let plan = Plan {
            candidates: offers.to_vec(),
            ..Plan::default()
        };
        Failover::new(plan, FailoverPolicy { retry_until_up })
    }

    fn no_capacity() -> Error {
        Error::NoCapacity {
            instance_type: "g".into(),
            region: "east-1".into(),
        }
    }

    fn quota() -> Error {
        Error::Quota {
            provider: "aws",
            instance_type: "g".into(),
            region: "east-1".into(),
        }
    }

    fn unauthenticated() -> Error {
        Error::Unauthenticated {
            provider: "aws",
            source: "expired".into(),
        }
    }

    /// Fails every try with `fail`; says what was tried, as `type zone`.
    fn run(mut failover: Failover, fail: impl Fn(&Offer) -> Error) -> (Vec<String>, Failover) {
        let mut tried = Vec::new();
        while let Step::Try(offer) = failover.step() {
            tried.push(format!(
                "{} {}",
                offer.instance_type,
                offer.zone.as_deref().unwrap_or("-")
            ));
            failover.failed(&offer, fail(&offer)).expect("goes on");
        }
        (tried, failover)
    }

    fn world() -> Vec<Offer> {
        vec![
            offer("g", "aws/east-1a", 1.0),
            offer("g", "aws/east-1b", 1.0),
            offer("h", "aws/east-1a", 2.0),
            offer("g", "gcp/west-1a", 3.0),
        ]
    }

    #[test]
    fn capacity_blocks_a_type_in_a_zone() {
        let (tried, _) = run(failover(&world(), None), |_| no_capacity());
        assert_eq!(tried, ["g east-1a", "g east-1b", "h east-1a", "g west-1a"]);
    }

    #[test]
    fn quota_blocks_a_type_in_a_region() {
        let (tried, _) = run(failover(&world(), None), |_| quota());
        assert_eq!(tried, ["g east-1a", "h east-1a", "g west-1a"]);
    }

    #[test]
    fn credentials_block_a_cloud() {
        let (tried, _) = run(failover(&world(), None), |_| unauthenticated());
        assert_eq!(tried, ["g east-1a", "g west-1a"]);
    }

    #[test]
    fn a_rate_limit_waits_and_tries_the_same_again() {
        let mut failover = failover(&world(), None);
        let Step::Try(first) = failover.step() else {
            panic!("a candidate");
        };
        let pause = Duration::from_secs(12);
        let error = Error::RateLimited {
            provider: "aws",
            retry_after: pause,
        };
        failover.failed(&first, error).expect("goes on");
        assert_eq!(failover.step(), Step::Wait(pause));
        assert_eq!(failover.step(), Step::Try(first));
    }

    #[test]
    fn what_others_would_not_do_better_stops_at_once() {
        let mut failover = failover(&world(), None);
        let error = Error::OverBudget {
            total_usd_per_hour: 2.0,
            limit_usd_per_hour: 1.0,
        };
        let stopped = failover.failed(&world()[0], error).expect_err("stops");
        assert!(matches!(stopped, Error::OverBudget { .. }));
    }

    #[test]
    fn the_last_error_holds_the_whole_table() {
        let (_, failover) = run(failover(&world()[..2], None), |_| no_capacity());
        assert_eq!(
            failover.exhausted().to_string(),
            "no candidate could be launched:\n  \
             aws g in east-1a: no capacity for g in east-1 (no more aws g east-1a)\n  \
             aws g in east-1b: no capacity for g in east-1 (no more aws g east-1b)"
        );
    }

    #[test]
    fn retry_until_up_begins_again_where_waiting_can_help() {
        let gap = Duration::from_secs(60);
        let (tried, mut again) = run(failover(&world()[..1], Some(gap)), |_| no_capacity());
        assert_eq!(tried.len(), 1);
        // `run` has consumed the wait; the next step tries the same candidate again.
        assert_eq!(again.step(), Step::Try(world()[0].clone()));
        let (tried, mut never) = run(failover(&world()[..1], Some(gap)), |_| unauthenticated());
        assert_eq!((tried.len(), never.step()), (1, Step::GiveUp));
    }
}
