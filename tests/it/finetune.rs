//! The recipe to fork as a program: stopped by a signal, it goes on to the bit.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::pipeline::example;

/// Forty small questions; 24 steps.
fn finetune(dir: &Path, out: &str) -> Command {
    let data = dir.join("questions.jsonl");
    let line = |i: u32| {
        let letter = char::from(b'a' + (i * 7 % 26) as u8);
        format!(
            r#"{{"question": "What follows {letter}?", "answer": "After {letter} comes {i}."}}"#
        )
    };
    let lines: Vec<String> = (0..40).map(line).collect();
    std::fs::write(&data, lines.join("\n")).expect("temporary file");
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny");
    let mut command = Command::new(example("finetune_lora"));
    command.arg("--base").arg(tiny).arg("--data").arg(data);
    command.arg("--out").arg(dir.join(out));
    let settings = "--max_steps 24 --save_steps 100 --per_device_train_batch_size 4 --threads 1 \
                    --logging_steps 1 --learning_rate 1e-3 --r 4 --report_to jsonl";
    command.args(settings.split_whitespace());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn written(dir: &Path, out: &str) -> [Vec<u8>; 2] {
    let read = |file: &str| std::fs::read(dir.join(out).join(file)).expect(file);
    [
        read("lora_model/adapter_model.safetensors"),
        read("fused/model.safetensors"),
    ]
}

#[test]
fn stopped_by_sigterm_it_says_so_and_the_same_command_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let calm = finetune(dir.path(), "calm").status().expect("it starts");
    assert!(calm.success());

    let mut child = finetune(dir.path(), "stopped").spawn().expect("it starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let third = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(" 3/24 ")));
    assert!(third.is_some(), "it trains");
    let kill = Command::new("kill").arg(child.id().to_string()).status();
    assert!(kill.expect("kill is there").success());
    let last = lines
        .map_while(Result::ok)
        .last()
        .expect("it says something");
    assert!(
        last.contains("the same command goes on from there"),
        "{last}"
    );
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
    assert!(!dir.path().join("stopped/fused").exists());

    let mut child = finetune(dir.path(), "stopped").spawn().expect("it starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let lines: Vec<String> = lines.map_while(Result::ok).collect();
    assert!(child.wait().expect("it ends").success());
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("continuing after step")),
        "{lines:?}"
    );
    assert!(
        !lines.iter().any(|line| line.contains(" 3/24 ")),
        "it did not begin anew"
    );
    assert_eq!(written(dir.path(), "stopped"), written(dir.path(), "calm"));
}
