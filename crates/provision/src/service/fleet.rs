//! Which replicas to launch, to drain and to end: a pure state machine.

use serde::{Deserialize, Serialize};

use super::ProbeVerdict;

/// How often in a row replicas of one version may fail before none is launched any more.
const GIVE_UP: u32 = 3;

/// Where a replica is on its way; SkyPilot's words where it has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ReplicaPhase {
    /// Its machine is being launched.
    Provisioning,
    /// Its commands run; it has not been ready yet.
    Starting,
    /// It answers its probe and gets requests.
    Ready,
    /// It does not answer now, and gets none.
    NotReady,
    /// It gets no new requests; those under way are finished.
    Draining,
    /// It is being ended.
    ShuttingDown,
}

/// One replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// Its number; never given again.
    pub id: u32,
    /// The version of the service it runs.
    pub version: u32,
    /// Where it is.
    pub phase: ReplicaPhase,
}

/// What happened to a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FleetEvent {
    /// Its commands run.
    Started(u32),
    /// Its probe was judged.
    Probed(u32, ProbeVerdict),
    /// It could not be launched, or its commands or its machine ended.
    Lost(u32, String),
    /// Its provider took its machine back, which is no failure of the version.
    Preempted(u32),
    /// There was no machine for it. While one of another version has one, it may be given up soon.
    NoRoom(u32, String),
    /// No request is under way any more.
    Drained(u32),
    /// It is gone.
    Ended(u32),
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FleetCommand {
    /// Launch a replica of that number and version.
    Launch(u32, u32),
    /// Give it no more requests; say when none is under way.
    Drain(u32),
    /// End it and its machine.
    End(u32),
}

/// The replicas of a service.
#[derive(Debug, Clone)]
pub struct Fleet {
    wanted: u32,
    version: u32,
    next: u32,
    replicas: Vec<Replica>,
    /// How often in a row a replica of this version failed before it was ready.
    failures: u32,
    last_failure: Option<String>,
}

impl Fleet {
    /// A service of so many replicas.
    pub fn new(wanted: u32, version: u32) -> Self {
        Self {
            wanted,
            version,
            next: 1,
            replicas: Vec::new(),
            failures: 0,
            last_failure: None,
        }
    }

    /// Takes over replicas that nobody leads to any more, to end them; no number of theirs is given
    /// again.
    pub fn inherit(&mut self, ids: impl IntoIterator<Item = u32>) {
        for id in ids {
            self.next = self.next.max(id.saturating_add(1));
            self.replicas.push(Replica {
                id,
                version: 0,
                phase: ReplicaPhase::ShuttingDown,
            });
        }
    }

    /// Asks for another version, or another number of replicas. Those of the old version serve until
    /// as many of the new one are ready.
    pub fn update(&mut self, wanted: u32, version: u32) {
        self.wanted = wanted;
        if version != self.version {
            self.version = version;
            self.failures = 0;
            self.last_failure = None;
        }
    }

    /// The replicas there are.
    pub fn replicas(&self) -> &[Replica] {
        &self.replicas
    }

    /// Why no more replicas of this version are launched, once too many have failed.
    pub fn failure(&self) -> Option<&str> {
        let gave_up = self.failures >= GIVE_UP;
        self.last_failure.as_deref().filter(|_| gave_up)
    }

    /// Takes in what happened.
    pub fn apply(&mut self, event: FleetEvent) {
        let id = match &event {
            FleetEvent::Started(id)
            | FleetEvent::Probed(id, _)
            | FleetEvent::Lost(id, _)
            | FleetEvent::Preempted(id)
            | FleetEvent::NoRoom(id, _)
            | FleetEvent::Drained(id)
            | FleetEvent::Ended(id) => *id,
        };
        let Some(index) = self.replicas.iter().position(|replica| replica.id == id) else {
            return; // ended in the meantime
        };
        let phase = self.replicas[index].phase.clone();
        let is_serving = matches!(
            phase,
            ReplicaPhase::Starting | ReplicaPhase::Ready | ReplicaPhase::NotReady
        );
        let next = match event {
            FleetEvent::Started(_) if phase == ReplicaPhase::Provisioning => ReplicaPhase::Starting,
            FleetEvent::Probed(_, ProbeVerdict::Ready) if is_serving => {
                self.failures = 0;
                ReplicaPhase::Ready
            }
            FleetEvent::Probed(_, ProbeVerdict::NotReady) if is_serving => ReplicaPhase::NotReady,
            FleetEvent::Probed(_, ProbeVerdict::Failed(reason)) if is_serving => {
                self.failed(index, reason)
            }
            FleetEvent::Lost(_, reason) if phase != ReplicaPhase::ShuttingDown => {
                self.failed(index, reason)
            }
            FleetEvent::Preempted(_) => ReplicaPhase::ShuttingDown,
            FleetEvent::NoRoom(_, reason) => match self.is_rolling() {
                true => ReplicaPhase::ShuttingDown,
                false => self.failed(index, reason),
            },
            FleetEvent::Drained(_) if phase == ReplicaPhase::Draining => ReplicaPhase::ShuttingDown,
            FleetEvent::Ended(_) => {
                self.replicas.remove(index);
                return;
            }
            _ => return,
        };
        self.replicas[index].phase = next;
    }

