//! What every store, and every stage, is held to; for tests.
//!
//! [`store`] holds one function per promise of a [`Store`](crate::Store) and
//! [`conformance_tests!`](crate::conformance_tests) makes a test of each;
//! [`survives_every_fault`] runs a whole stage against every fault at every store call.

#[cfg(feature = "s3")]
pub mod s3;
mod stage;
pub mod store;

pub use stage::survives_every_fault;
