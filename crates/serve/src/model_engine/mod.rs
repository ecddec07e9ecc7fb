//! The engine behind a real server: one decoder and its adapters on a thread of their own.

mod engine;
mod registry;
mod served;

mod grammar;
mod guard;
mod options;
mod pace;
mod sequence;
mod status;
mod worker;

mod load;
mod source;

pub use engine::ModelEngine;
pub use load::AdapterSource;
pub use options::EngineOptions;
pub use served::{ServedAdapter, ServedModel};
pub use source::ModelSource;

#[cfg(test)]
mod tests;
