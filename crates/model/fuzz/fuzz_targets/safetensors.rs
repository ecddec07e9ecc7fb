//! `cargo +nightly fuzz run safetensors` in `crates/model`: any bytes as a weight file.

#![no_main]

use updraft_model::{SINGLE_FILE, Weights};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let files = vec![(SINGLE_FILE.to_owned(), bytes.to_vec().into())];
    let Ok(weights) = Weights::from_files(files) else {
        return;
    };
    // What was accepted must be readable.
    for name in weights.names().map(str::to_owned).collect::<Vec<_>>() {
        weights.bytes(&name).expect("a tensor within the file");
        let _ = weights.tensor(&name);
    }
});
