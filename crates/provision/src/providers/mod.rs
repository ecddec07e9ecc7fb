//! One module per place that rents out instances; only it knows that place's wire format.

#[cfg(feature = "local")]
pub mod local;
#[cfg(feature = "ssh")]
pub mod ssh;
