//! Running the example's worker and reading what it says.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// The pipeline's binary.
pub(crate) fn binary() -> PathBuf {
    example("pipeline")
}

/// An example's binary, which `cargo test` builds beside this one.
pub(crate) fn example(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("a test has a path");
    let profile = this
        .parent()
        .and_then(Path::parent)
        .expect("target/<profile>/deps/<test>");
    let binary = profile.join("examples").join(name);
    assert!(
        binary.exists(),
        "build it first: cargo build --example {name}"
    );
    binary
}

/// `pipeline train` on small data: eight steps, a checkpoint every three.
pub(crate) fn train(store: &Path, dataset: &Path) -> Command {
    let mut command = Command::new(binary());
    command
        .arg("train")
        .arg("--store")
        .arg(store)
        .arg("--dataset")
        .arg(dataset);
    command.args(["--model", "tiny", "--max-steps", "8", "--save-steps", "3"]);
    command.env("UPDRAFT_EVENTS", "json").stdin(Stdio::null());
    command
}

/// Forty conversations about one letter each, two of them broken.
pub(crate) fn dataset(dir: &Path) -> PathBuf {
    let mut lines: Vec<String> = (0..40)
        .map(|i| {
            let word: String = (0..3 + i % 5).map(|k| char::from(b'a' + ((i * 7 + k * 3) % 26) as u8)).collect();
            format!(
                r#"{{"conversations":[{{"from":"human","value":"Spell '{word}'."}},{{"from":"gpt","value":"{word} it is."}}]}}"#
            )
        })
        .collect();
    lines[7] = "{\"conversations\": [".to_owned();
    lines[19] = lines[19].replace("human", "martian");
    let path = dir.join("words.jsonl");
    std::fs::write(&path, lines.join("\n")).expect("temporary file");
    path
}

/// Runs to the end and insists on success.
pub(crate) fn finish(mut command: Command) -> Vec<Value> {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("the worker starts");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8_lossy(&stdout)
        .lines()
        .filter_map(event)
        .collect()
}

/// Runs until an event satisfies `now`, then kills it as a power cut would.
///
/// Returns false if the program ended before.
pub(crate) fn kill_when(mut command: Command, now: impl Fn(&Value) -> bool) -> bool {
    let mut child: Child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the worker starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let reached = lines
        .map_while(Result::ok)
        .filter_map(|line| event(&line))
        .any(|event| now(&event));
    child.kill().expect("SIGKILL");
    child.wait().expect("reaped");
    reached
}

/// Runs until an event satisfies `now`, then asks it to stop, and waits for that. Returns the exit code, and whether there
/// was such an event.
pub(crate) fn stop_when(mut command: Command, now: impl Fn(&Value) -> bool) -> (Option<i32>, bool) {
    let mut child: Child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the worker starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped"))
        .lines()
        .map_while(Result::ok);
    let reached = lines.any(|line| event(&line).is_some_and(|event| now(&event)));
    let kill = Command::new("kill").arg(child.id().to_string()).status();
    assert!(kill.expect("kill is there").success());
    lines.for_each(drop);
    (child.wait().expect("it ends").code(), reached)
}

fn event(line: &str) -> Option<Value> {
    serde_json::from_str(line.strip_prefix("@updraft ")?).ok()
}
