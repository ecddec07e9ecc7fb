//! The stages and the reader from the outside, over real files and stores.

mod world;

mod faults;
mod pipeline;
mod reading;
