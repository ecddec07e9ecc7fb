//! Tasks that serve HTTP: their spec, and waiting until they answer.

mod probe;
#[cfg(feature = "service")]
mod ready;
mod spec;

pub use probe::{ProbeOutcome, ProbeState, ProbeVerdict};
#[cfg(feature = "service")]
pub use ready::wait_ready;
pub use spec::{LoadBalancing, ReadinessProbe, ServiceSpec};
