//! What the whole crate promises: parity with PEFT, identities of the loss,
//! resuming to the bit, the stage.

#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test that skips says why"
)]

mod evaluation;
mod export;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu_optimizer;
#[cfg(feature = "cuda-emulator")]
mod gpu_workers;
mod identities;
mod peft;
mod refusals;
mod resume;
mod stage;
mod workers;
mod world;
