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

/// Two processes as torchrun starts them, sharing each step's two micro-batches: the losses of one process, and one result.
#[test]
fn two_processes_train_one_run() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let losses = |said: &[u8]| -> Vec<f64> {
        let lines = std::str::from_utf8(said).expect("text").lines();
        let lines = lines.filter_map(|line| line.split_once("'loss': ")?.1.split_once(','));
        lines
            .map(|(loss, _)| loss.parse().expect("a number"))
            .collect()
    };
    let of_two = |out: &str| {
        let mut command = finetune(dir.path(), out);
        command.args(["--gradient_accumulation_steps", "2"]);
        command
    };
    let alone = of_two("alone").output().expect("it starts");
    assert!(alone.status.success());

    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    let port = free.local_addr().expect("bound").port().to_string();
    drop(free);
    let worker = |rank: &str| {
        let mut command = of_two("together");
        command.env("RANK", rank).env("WORLD_SIZE", "2");
        command.env("LOCAL_RANK", rank).env("LOCAL_WORLD_SIZE", "2");
        command
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", &port);
        command
    };
    // Each command writes the questions anew, so both are made before one reads them.
    let commands = ["0", "1"].map(worker);
    let [first, second] = commands.map(|mut command| command.spawn().expect("it starts"));
    let ends = [first, second].map(|child| child.wait_with_output().expect("it ends"));
    let [first, second] = ends.map(|end| {
        assert!(end.status.success());
        end.stdout
    });
    let (together, alone) = (losses(&first), losses(&alone.stdout));
    assert_eq!((together.len(), alone.len()), (24, 24));
    for (together, alone) in together.iter().zip(&alone) {
        // Four places are printed.
        assert!((together - alone).abs() < 1.5e-4, "{together} {alone}");
    }
    let second = String::from_utf8_lossy(&second);
    assert!(
        second.contains("the first worker writes the result"),
        "{second}"
    );
    let [adapter, merged] = written(dir.path(), "together");
    let [other, other_merged] = written(dir.path(), "alone");
    assert_eq!(
        (adapter.len(), merged.len()),
        (other.len(), other_merged.len())
    );
}

/// One command starts both; each says its part, and the result is the first one's.
#[test]
fn two_workers_of_one_command_train_one_run() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let of_two = |out: &str| {
        let mut command = finetune(dir.path(), out);
        command.args(["--gradient_accumulation_steps", "2", "--max_steps", "6"]);
        command
    };
    let alone = of_two("alone").output().expect("it starts");
    let mut command = of_two("together");
    let together = command
        .args(["--workers", "2"])
        .output()
        .expect("it starts");
    assert!(alone.status.success() && together.status.success());
    let said = String::from_utf8_lossy(&together.stdout);
    for line in [
        "worker 0 of 2 meets",
        "worker 1 of 2 meets",
        "the first worker writes",
    ] {
        assert_eq!(said.matches(line).count(), 1, "{line}: {said}");
    }
    let last = |said: &[u8]| -> f64 {
        let said = String::from_utf8_lossy(said).into_owned();
        let mut losses = said.lines().filter_map(|line| line.split_once("'loss': "));
        let (_, rest) = losses.next_back().expect("losses");
        let (loss, _) = rest.split_once(',').expect("more figures");
        loss.parse().expect("a number")
    };
    let (together, alone) = (last(&together.stdout), last(&alone.stdout));
    assert!((together - alone).abs() < 1.5e-4, "{together} {alone}");
    let sizes = |out: &str| written(dir.path(), out).map(|file| file.len());
    assert_eq!(sizes("together"), sizes("alone"));
}

/// Which of a program's processes were started by it.
#[cfg(target_os = "linux")]
fn children(id: u32) -> Vec<String> {
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
    let children = children.expect("it runs");
    children.split_whitespace().map(str::to_owned).collect()
}

