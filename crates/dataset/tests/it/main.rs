//! The stages and the reader from the outside, over real files and stores.

mod files;
mod world;

mod columns;
mod concurrent;
mod configs;
mod date;
mod faults;
mod fixtures;
mod formats;
mod hostile;
mod hub;
mod limits;
mod memory;
mod pipeline;
mod raw;
mod reading;
mod sources;
mod train_flags;
mod turns;
