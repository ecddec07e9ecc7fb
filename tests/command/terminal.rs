//! Questions: asked on a terminal alone, and never after `-y`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::Stdio;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::World;
use crate::services::SERVICE;

/// What was seen on the terminal, and the code the command ended with.
struct Seen {
    screen: String,
    code: Option<i32>,
}

impl Seen {
    fn asked(&self) -> bool {
        self.screen.contains("[Y/n]")
    }
}

/// Runs the command with a terminal for its input and errors; whoever is asked types `answer`.
fn on_terminal(world: &World, line: &str, answer: &str) -> Seen {
    let (mut person, program) = terminal();
    let mut command = world.command(line);
    command
        .stdin(program.try_clone().expect("terminal"))
        .stdout(Stdio::null())
        .stderr(program);
    let mut child = command.spawn().expect("updraft");
    drop(command); // and with it our ends of the terminal
    let (mut screen, mut answered, mut buffer) = (String::new(), false, [0; 4096]);
    // Reading fails when nobody is at the other end any more.
    while let Ok(read) = person.read(&mut buffer) {
        if read == 0 {
            break;
        }
        screen.push_str(&String::from_utf8_lossy(&buffer[..read]));
        if screen.contains("[Y/n] ") && !answered {
            answered = true;
            writeln!(person, "{answer}").expect("typed");
        }
    }
    let code = child.wait().expect("ended").code();
    Seen { screen, code }
}

/// A person's end of a terminal, and a program's.
fn terminal() -> (File, File) {
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(person.as_fd()).expect("granted");
    unlockpt(person.as_fd()).expect("unlocked");
    let name = ptsname(person.as_fd(), Vec::new()).expect("a name");
    let name = name.into_string().expect("utf-8");
    let program = OpenOptions::new().read(true).write(true).open(name);
    (File::from(person), program.expect("the other end"))
}

fn clusters(world: &World) -> String {
    world.ok("status -o json").trim().to_owned()
}

#[test]
fn a_cluster_is_launched_and_ended_when_somebody_agrees() {
    let world = World::new();
    let declined = on_terminal(&world, "launch -c c task.yaml -d", "n");
    assert!(declined.asked(), "{}", declined.screen);
    assert!(
        declined.screen.contains("localhost"),
        "the plan is shown: {}",
        declined.screen
    );
    assert_eq!((declined.code, clusters(&world).as_str()), (Some(1), "[]"));
    let agreed = on_terminal(&world, "launch -c c task.yaml -d", "");
    assert!(agreed.asked(), "Enter is yes");
    assert_eq!(agreed.code, Some(0), "{}", agreed.screen);
    // It is there already: nothing new is taken.
    let again = on_terminal(&world, "launch -c c task.yaml -d", "n");
    assert_eq!(
        (again.asked(), again.code),
        (false, Some(0)),
        "{}",
        again.screen
    );
    let kept = on_terminal(&world, "down c", "no");
    assert_eq!(
        (kept.asked(), kept.code),
        (true, Some(1)),
        "{}",
        kept.screen
    );
    assert_ne!(clusters(&world), "[]");
    let ended = on_terminal(&world, "down c", "y");
    assert_eq!(
        (ended.asked(), ended.code),
        (true, Some(0)),
        "{}",
        ended.screen
    );
    assert_eq!(clusters(&world), "[]");
}

#[test]
fn who_has_said_yes_is_not_asked() {
    let world = World::new();
    for line in [
        "launch -c c task.yaml -d -y",
        "exec c task.yaml -d",
        "stop c",
        "start c",
        "down c -y",
    ] {
        let seen = on_terminal(&world, line, "n");
        assert_eq!(
            (seen.asked(), seen.code),
            (false, Some(0)),
            "{line}: {}",
            seen.screen
        );
    }
    assert_eq!(clusters(&world), "[]");
}

#[test]
fn a_service_is_begun_and_ended_when_somebody_agrees() {
    let world = World::new();
    world.write("svc.yaml", SERVICE);
    let declined = on_terminal(&world, "serve up -n web svc.yaml --env WORD=x", "n");
    assert_eq!(
        (declined.asked(), declined.code),
        (true, Some(1)),
        "{}",
        declined.screen
    );
    assert_eq!(world.ok("serve status -o json").trim(), "[]");
    let agreed = on_terminal(&world, "serve up -n web svc.yaml --env WORD=x", "y");
    assert_eq!(
        (agreed.asked(), agreed.code),
        (true, Some(0)),
        "{}",
        agreed.screen
    );
    let kept = on_terminal(&world, "serve down web", "n");
    assert_eq!(
        (kept.asked(), kept.code),
        (true, Some(1)),
        "{}",
        kept.screen
    );
    let ended = on_terminal(&world, "serve down web -y", "n");
    assert_eq!(
        (ended.asked(), ended.code),
        (false, Some(0)),
        "{}",
        ended.screen
    );
    assert_eq!(world.ok("serve status -o json").trim(), "[]");
}

/// Scripts have no terminal: they are not asked, and go on.
#[test]
fn without_a_terminal_nobody_is_asked() {
    let world = World::new();
    for line in ["launch -c c task.yaml -d", "down c"] {
        let output = world.run(line);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        assert!(!errors.contains("[Y/n]"), "{line}: {errors}");
    }
}
