//! The server as a program: what it says, where it finds its model, how it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::Device;
use serde_json::{Value, json};
use updraft::model::{Adapter, LoraConfig, ModelConfig, merge, peft, tiny as random};
use updraft::serve::uniform;
use updraft::store::conformance::s3::S3Server;
use updraft::store::{ManifestDraft, Opened, StageId, Store, open_stage};

use crate::pipeline::example;

/// A server that ends with its test.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        Self::start_with(args, &[])
    }

    /// Waits for the line that says where it listens.
    fn start_with(args: &[&str], environment: &[(&str, String)]) -> Self {
        let mut command = Command::new(example("updraft-serve"));
        command.args(args).args(["--port", "0", "--threads", "1"]);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
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

    /// What a model says to a fixed question; the same each time.
    fn chat(&self, model: &str) -> String {
        let body = json!({
            "model": model, "messages": [{"role": "user", "content": "How many?"}],
            "temperature": 0, "max_tokens": 12, "ignore_eos": true, "return_token_ids": true,
        });
        let answer = self.ask("POST", "/v1/chat/completions", &body.to_string());
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        let body: Value = serde_json::from_str(body).expect("JSON");
        let ids = &body["choices"][0]["token_ids"];
        assert_eq!(ids.as_array().map(Vec::len), Some(12), "{body}");
        ids.to_string()
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

/// Models and adapters by the names that training gave them, in the store that is named beside them,
/// be it a folder or a bucket: what training merged answers as its adapter does over the base.
#[test]
fn what_was_trained_is_served_from_its_store() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bucket = runtime.block_on(S3Server::start());
    let local = format!("file://{}", folder.path().display());
    let stores = [
        (local.clone(), Store::open(&local).expect("a store")),
        ("s3://bucket/served".to_owned(), bucket.store("served")),
    ];
    let mut answers = Vec::new();
    for (url, store) in stores {
        let (base, done) = trained_files();
        runtime.block_on(async {
            let models = StageId::models("tiny").expect("a name");
            commit(&store, &models, base).await;
            let trained = StageId::done("tiny", "letters").expect("a name");
            commit(&store, &trained, done).await;
        });
        let start = |args: &[&str]| Server::start_with(args, &bucket.environment());
        let trained = "done/tiny/letters";
        let adapter = format!("tuned={trained}");
        let base = start(&[
            "--store",
            &url,
            "--model",
            "models/tiny",
            "--adapter",
            &adapter,
        ]);
        let merged = start(&["--store", &url, "--model", trained]);
        let by_url = start(&["--model", &format!("{url}/{trained}"), "--name", "merged"]);
        let ready = base.ask("GET", "/health", "");
        assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
        let plain = base.chat("models/tiny");
        let tuned = base.chat("tuned");
        assert_ne!(plain, tuned, "the adapter does something");
        assert_eq!(merged.chat(trained), tuned);
        assert_eq!(by_url.chat("merged"), tuned);
        answers.push((plain, tuned));
    }
    assert_eq!(answers[0], answers[1]);
}

/// A key that a script left empty would open the server to everybody: it does not even start.
#[test]
fn an_empty_key_is_refused() {
    for (flags, variable) in [
        (&["--api-key", ""][..], None),
        (&["--api-key", "one", "--api-key", ""], None),
        (&[], Some("one,,two")),
        (&[], Some(" ")),
    ] {
        let mut command = Command::new(example("updraft-serve"));
        command
            .args(["--model", "nowhere", "--port", "0"])
            .args(flags);
        command.env_remove("UPDRAFT_API_KEY");
        command.envs(variable.map(|keys| ("UPDRAFT_API_KEY", keys)));
        let ended = command.output().expect("it ends");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(!ended.status.success());
        assert!(said.contains("an API key is empty"), "{flags:?}: {said}");
    }
}

/// What has a flag has a variable.
#[test]
fn settings_come_from_the_environment_too() {
    let folder = tiny();
    let origin = "https://page.example";
    let server = Server::start_with(
        &["--model", folder.to_str().expect("UTF-8")],
        &[
            ("UPDRAFT_NAME", "named".to_owned()),
            ("UPDRAFT_API_KEY", "one, two".to_owned()),
            (
                "UPDRAFT_ALLOW_ORIGIN",
                format!("https://other.example,{origin}"),
            ),
            ("UPDRAFT_RUNTIME_ADAPTERS", "true".to_owned()),
            ("UPDRAFT_LOG_JSON", "true".to_owned()),
        ],
    );
    let ask = |method: &str, path: &str, head: &str| {
        let mut stream = TcpStream::connect(&server.address).expect("it listens");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{head}\
             Content-Length: 2\r\n\r\n{{}}"
        );
        stream.write_all(head.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let refused = ask("GET", "/v1/models", "");
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    let key = format!("Authorization: Bearer two\r\nOrigin: {origin}\r\n");
    let models = ask("GET", "/v1/models", &key);
    assert!(models.contains("\"id\":\"named\""), "{models}");
    let allowed = format!("access-control-allow-origin: {origin}");
    assert!(models.contains(&allowed), "{models}");
    let json = format!("{key}Content-Type: application/json\r\n");
    let load = ask("POST", "/v1/load_lora_adapter", &json);
    assert!(load.starts_with("HTTP/1.1 400"), "it is there: {load}");
}

type Files = Vec<(String, Vec<u8>)>;

/// A random model with the tiny one's tokenizer, and what training leaves of it: an adapter, and the
/// model with that merged into it.
fn trained_files() -> (Files, Files) {
    let read = |name: &str| std::fs::read(tiny().join(name)).expect("an asset");
    let config = ModelConfig::from_json(&read("config.json")).expect("sound");
    let weights = random::weights(&config, 3);
    let mut adapter =
        Adapter::init(&LoraConfig::default(), &config, 1, &Device::Cpu).expect("sound settings");
    let changed = adapter.update(|values| {
        for (index, value) in values.iter_mut().enumerate() {
            *value = (uniform(9, index as u64) - 0.5) as f32 * 0.4;
        }
    });
    changed.expect("on the CPU");
    let others = || {
        [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        .map(|name| (name.to_owned(), read(name)))
    };
    let mut base = vec![(
        "model.safetensors".to_owned(),
        random::safetensors(&config, 3),
    )];
    base.extend(others());
    let lora = peft::write_adapter(&adapter).expect("sound");
    let mut done = vec![
        (
            "lora_model/adapter_config.json".to_owned(),
            lora.config_json,
        ),
        (
            "lora_model/adapter_model.safetensors".to_owned(),
            lora.safetensors,
        ),
    ];
    let merged = merge::merge(&weights, &config, &adapter).expect("it fits");
    done.extend(
        merged
            .map(|file| file.expect("f32"))
            .chain(others())
            .map(|(name, bytes)| (format!("fused/{name}"), bytes)),
    );
    (base, done)
}

async fn commit(store: &Store, id: &StageId, files: Files) {
    let inputs = json!({"test": id.to_string()});
    let opened = open_stage(store, id, "test", &inputs).await;
    let Opened::Open(stage) = opened.expect("a store") else {
        panic!("the store is new");
    };
    let mut objects = Vec::new();
    for (name, bytes) in files {
        let object = stage.put_object(&name, bytes.into());
        objects.push(object.await.expect("written"));
    }
    let draft = ManifestDraft {
        objects,
        ..ManifestDraft::default()
    };
    stage.commit(draft).await.expect("committed");
}