    /// Whether replicas of another version still have machines.
    fn is_rolling(&self) -> bool {
        let mut replicas = self.replicas.iter();
        replicas.any(|replica| replica.version != self.version)
    }

    fn failed(&mut self, index: usize, reason: String) -> ReplicaPhase {
        if self.replicas[index].version == self.version {
            self.failures += 1;
            self.last_failure = Some(reason);
        }
        ReplicaPhase::ShuttingDown
    }

    /// What to do now. Launches and drains are told once; an end is told until it has happened.
    pub fn step(&mut self) -> Vec<FleetCommand> {
        let mut commands = Vec::new();
        let wanted = self.wanted as usize;
        let is_on = |replica: &Replica| {
            !matches!(
                replica.phase,
                ReplicaPhase::Draining | ReplicaPhase::ShuttingDown
            )
        };
        let version = self.version;
        let current = |replica: &&Replica| replica.version == version && is_on(replica);
        let missing = wanted.saturating_sub(self.replicas.iter().filter(current).count());
        for _ in 0..missing {
            if self.failures >= GIVE_UP {
                break;
            }
            let id = self.next;
            self.next += 1;
            self.replicas.push(Replica {
                id,
                version,
                phase: ReplicaPhase::Provisioning,
            });
            commands.push(FleetCommand::Launch(id, version));
        }
        // One at a time, oldest version first: as long as what is left is enough and ready.
        let is_ready = |replica: &Replica| replica.phase == ReplicaPhase::Ready;
        let mut ready = self
            .replicas
            .iter()
            .filter(|replica| is_ready(replica))
            .count();
        let mut on = self.replicas.iter().filter(current).count();
        for replica in &mut self.replicas {
            let surplus = match replica.version == version {
                true => on > wanted,
                false => true,
            };
            if !is_on(replica) || !surplus {
                continue;
            }
            let spared = if is_ready(replica) {
                ready > wanted
            } else {
                ready >= wanted
            };
            if spared {
                ready -= usize::from(is_ready(replica));
                on -= usize::from(replica.version == version);
                replica.phase = ReplicaPhase::Draining;
                commands.push(FleetCommand::Drain(replica.id));
            }
        }
        let ending = self
            .replicas
            .iter()
            .filter(|replica| replica.phase == ReplicaPhase::ShuttingDown);
        commands.extend(ending.map(|replica| FleetCommand::End(replica.id)));
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use FleetCommand::{Drain, End, Launch};
    use FleetEvent::{Drained, Ended, Lost, Probed, Started};

    fn ready(fleet: &mut Fleet, id: u32) {
        fleet.apply(Started(id));
        fleet.apply(Probed(id, ProbeVerdict::Ready));
    }

    #[test]
    fn as_many_as_wanted_are_launched_once() {
        let mut fleet = Fleet::new(2, 1);
        assert_eq!(fleet.step(), [Launch(1, 1), Launch(2, 1)]);
        assert_eq!(fleet.step(), []);
    }

    #[test]
    fn a_lost_replica_is_replaced_and_ended() {
        let mut fleet = Fleet::new(1, 1);
        fleet.step();
        ready(&mut fleet, 1);
        fleet.apply(Lost(1, "killed".into()));
        assert_eq!(fleet.step(), [Launch(2, 1), End(1)]);
        fleet.apply(Ended(1));
        assert_eq!(fleet.step(), []);
    }

    #[test]
    fn a_rolling_update_never_goes_below_what_is_wanted() {
        let mut fleet = Fleet::new(2, 1);
        fleet.step();
        ready(&mut fleet, 1);
        ready(&mut fleet, 2);
        fleet.update(2, 2);
        assert_eq!(fleet.step(), [Launch(3, 2), Launch(4, 2)]);
        assert_eq!(fleet.step(), [], "the old ones serve");
        ready(&mut fleet, 3);
        assert_eq!(fleet.step(), [Drain(1)]);
        assert_eq!(fleet.step(), [], "one ready of each is two");
        ready(&mut fleet, 4);
        assert_eq!(fleet.step(), [Drain(2)]);
        fleet.apply(Drained(1));
        assert_eq!(fleet.step(), [End(1)]);
        fleet.apply(Ended(1));
        fleet.apply(Drained(2));
        fleet.apply(Ended(2));
        assert_eq!(fleet.step(), []);
        assert!(fleet.replicas().iter().all(|replica| replica.version == 2));
    }

    #[test]
    fn a_version_that_never_becomes_ready_is_given_up_and_the_old_one_serves() {
        let mut fleet = Fleet::new(1, 1);
        fleet.step();
        ready(&mut fleet, 1);
        fleet.update(1, 2);
        let mut launched = 0;
        for _ in 0..10 {
            for command in fleet.step() {
                if let Launch(id, 2) = command {
                    launched += 1;
                    fleet.apply(Started(id));
                    fleet.apply(Probed(id, ProbeVerdict::Failed("no model".into())));
                    fleet.apply(Ended(id));
                }
            }
        }
        assert_eq!(launched, 3);
        assert_eq!(fleet.failure(), Some("no model"));
        assert_eq!(fleet.replicas()[0].phase, ReplicaPhase::Ready);
    }

    #[test]
    fn machines_taken_back_are_replaced_without_counting() {
        let mut fleet = Fleet::new(1, 1);
        for id in 1..=10 {
            assert!(fleet.step().contains(&Launch(id, 1)), "{id}");
            fleet.apply(FleetEvent::Preempted(id));
            fleet.apply(Ended(id));
        }
        assert_eq!(fleet.failure(), None);
    }

    #[test]
    fn a_rolling_update_goes_on_with_one_machine_to_spare() {
        let mut fleet = Fleet::new(2, 1);
        fleet.step();
        ready(&mut fleet, 1);
        ready(&mut fleet, 2);
        fleet.update(2, 2);
        assert_eq!(fleet.step(), [Launch(3, 2), Launch(4, 2)]);
        for _ in 0..5 {
            let id = fleet.next - 1;
            fleet.apply(FleetEvent::NoRoom(id, "all are taken".into()));
            assert_eq!(fleet.step(), [Launch(id + 1, 2), End(id)]);
            fleet.apply(Ended(id));
        }
        ready(&mut fleet, 3);
        assert_eq!(fleet.step(), [Drain(1)], "its machine is the next one's");
        fleet.apply(Drained(1));
        fleet.apply(Ended(1));
        let last = fleet.next - 1;
        ready(&mut fleet, last);
        assert_eq!(fleet.step(), [Drain(2)]);
        fleet.apply(Drained(2));
        fleet.apply(Ended(2));
        assert_eq!((fleet.failure(), fleet.replicas().len()), (None, 2));
    }

    #[test]
    fn a_service_without_machines_is_given_up() {
        let mut fleet = Fleet::new(1, 1);
        for id in 1..=3 {
            assert!(fleet.step().contains(&Launch(id, 1)), "{id}");
            fleet.apply(FleetEvent::NoRoom(id, "all are taken".into()));
            fleet.apply(Ended(id));
        }
        assert_eq!(fleet.failure(), Some("all are taken"));
    }

    #[test]
    fn inherited_replicas_are_ended_and_make_room() {
        let mut fleet = Fleet::new(1, 2);
        fleet.inherit([3, 1]);
        assert_eq!(fleet.step(), [Launch(4, 2), End(3), End(1)]);
        // They have the machines for now, which is no failure of the version.
        fleet.apply(FleetEvent::NoRoom(4, "all are taken".into()));
        fleet.apply(Ended(3));
        assert_eq!(fleet.step(), [Launch(5, 2), End(1), End(4)]);
        assert_eq!(fleet.failure(), None);
    }

    #[test]
    fn none_wanted_drains_all() {
        let mut fleet = Fleet::new(2, 1);
        fleet.step();
        ready(&mut fleet, 1);
        fleet.update(0, 1);
        assert_eq!(fleet.step(), [Drain(1), Drain(2)]);
    }
}
