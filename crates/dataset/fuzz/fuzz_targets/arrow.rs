//! `cargo +nightly fuzz run arrow` in `crates/dataset`: any bytes as a .arrow file.

#![no_main]

mod read;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| read::read("a.arrow", bytes));
