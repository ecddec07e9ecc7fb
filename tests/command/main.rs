//! The `updraft` command, as its users call it.
#![cfg(feature = "cli")]

mod programs;
mod services;
mod stories;
mod terminal;

use std::path::Path;
use std::process::{Command, Output};

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let world = Self { dir };
        world.write("requirements.txt", "numpy\n");
        world.write("train.py", "print('trained')\n");
        world.write(".env", "WANDB_TOKEN=hunter2\n");
        world.write(
            "cluster.yaml",
            "resources:\n  cloud: local\nworkdir: .\nenvs: {WANDB_TOKEN:}\n\
             setup: |\n  cat requirements.txt > installed\n\
             run: |\n  ls train.py; cat installed; echo ${#WANDB_TOKEN}\n",
        );
        world.write("task.yaml", "run: echo queued\n");
        world.write("fails.yaml", "run: exit 7\n");
        world
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path().join(name), text).expect("write");
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// `updraft` with these words, in a home of its own.
    fn command(&self, line: &str) -> Command {
        let home = self.path().join("home");
        let mut command = Command::new(env!("CARGO_BIN_EXE_updraft"));
        command
            .args(line.split_whitespace())
            .current_dir(self.path())
            .env("UPDRAFT_HOME", &home)
            .env("HOME", &home);
        command
    }

    /// Runs it without a terminal.
    fn run(&self, line: &str) -> Output {
        let mut command = self.command(line);
        let output = command.stdin(std::process::Stdio::null()).output();
        output.expect("updraft")
    }

    /// Runs what must succeed; returns its standard output.
    fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}
