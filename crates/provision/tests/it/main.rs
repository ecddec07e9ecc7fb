//! What the crate promises, over its public interface.

#[cfg(all(feature = "agent", feature = "local"))]
mod agent;
mod cases;
