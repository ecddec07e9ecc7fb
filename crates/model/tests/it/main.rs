//! The decoder against an oracle, against PEFT's own runs, and against itself.

mod combine;
mod golden;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu_borders;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu_serving;
mod gradients;
mod identities;
mod oracle;
mod saved;
mod serving;
mod world;
