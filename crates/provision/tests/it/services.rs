//! A service under load: a replica is killed, a version is rolled out, and no client sees an error.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use updraft_provision::agent::AgentBinary;
use updraft_provision::providers::local::LocalProvider;
use updraft_provision::service::{Controller, ReplicaPhase, ServiceOrder};
use updraft_provision::{Engine, EnvOverrides, ExecOptions, Provider, State, Task};

/// The body of a replica: answers with its version, after a moment.
#[test]
#[ignore = "a replica of the other tests, which run it as a process of its own"]
fn replica() {
    let port: u16 = std::env::var("PORT")
        .expect("PORT")
        .parse()
        .expect("a port");
    let version = std::env::var("VERSION").expect("VERSION");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("bind");
    for stream in listener.incoming() {
        let (mut stream, version) = (stream.expect("connection"), version.clone());
        std::thread::spawn(move || {
            let mut request = [0; 1024];
            let read = stream.read(&mut request).unwrap_or(0);
            if read > 0 && !request.starts_with(b"GET /ready") {
                std::thread::sleep(Duration::from_millis(5)); // the work of an answer
            }
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{version}",
                version.len()
            );
            let _ = stream.write_all(answer.as_bytes()); // the client may have gone
        });
    }
}

fn order(version: u32) -> ServiceOrder {
    let program = std::env::current_exe().expect("this program");
    let yaml = format!(
        "service:\n  readiness_probe: {{path: /ready, endpoint_probe_interval_seconds: 0.2, timeout_seconds: 2, consecutive_failure_threshold_timeout: 3}}\n  replicas: 2\n\
         envs: {{VERSION: v{version}}}\n\
         run: exec {} --ignored --exact services::replica\n",
        program.display()
    );
    ServiceOrder {
        task: Task::from_yaml(&yaml, &EnvOverrides::new()).expect("task"),
        version,
    }
}

/// Clients that ask again and again; what they got, and whether anything went wrong.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    answers: AtomicUsize,
    errors: std::sync::Mutex<Vec<String>>,
}

async fn ask(address: SocketAddr) -> Result<String, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut stream = tokio::net::TcpStream::connect(address)
        .await
        .map_err(text)?;
    let request =
        b"POST /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi";
    stream.write_all(request).await.map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(text)?;
    match answer
        .strip_prefix("HTTP/1.1 200 OK")
        .and_then(|rest| rest.rsplit_once("\r\n\r\n"))
    {
        Some((_, body)) if body.starts_with('v') => Ok(body.to_owned()),
        _ => Err(format!("answered {answer:?}")),
    }
}

async fn client(load: Arc<Load>, address: SocketAddr) {
    while !load.stop.load(Ordering::Relaxed) {
        match ask(address).await {
            Ok(_) => load.answers.fetch_add(1, Ordering::Relaxed),
            Err(error) => {
                load.errors.lock().expect("errors").push(error);
                0
            }
        };
    }
}

async fn until(controller: &mut Controller, what: &str, holds: impl Fn(&Controller) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !holds(controller) {
        assert!(
            Instant::now() < deadline,
            "{what}: {:?}",
            controller.report()
        );
        controller.step().await;
    }
}

fn ready(controller: &Controller, version: u32) -> usize {
    let report = controller.report();
    let ready = report
        .replicas
        .iter()
        .filter(|replica| replica.version == version && replica.phase == ReplicaPhase::Ready);
    ready.count()
}

/// Kills every process of one replica, as a machine that goes down would.
fn kill_replica(instances: &Path) {
    let instance = std::fs::read_dir(instances)
        .expect("instances")
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().contains("replica-1-"))
        .expect("the first replica");
    for group in std::fs::read_dir(instance.path().join("groups"))
        .expect("groups")
        .flatten()
    {
        let group = group.file_name().to_string_lossy().into_owned();
        let kill = format!("kill -9 -- -{group} 2>/dev/null; true");
        let done = std::process::Command::new("bash")
            .args(["-c", &kill])
            .status();
        assert!(done.expect("kill").success());
    }
}

