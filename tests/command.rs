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

#[test]
fn autostop_stays_when_a_cluster_is_launched_again() {
    let world = World::new();
    world.write("none.yaml", "resources: {cloud: local}\n");
    world.ok("launch -c c none.yaml -i 10 --down -y -d");
    world.ok("launch -c c none.yaml -y -d");
    assert!(world.ok("status").contains("10m (down)"));
    world.ok("launch -c d none.yaml --down -y -d");
    assert!(world.ok("status").contains("1m (down)"));
    // What a verb does not know may be meant to keep it from what it does.
    assert_eq!(world.run("down c --dryrun -y").status.code(), Some(2));
    assert!(world.ok("status").contains("10m (down)"));
    // Every name is tried.
    let output = world.run("down c nothing d -y -o json");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.matches("GONE").count(), 2, "{said}");
    assert_eq!(world.ok("status -o json").trim(), "[]");
}

const SERVICE: &str = r#"
resources: {cloud: local}
envs: {WORD:}
service:
  readiness_probe: {path: /, endpoint_probe_interval_seconds: 0.2}
  replicas: 1
run: |
  exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1",
    LocalPort => $ENV{PORT}, Listen => 5, ReuseAddr => 1) or die $!; $w = $ENV{WORD};
    while ($c = $s->accept) { while (<$c>) { last if /^\r?\n/ }
    print $c "HTTP/1.1 200 OK\r\ncontent-length: " . length($w) . "\r\nconnection: close\r\n\r\n$w"; close $c }'
"#;

/// What the service says, by its URL.
fn ask(url: &str) -> String {
    use std::io::{Read, Write};
    let address = url.trim().trim_start_matches("http://");
    let mut stream = std::net::TcpStream::connect(address).expect("the gateway listens");
    let request = format!("GET / HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("asked");
    let mut said = String::new();
    stream.read_to_string(&mut said).expect("answered");
    said.rsplit("\r\n\r\n")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// The process behind a service of this world.
fn process_of(world: &World, service: &str) -> String {
    let line = format!("serve\0run\0{service}\0");
    let home = format!("UPDRAFT_HOME={}", world.path().join("home").display());
    let mut processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let found = processes.find(|process| {
        let read = |name: &str| std::fs::read(process.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&read("cmdline")).ends_with(&line)
            && String::from_utf8_lossy(&read("environ")).contains(&home)
    });
    let found = found.expect("the service has a process");
    found.file_name().to_string_lossy().into_owned()
}

#[test]
fn a_service_survives_a_bad_version_and_its_own_process() {
    let world = World::new();
    world.write("svc.yaml", SERVICE);
    world.write("bad.yaml", "run: echo no service\n");
    let url = world.ok("serve up -n web svc.yaml --env WORD=one -y");
    assert_eq!(ask(&url), "one");
    assert_eq!(
        world.run("serve update web bad.yaml").status.code(),
        Some(1)
    );
    // Variables of an update are its own, and no file keeps them.
    world.ok("serve update web svc.yaml --env WORD=two");
    assert_eq!(ask(&url), "two");
    // A file that was right when it was asked for, and is not when it is read.
    let missing = world.run("serve update web svc.yaml");
    assert_eq!(missing.status.code(), Some(1));
    assert_eq!(ask(&url), "two");
    let kill = Command::new("kill")
        .args(["-9", &process_of(&world, "web")])
        .status();
    assert!(kill.expect("kill").success());
    let dead = || -> serde_json::Value {
        serde_json::from_str(&world.ok("serve status -o json")).expect("json")
    };
    while dead()[0]["alive"] == true {
        std::thread::yield_now();
    }
    assert_eq!(dead()[0]["name"], "web");
    assert_eq!(
        world
            .run("serve update web svc.yaml --env WORD=x")
            .status
            .code(),
        Some(1)
    );
    let again = world.ok("serve up -n web svc.yaml --env WORD=three -y");
    assert_eq!(again, url, "it is where it was");
    assert_eq!(ask(&url), "three");
    world.ok("serve down web -y");
    assert_eq!(
        world.ok("status -o json").trim(),
        "[]",
        "no replica is left"
    );
    assert!(!world.path().join("home/services/web.values-2").exists());
}
