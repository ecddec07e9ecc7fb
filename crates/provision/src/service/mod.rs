//! Tasks that serve HTTP: replicas, their probes, and one stable URL in front of them.

#[cfg(all(
    feature = "service",
    feature = "agent",
    any(feature = "local", feature = "ssh")
))]
mod controller;
mod fleet;
#[cfg(feature = "service")]
mod gateway;
mod probe;
#[cfg(feature = "service")]
mod ready;
#[cfg(all(
    feature = "service",
    feature = "agent",
    any(feature = "local", feature = "ssh")
))]
mod replica;
mod spec;

#[cfg(all(
    feature = "service",
    feature = "agent",
    any(feature = "local", feature = "ssh")
))]
pub use controller::{Controller, ServiceOrder, ServiceReport};
pub use fleet::{Fleet, FleetCommand, FleetEvent, Replica, ReplicaPhase};
#[cfg(feature = "service")]
pub use gateway::{Gateway, GatewayOptions};
pub use probe::{ProbeOutcome, ProbeState, ProbeVerdict};
#[cfg(feature = "service")]
pub use ready::wait_ready;
pub use spec::{LoadBalancing, ReadinessProbe, ServiceSpec};
