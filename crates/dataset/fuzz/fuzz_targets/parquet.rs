//! `cargo +nightly fuzz run parquet` in `crates/dataset`: any bytes as a .parquet file.

#![no_main]

mod read;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| read::read("a.parquet", bytes));
