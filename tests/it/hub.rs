//! A model and a dataset by their Hub ids, from a server that answers as the Hub does.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use wiremock::matchers::method;
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate};

use crate::pipeline::{dataset, finish, train};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_test";

/// Two gated repositories of one commit.
struct Hub {
    repositories: BTreeMap<&'static str, BTreeMap<String, Vec<u8>>>,
}

impl Hub {
    fn with(model: &Path, data: &Path) -> Self {
        let files = std::fs::read_dir(model).expect("the tiny model");
        let model = files
            .map(|entry| entry.expect("readable").path())
            .filter(|path| path.extension().is_none_or(|extension| extension != "py"))
            .map(|path| (name_of(&path), read(&path)))
            .collect();
        let data = BTreeMap::from([
            (".gitattributes".to_owned(), b"*.parquet lfs".to_vec()),
            ("train.jsonl".to_owned(), read(data)),
        ]);
        Self {
            repositories: BTreeMap::from([
                ("models/acme/tiny", model),
                ("datasets/acme/words", data),
            ]),
        }
    }

    /// `/api/models/acme/tiny/{revision/main, tree/<commit>}`
    fn api(&self, path: &str) -> Option<Value> {
        let path = path.strip_prefix("/api/")?;
        let (name, files) = self
            .repositories
            .iter()
            .find(|(name, _)| path.starts_with(**name))?;
        match path.strip_prefix(name)?.strip_prefix('/')?.split_once('/')? {
            ("revision", "main") => Some(json!({"sha": COMMIT})),
            ("tree", COMMIT) => Some(
                files
                    .iter()
                    .map(|(path, bytes)| {
                        json!({"type": "file", "path": path, "size": bytes.len(), "oid": "0"})
                    })
                    .collect(),
            ),
            _ => None,
        }
    }

    /// `/[datasets/]acme/x/resolve/<commit>/<path>`
    fn file(&self, path: &str) -> Option<&[u8]> {
        let (repository, file) = path
            .strip_prefix('/')?
            .split_once(&format!("/resolve/{COMMIT}/"))?;
        let name = match repository.starts_with("datasets/") {
            true => repository.to_owned(),
            false => format!("models/{repository}"),
        };
        Some(self.repositories.get(&*name)?.get(file)?)
    }
}

impl Respond for Hub {
    fn respond(&self, request: &Request) -> ResponseTemplate {
        let header = |name: &str| request.headers.get(name)?.to_str().ok();
        if header("authorization") != Some(&format!("Bearer {TOKEN}")) {
            return ResponseTemplate::new(401).insert_header("x-error-code", "GatedRepo");
        }
        let path = request.url.path();
        if let Some(answer) = self.api(path) {
            return ResponseTemplate::new(200).set_body_json(answer);
        }
        let Some(file) = self.file(path) else {
            return ResponseTemplate::new(404).insert_header("x-error-code", "EntryNotFound");
        };
        let range = header("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let (first, last) = range.expect("the client asks for ranges");
        let (first, last) = (parse(first), parse(last).min(file.len() - 1));
        let content_range = format!("bytes {first}-{last}/{}", file.len());
        ResponseTemplate::new(206)
            .insert_header("etag", format!("\"{COMMIT}\"").as_str())
            .insert_header("content-range", content_range.as_str())
            .set_body_bytes(&file[first..=last])
    }
}

fn parse(number: &str) -> usize {
    number.parse().expect("an offset")
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("readable")
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .expect("a file")
        .to_string_lossy()
        .into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn hub_ids_name_a_model_and_a_dataset() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny");
    let hub = Hub::with(&tiny, &dataset(dir.path()));
    let server = MockServer::start().await;
    Mock::given(method("GET"))
        .respond_with(hub)
        .mount(&server)
        .await;

    let store = dir.path().join("store");
    let mut command = train(&store, Path::new("acme/words"));
    command.args(["--model", "acme/tiny"]);
    command
        .env("HF_ENDPOINT", server.uri())
        .env("HF_TOKEN", TOKEN);
    let events = tokio::task::spawn_blocking(|| finish(command))
        .await
        .expect("not cancelled");

    let rows_of = |stage| {
        let finished = |event: &&Value| event["event"] == "finished" && event["stage"] == stage;
        events
            .iter()
            .find(finished)
            .and_then(|event| event["rows"].as_u64())
    };
    assert_eq!(rows_of("import"), Some(38), "{events:?}");
    let fused = std::fs::read_dir(store.join("done/acme/tiny/acme/words")).expect("the stage");
    assert!(fused.count() >= 2, "a key and current.json");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gated_repository_without_a_token_is_named() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny");
    let hub = Hub::with(&tiny, &dataset(dir.path()));
    let server = MockServer::start().await;
    Mock::given(method("GET"))
        .respond_with(hub)
        .mount(&server)
        .await;

    let mut command = train(&dir.path().join("store"), Path::new("acme/words"));
    command.env("HF_ENDPOINT", server.uri());
    command.env_remove("HF_TOKEN").env("HF_HOME", dir.path());
    let expected = ["acme/words", "HF_TOKEN"];
    tokio::task::spawn_blocking(move || crate::bad_input::check(command, &expected))
        .await
        .expect("one line that names it");
}
