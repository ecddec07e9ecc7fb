//! Promises about commands and files on a node.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::secret::Secret;
use crate::transport::{ExitStatus, HostTransport, LogStream, Process, ShellCommand};

fn script(text: &str) -> ShellCommand {
    ShellCommand {
        script: text.to_owned(),
        ..ShellCommand::default()
    }
}

async fn output(process: &mut Process) -> Vec<String> {
    let mut lines = Vec::new();
    while let Some(line) = process.lines.recv().await {
        lines.push(line.text);
    }
    lines
}

/// A thousand lines and the last one without a newline.
pub async fn lines_arrive_in_order_and_none_is_lost(transport: &dyn HostTransport) {
    let command = script("for i in $(seq 1000); do echo $i; done; echo err >&2; printf end");
    let mut process = transport.start(&command).await.expect("start");
    let mut out = Vec::new();
    let mut err = Vec::new();
    while let Some(line) = process.lines.recv().await {
        match line.stream {
            LogStream::Stdout => out.push(line.text),
            LogStream::Stderr => err.push(line.text),
        }
    }
    let expected: Vec<String> = (1..=1000)
        .map(|i| i.to_string())
        .chain(["end".to_owned()])
        .collect();
    assert_eq!(out, expected);
    assert_eq!(err, ["err"]);
    assert!(process.control.wait().await.expect("wait").success());
}

/// Exit codes are what the script said.
pub async fn the_exit_code_is_reported(transport: &dyn HostTransport) {
    let mut process = transport.start(&script("exit 7")).await.expect("start");
    assert_eq!(
        process.control.wait().await.expect("wait"),
        ExitStatus::Code(7)
    );
}

/// Variables reach the command, and it runs where it should.
pub async fn the_environment_and_workdir_are_set(transport: &dyn HostTransport) {
    let environment = BTreeMap::from([("WORD".to_owned(), Secret::new("a 'b' $c".to_owned()))]);
    let command = ShellCommand {
        script: "echo \"$WORD\"; pwd".to_owned(),
        workdir: Some("/".to_owned()),
        environment,
    };
    let mut process = transport.start(&command).await.expect("start");
    assert_eq!(output(&mut process).await, ["a 'b' $c", "/"]);
}

/// Nothing that the command started outlives its end, though it ignores SIGTERM.
pub async fn ending_a_process_ends_its_children(transport: &dyn HostTransport) {
    let command = script(
        "trap '' TERM; (trap '' TERM; echo child; while :; do read -t 60 <> <(:); done) & wait",
    );
    let mut process = transport.start(&command).await.expect("start");
    let ready = process
        .lines
        .recv()
        .await
        .expect("the child says that it runs");
    assert_eq!(ready.text, "child");
    let status = process
        .control
        .end(Duration::from_millis(50))
        .await
        .expect("end");
    assert!(!status.success());
    // The channel closes only when every holder of the pipe, the child included, has ended.
    assert_eq!(output(&mut process).await, Vec::<String>::new());
}

/// A file comes back as it went, through folders that were not there.
pub async fn files_arrive_whole_and_come_back(transport: &dyn HostTransport) {
    let dir = std::env::temp_dir().join(format!("updraft-transport-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("temporary folder");
    let (from, back) = (dir.join("from"), dir.join("a/b/back"));
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    std::fs::write(&from, &bytes).expect("write");
    transport.put(&from, Path::new("x/y")).await.expect("put");
    transport.get(Path::new("x/y"), &back).await.expect("get");
    assert!(std::fs::read(&back).expect("read") == bytes);
    std::fs::remove_dir_all(&dir).expect("clean up");
}

/// A connection made here arrives at what listens on the node's loopback address, also where the
/// listener came later.
pub async fn a_forward_leads_to_the_nodes_port(transport: &dyn HostTransport) {
    // The node may be this machine: a port that is free here and now will do for both.
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|bound| bound.local_addr());
    let port = free.expect("a free port").port();
    let forward = transport.forward(port).await.expect("forward");
    let server = format!(
        "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalAddr => \"127.0.0.1\", LocalPort => {port}, Listen => 5, ReuseAddr => 1) or die $!; $| = 1; print \"up\\n\"; while ($c = $s->accept) {{ print $c \"hello\\n\"; close $c }}'"
    );
    let mut process = transport.start(&script(&server)).await.expect("start");
    let up = process.lines.recv().await.expect("the server listens");
    assert_eq!(up.text, "up");
    let said = read_all(forward.address()).await;
    process.control.end(Duration::ZERO).await.expect("end");
    assert_eq!(said, "hello\n");
}

async fn read_all(address: std::net::SocketAddr) -> String {
    let connected = tokio::net::TcpStream::connect(address).await;
    let stream = connected.expect("the forward accepts");
    let mut said = Vec::new();
    loop {
        stream.readable().await.expect("readable");
        let mut buffer = [0; 64];
        match stream.try_read(&mut buffer) {
            Ok(0) => return String::from_utf8_lossy(&said).into_owned(),
            Ok(read) => said.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
}
