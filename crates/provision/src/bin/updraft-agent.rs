//! The node's agent as a program of its own; `updraft agent` is the same.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match updraft_provision::agent::command(&args, &mut std::io::stdout(), &mut std::io::stderr()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "error: {error}"); // nobody may be there to read it
            ExitCode::FAILURE
        }
    }
}
