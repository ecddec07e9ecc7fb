//! Bad input is one line that names the thing, and nothing half-written is taken for finished.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use crate::pipeline::{binary, dataset, train};

/// Runs a command that must fail with one line that has all of `expected`.
pub(crate) fn check(mut command: Command, expected: &[&str]) {
    let output = command.output().expect("the program starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
    let errors: Vec<_> = stderr
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    for part in expected {
        assert!(errors[0].contains(part), "no `{part}` in: {}", errors[0]);
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("temporary file");
}

#[test]
fn a_missing_dataset_is_named() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let missing = dir.path().join("missing.jsonl");
    check(
        train(&dir.path().join("store"), &missing),
        &["missing.jsonl"],
    );
}

#[test]
fn rows_that_are_all_malformed_name_the_first() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dir.path().join("broken.jsonl");
    write(&data, "{\"conversations\": [\nnot json\n");
    check(train(&dir.path().join("store"), &data), &["broken.jsonl"]);
}

#[test]
fn an_unknown_role_is_named() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dir.path().join("roles.jsonl");
    write(
        &data,
        r#"{"conversations":[{"from":"martian","value":"hi"},{"from":"gpt","value":"ho"}]}"#,
    );
    check(train(&dir.path().join("store"), &data), &["martian"]);
}

#[test]
fn a_model_without_a_tokenizer_is_named() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let model = dir.path().join("toothless");
    std::fs::create_dir(&model).expect("folder");
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny.join(name), model.join(name)).expect("copy");
    }
    let mut command = train(&dir.path().join("store"), &data);
    command.arg("--model").arg(&model);
    check(command, &["toothless", "tokenizer.json"]);
}

#[test]
fn a_template_that_drops_messages_stops_the_run() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let model = dir.path().join("forgetful");
    std::fs::create_dir(&model).expect("folder");
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny");
    for entry in std::fs::read_dir(tiny).expect("folder") {
        let entry = entry.expect("entry");
        if entry.path().is_file() {
            std::fs::copy(entry.path(), model.join(entry.file_name())).expect("copy");
        }
    }
    write(
        &model.join("chat_template.jinja"),
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    );
    let mut command = train(&dir.path().join("store"), &data);
    command.arg("--model").arg(&model);
    check(command, &["user"]);
}

#[test]
fn an_unreachable_store_is_named() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let mut command = train(Path::new("s3://bucket/prefix"), &data);
    // Port 9 of this machine: nobody listens, so the connection is refused at once.
    command
        .env("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        .env("AWS_REGION", "us-east-1");
    command
        .env("AWS_ACCESS_KEY_ID", "key")
        .env("AWS_SECRET_ACCESS_KEY", "very-secret");
    check(command, &["s3://bucket/prefix"]);
}

#[test]
fn a_store_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let file = dir.path().join("a-file");
    write(&file, "");
    check(train(&file.join("store"), &data), &["a-file"]);
}

/// A limit on the size of files stands in for a full disk: the kernel refuses the write in the
/// middle of a file, and needs no mount for it.
#[test]
fn a_full_disk_is_named_and_costs_nothing() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let (data, store) = (dataset(dir.path()), dir.path().join("store"));
    let worker = train(&store, &data);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 1000; exec \"$@\"", "sh"])
        .arg(worker.get_program())
        .args(worker.get_args());
    check(limited, &["model.safetensors", "run again"]);
    assert!(
        !store.join("models/tiny/current.json").exists(),
        "half a model was taken for a whole one"
    );
    crate::pipeline::finish(worker);
}

#[test]
fn a_port_in_use_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port().to_string();
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let store = dir.path().join("store");
    crate::pipeline::finish(train(&store, &data));
    let mut command = Command::new(binary());
    command
        .arg("serve")
        .arg("--store")
        .arg(&store)
        .arg("--dataset")
        .arg(&data)
        .args(["--port", &port]);
    check(command, &["port", &port]);
}

#[test]
fn a_date_that_is_none_is_named() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = dataset(dir.path());
    let mut command = train(&dir.path().join("store"), &data);
    command.args(["--date", "tomorrow"]);
    check(command, &["tomorrow", "2026-"]);
}

#[test]
fn an_unknown_flag_points_to_the_help() {
    let mut command = Command::new(binary());
    command.arg("--mode");
    check(command, &["--mode", "--help"]);
}
