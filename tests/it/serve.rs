//! The server as a program: what it says, where it finds its model, how it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use updraft::store::{ManifestDraft, Opened, StageId, Store, open_stage};

use crate::pipeline::example;

/// A server that ends with its test.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// Waits for the line that says where it listens.
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(example("updraft-serve"));
        command.args(args).args(["--port", "0", "--threads", "1"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().expect("it starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let line = lines.next().expect("a line").expect("text");
        let after = line.split("http://").nth(1).expect("an address");
        let address = after.split('/').next().expect("an address").to_owned();
        Self { child, address }
    }

    /// Sends a request and hands out the connection.
    fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).expect("sent");
        stream
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> String {
        let mut answer = String::new();
        let mut stream = self.send(method, path, body);
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    fn signal(&self) {
        let id = self.child.id().to_string();
        let killed = Command::new("kill").args(["-TERM", &id]).status();
        assert!(killed.expect("there is a kill").success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tiny() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny")
}

/// The first signal lets requests end, which health tells; the second ends the process at once.
#[test]
fn a_second_signal_forces_the_end() {
    let tiny = tiny();
    let mut server = Server::start(&["--model", tiny.to_str().expect("UTF-8")]);
    // Far more than it can compute in the time that it gets.
    let body = json!({
        "prompt": "a", "n": 64, "max_tokens": 400, "ignore_eos": true, "stream": true,
    });
    let mut endless = server.send("POST", "/v1/completions", &body.to_string());
    let mut begun = [0; 15];
    endless.read_exact(&mut begun).expect("it answers");
    assert_eq!(&begun, b"HTTP/1.1 200 OK");
    server.signal();
    let start = Instant::now();
    while !server.ask("GET", "/health", "").starts_with("HTTP/1.1 503") {
        assert!(start.elapsed() < Duration::from_secs(10), "never draining");
    }
    assert!(
        server.child.try_wait().expect("ours").is_none(),
        "it drains"
    );
    server.signal();
    let status = server.child.wait().expect("it ends");
    assert_eq!(status.code(), Some(130));
}

/// A model by the name that training gave it, in the store that is named beside it.
#[test]
fn a_trained_model_is_served_from_its_store() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let url = format!("file://{}", folder.path().display());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let store = Store::open(&url).expect("a store");
        let id = StageId::done("tiny", "letters").expect("a name");
        let inputs = json!({"test": true});
        let opened = open_stage(&store, &id, "test", &inputs).await;
        let Opened::Open(stage) = opened.expect("a store") else {
            panic!("the store is new");
        };
        let mut objects = Vec::new();
        for name in [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ] {
            let bytes = std::fs::read(tiny().join(name)).expect("an asset");
            let name = format!("fused/{name}");
            let object = stage.put_object(&name, bytes.into());
            objects.push(object.await.expect("written"));
        }
        let draft = ManifestDraft {
            objects,
            ..ManifestDraft::default()
        };
        stage.commit(draft).await.expect("committed");
    });
    let server = Server::start(&["--store", &url, "--model", "done/tiny/letters"]);
    let models = server.ask("GET", "/v1/models", "");
    assert!(models.contains("\"id\":\"done/tiny/letters\""), "{models}");
    let body = json!({"prompt": "a", "max_tokens": 4, "ignore_eos": true}).to_string();
    let answer = server.ask("POST", "/v1/completions", &body);
    assert!(answer.contains("\"completion_tokens\":4"), "{answer}");
}
