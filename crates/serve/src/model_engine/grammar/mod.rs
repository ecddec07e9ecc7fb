//! Which tokens may come next in an answer of a given form.

#[cfg(not(feature = "constrained"))]
mod absent;
#[cfg(feature = "constrained")]
mod guided;

#[cfg(not(feature = "constrained"))]
pub(super) use absent::{Grammar, Grammars};
#[cfg(feature = "constrained")]
pub(super) use guided::{Grammar, Grammars};
