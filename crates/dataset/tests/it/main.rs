//! The stages and the reader from the outside, over real files and stores.

mod world;

mod date;
mod faults;
mod fixtures;
mod formats;
mod hub;
mod limits;
mod pipeline;
mod reading;
mod sources;
