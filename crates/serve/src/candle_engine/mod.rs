//! Architectures that the decoder does not cover, through candle-transformers.

mod architecture;
mod config;
mod engine;
mod load;
mod worker;

pub use architecture::CANDLE_ARCHITECTURES;
pub use engine::CandleEngine;
