//! Low-rank adapters: settings, parameters, PEFT's files, merging.

mod adapter;
mod combine;
mod config;
mod gradients;
pub mod merge;
mod pattern;
pub mod peft;

pub use adapter::{Adapter, Parameter};
pub(crate) use adapter::{GroupAdapter, LayerAdapter};
pub use combine::{Combination, combine};
pub use config::{LoraConfig, TargetModules};
pub use gradients::Gradients;