/// A worker that is killed ends the command, which names it, and the other worker with it; the same command goes on.
#[cfg(target_os = "linux")] // which tells a process's children
#[test]
fn when_a_worker_dies_the_command_says_so_and_ends() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let long = |command: &mut Command| {
        command.args(["--max_steps", "100000", "--workers", "2"]);
        command.args(["--gradient_accumulation_steps", "2"]);
        command.stderr(Stdio::piped());
    };
    let mut command = finetune(dir.path(), "out");
    long(&mut command);
    let mut child = command.spawn().expect("it starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let third = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(" 3/100000 ")));
    assert!(third.is_some(), "it trains");
    let workers = children(child.id());
    assert_eq!(workers.len(), 2);
    let kill = Command::new("kill").args(["-KILL", &workers[1]]).status();
    assert!(kill.expect("kill is there").success());
    lines.for_each(drop);
    let end = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&end.stderr);
    assert_eq!(end.status.code(), Some(1), "{said}");
    assert!(said.contains("worker 1 ended with signal: 9"), "{said}");
    let is_gone = |id: &String| !Path::new("/proc").join(id).exists();
    assert!(workers.iter().all(is_gone));

    // Stopped by SIGTERM, both end with a checkpoint.
    let mut command = finetune(dir.path(), "stopped");
    long(&mut command);
    let mut child = command.spawn().expect("it starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let third = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(" 3/100000 ")));
    assert!(third.is_some(), "it trains");
    let kill = Command::new("kill").arg(child.id().to_string()).status();
    assert!(kill.expect("kill is there").success());
    let lines: Vec<String> = lines.map_while(Result::ok).collect();
    let stopped = lines
        .iter()
        .filter(|line| line.contains("the same command goes on from there"));
    assert_eq!(stopped.count(), 2, "{lines:?}");
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
}

/// Nobody trains on when the command itself is killed: its output ends because all of its workers have.
#[cfg(target_os = "linux")] // which tells a process that its parent is gone
#[test]
fn when_the_command_is_killed_its_workers_write_a_checkpoint_and_end() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut command = finetune(dir.path(), "out");
    command.args(["--max_steps", "100000", "--workers", "2"]);
    command.args(["--gradient_accumulation_steps", "2"]);
    let mut child = command.spawn().expect("it starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let third = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(" 3/100000 ")));
    assert!(third.is_some(), "it trains");
    child.kill().expect("SIGKILL");
    let lines: Vec<String> = lines.map_while(Result::ok).collect();
    let stopped = lines
        .iter()
        .filter(|line| line.contains("the same command goes on from there"));
    assert_eq!(stopped.count(), 2, "{lines:?}");
    child.wait().expect("reaped");
}

/// Other data, and a base that is another model of the same shape: refused, and what is there stays.
#[test]
fn another_runs_checkpoint_is_refused_and_stays() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let run = |command: &mut Command| {
        let output = command.stderr(Stdio::piped()).output().expect("it starts");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    assert!(run(&mut finetune(dir.path(), "out")).0);
    let checkpoint = || {
        let folder = dir.path().join("out/checkpoints/00000024");
        std::fs::read(folder.join("adapter_model.safetensors")).expect("a checkpoint")
    };
    let before = checkpoint();

    // The same file name with one answer changed.
    let mut command = finetune(dir.path(), "out");
    let data = dir.path().join("questions.jsonl");
    let changed = std::fs::read_to_string(&data).expect("there");
    std::fs::write(&data, changed.replacen("comes 3.", "comes 4.", 1)).expect("written");
    let (ended, said) = run(&mut command);
    assert!(!ended && said.contains("the data differs"), "{said}");
    assert_eq!(checkpoint(), before);

    // A store is no folder, and none of its name is made.
    let mut command = finetune(dir.path(), "unused");
    command.current_dir(dir.path());
    let arguments = command.get_args().map(std::ffi::OsStr::to_owned);
    let to_store = arguments.map(|argument| {
        let is_out = Path::new(&argument).ends_with("unused");
        if is_out {
            "s3://bucket/out".into()
        } else {
            argument
        }
    });
    let to_store: Vec<_> = to_store.collect();
    let mut command = Command::new(example("finetune_lora"));
    command.args(to_store).current_dir(dir.path());
    let (ended, said) = run(&mut command);
    assert!(!ended && said.contains("is not a folder"), "{said}");
    assert!(!dir.path().join("s3:").exists());
}
