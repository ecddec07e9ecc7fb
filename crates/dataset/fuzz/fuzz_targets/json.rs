//! `cargo +nightly fuzz run json` in `crates/dataset`: any bytes as a .json file.

#![no_main]

mod read;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| read::read("a.json", bytes));
