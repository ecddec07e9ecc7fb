//! `serve` and the process behind a service.

use std::process::Command;

use crate::World;

pub(crate) const SERVICE: &str = r#"
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

/// Whoever removes the folder of the state has no other way to end the service's process.
#[test]
fn a_service_goes_with_its_folder() {
    let world = World::new();
    world.write("svc.yaml", SERVICE);
    world.ok("serve up -n web svc.yaml --env WORD=one -y");
    let process = format!("/proc/{}/cmdline", process_of(&world, "web"));
    // Whatever still writes there may be in the way.
    while std::fs::remove_dir_all(world.path().join("home")).is_err() {
        std::thread::yield_now();
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let runs = || std::fs::read(&process).is_ok_and(|words| !words.is_empty());
    while runs() {
        assert!(std::time::Instant::now() < deadline, "it goes on");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
