//! The examples as their users meet them: a program, a store, and whatever may happen to both.

mod bad_input;
mod finetune;
mod hub;
mod imports;
mod kill;
mod pipeline;
mod serve;

/// The example's own data, with its tests.
#[path = "../../examples/pipeline/letters.rs"]
#[allow(dead_code, unreachable_pub, reason = "what the example uses")]
mod letters;
