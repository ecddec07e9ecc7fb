//! What the crate promises, over its public interface.

#[cfg(all(feature = "agent", feature = "local"))]
mod agent;
mod cases;
#[cfg(all(feature = "agent", feature = "local"))]
mod clusters;
#[cfg(all(feature = "agent", feature = "local", feature = "service"))]
mod services;
#[cfg(all(feature = "ssh", feature = "conformance"))]
mod ssh;
#[cfg(feature = "ssh")]
mod sshd;
