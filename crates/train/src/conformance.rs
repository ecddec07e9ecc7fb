//! The promises of this crate's traits, one function each.
//!
//! [`collective_tests!`](crate::collective_tests), [`example_source_tests!`](crate::example_source_tests) and
//! [`optimizer_tests!`](crate::optimizer_tests) turn them into named tests, so
//! that a failure names the broken promise.

pub mod collective;
pub mod example_source;
pub mod optimizer;
