//! What the whole crate promises: parity with PEFT, identities of the loss,
//! resuming to the bit, the stage.

mod identities;
mod peft;
mod refusals;
mod resume;
mod stage;
mod world;
