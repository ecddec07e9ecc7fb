//! What Updraft says of task files, one line each: `cargo run --example task_verdict -- FILE...`
//!
//! `accept`, `unsupported: …` for a good file with a field that Updraft does not act on, or
//! `refuse: …` with the error as a person sees it.

use std::io::Write;

use updraft_provision::{EnvOverrides, Error, Pipeline};

fn verdict(text: &str) -> String {
    match Pipeline::from_yaml(text, &EnvOverrides::new()) {
        Ok(_) => "accept".to_owned(),
        Err(error @ (Error::Unsupported { .. } | Error::MissingSecret { .. })) => {
            format!("unsupported: {error}")
        }
        Err(error) => format!("refuse: {error}"),
    }
}

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for path in std::env::args().skip(1) {
        let text = std::fs::read_to_string(&path)?;
        writeln!(out, "{path}\t{}", verdict(&text).replace('\n', " "))?;
    }
    Ok(())
}
