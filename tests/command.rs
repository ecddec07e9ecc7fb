//! The articles' commands, as written, with `updraft` in place of `sky`, on this machine.
#![cfg(feature = "cli")]

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

    /// Runs `updraft` with these words; no terminal, a home of its own.
    fn run(&self, line: &str) -> Output {
        let home = self.path().join("home");
        Command::new(env!("CARGO_BIN_EXE_updraft"))
            .args(line.split_whitespace())
            .current_dir(self.path())
            .env("UPDRAFT_HOME", &home)
            .env("HOME", &home)
            .stdin(std::process::Stdio::null())
            .output()
            .expect("updraft")
    }

    /// Runs what must succeed; returns its standard output.
    fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

#[test]
fn the_articles_commands_work_as_written() {
    let world = World::new();
    let said = world.ok("launch -c mycluster cluster.yaml --env-file .env -y");
    assert_eq!(said, "train.py\nnumpy\n7\n");
    world.ok("exec mycluster task.yaml -d");
    assert_eq!(world.ok("logs mycluster"), "queued\n");
    assert!(world.ok("queue mycluster").contains("SUCCEEDED"));
    let status: serde_json::Value =
        serde_json::from_str(&world.ok("status -o json")).expect("json");
    assert_eq!(status[0]["name"], "mycluster");
    assert_eq!(status[0]["status"], "UP");
    world.ok("autostop mycluster -i 10 --down");
    assert!(world.ok("status").contains("10m (down)"));
    assert_eq!(
        world.run("exec mycluster fails.yaml").status.code(),
        Some(100)
    );
    world.ok("stop mycluster");
    world.ok("start mycluster");
    world.ok("down mycluster -y");
    assert_eq!(world.ok("status -o json").trim(), "[]");
    let costs: serde_json::Value =
        serde_json::from_str(&world.ok("cost-report -o json")).expect("json");
    assert_eq!(costs[0]["running"], false);
    assert_eq!(world.ok("gc -o json").trim(), "[]");
}

#[test]
fn what_goes_wrong_is_said_and_has_a_code() {
    let world = World::new();
    assert_eq!(world.run("fly").status.code(), Some(2));
    assert_eq!(world.run("down nothing").status.code(), Some(1));
    let output = world.run("launch -c c cluster.yaml -y");
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains("environment variable `WANDB_TOKEN` has no value"),
        "{errors}"
    );
    world.write(
        "gpu.yaml",
        "resources: {accelerators: A10g:1}\nrun: 'true'\n",
    );
    let plan = world.ok("launch --dryrun gpu.yaml");
    assert!(plan.contains("g5.xlarge"), "{plan}");
    let output = world.run("launch -c c gpu.yaml -y");
    assert_eq!(output.status.code(), Some(1), "this machine has no A10G");
}
