//! The pipeline example as its users meet it: a program, a store, and whatever may happen to both.

mod bad_input;
mod kill;
mod pipeline;
