//! Low-rank adapters: settings, parameters, PEFT's files, merging.

mod adapter;
mod combine;
mod config;
mod gradients;
pub mod merge;
mod pattern;
pub mod peft;
mod plan;
mod saved;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod there;

pub use adapter::Adapter;
pub use combine::{Combination, combine};
pub use config::{LoraConfig, TargetModules};
pub use gradients::Gradients;
pub(crate) use plan::{GroupAdapter, LayerAdapter, Views};
pub use plan::{Parameter, Role};
pub(crate) use saved::{Saved, SavedModules};