/// A service of two replicas under load; `kill` strikes the machine of the first, `restore` brings
/// back what cannot come back by itself.
async fn tell(
    provider: Arc<dyn Provider>,
    dir: &Path,
    mut kill: impl FnMut(),
    restore: impl FnOnce(),
) {
    let state = Arc::new(State::open(dir.join("state")).expect("state"));
    let engine = Engine::new(state, vec![provider]);
    let options = ExecOptions {
        setup: true,
        base: dir.to_owned(),
    };
    let agent = AgentBinary::new(env!("CARGO_BIN_EXE_updraft-agent"), "").expect("agent");
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut controller = Controller::new("svc", engine.clone(), agent, options, address, order(1))
        .await
        .expect("controller");
    until(&mut controller, "two replicas", |controller| {
        ready(controller, 1) == 2
    })
    .await;

    let load = Arc::new(Load::default());
    let clients: Vec<_> = (0..4)
        .map(|_| tokio::spawn(client(load.clone(), controller.address())))
        .collect();
    until(&mut controller, "answers", |_| {
        load.answers.load(Ordering::Relaxed) > 50
    })
    .await;
    kill();
    until(&mut controller, "a replacement", |controller| {
        let replicas = controller.report().replicas;
        let first = replicas.iter().find(|replica| replica.id == 1);
        ready(controller, 1) == 2
            && first.is_none_or(|first| first.phase == ReplicaPhase::ShuttingDown)
    })
    .await;
    restore();

    controller.update(order(2)).expect("update");
    until(&mut controller, "the new version alone", |controller| {
        controller.report().replicas.len() == 2 && ready(controller, 2) == 2
    })
    .await;
    assert_eq!(ask(controller.address()).await.expect("answer"), "v2");
    load.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.expect("client");
    }
    let errors = load.errors.lock().expect("errors").clone();
    assert_eq!(
        errors,
        Vec::<String>::new(),
        "of {} answers",
        load.answers.load(Ordering::Relaxed)
    );

    controller.down().await.expect("down");
    assert!(engine.state().open_nodes().expect("rows").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_replica_and_a_new_version_cost_no_client_an_error() {
    let dir = tempfile::tempdir().expect("folder");
    let instances = dir.path().join("instances");
    let provider = Arc::new(LocalProvider::new(&instances).expect("absolute"));
    tell(provider, dir.path(), || kill_replica(&instances), || ()).await;
    assert_eq!(std::fs::read_dir(&instances).expect("instances").count(), 0);
}

#[test]
fn a_service_on_machines_of_their_own() {
    crate::lab::run_inside("services::inside::");
}

mod inside {
    use std::cell::{Cell, RefCell};

    use updraft_provision::providers::ssh::SshProvider;

    use super::*;
    use crate::lab::Lab;

    /// The machine that the first replica has.
    fn first_replica(lab: &Lab) -> u8 {
        let has_it = |number: &u8| {
            let record = lab.home(*number).join(".updraft-instance/instance.json");
            std::fs::read_to_string(record).is_ok_and(|text| text.contains("\"svc-replica-1\""))
        };
        (0..5).find(has_it).expect("the first replica")
    }

    /// Two replicas, one more for the machine that dies, two for the new version: each listens on its
    /// own machine's loopback address, and nothing but ssh leads there.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    #[ignore = "runs in namespaces that `a_service_on_machines_of_their_own` makes"]
    async fn a_machine_that_dies_and_a_new_version_cost_no_client_an_error() {
        let Some(lab) = Lab::new(5) else { return };
        let dir = tempfile::tempdir().expect("folder");
        let provider = Arc::new(SshProvider::new(lab.hosts.clone()));
        let struck = Cell::new(0);
        let lab = RefCell::new(lab);
        tell(
            provider,
            dir.path(),
            || {
                let number = first_replica(&lab.borrow());
                struck.set(number);
                lab.borrow_mut().switch_off(number);
            },
            || lab.borrow_mut().reboot(struck.get()),
        )
        .await;
        for number in 0..5 {
            let left = lab.borrow().home(number).join(".updraft-instance");
            assert!(!left.exists(), "something is left on machine {number}");
        }
    }
}
