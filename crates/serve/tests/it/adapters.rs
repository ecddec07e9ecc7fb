//! Adapters that come and go while the server runs.

use std::sync::Arc;

use futures::StreamExt;
use serde_json::json;
use updraft_model::{ModelConfig, peft};
use updraft_serve::{AdapterSource, Engine, Existing, GenerateRequest, ModelSource, ServeOptions};
use updraft_store::{StageId, Store};

use crate::client::Server;
use crate::load::{adapter, ask, commit, done_files, load, model_files, write};

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";

async fn server(folder: &tempfile::TempDir, runtime_adapters: bool) -> Server {
    write(folder.path(), &model_files());
    let config = ModelConfig::from_json(&model_files()[0].1).expect("sound");
    let files = peft::write_adapter(&adapter(&config)).expect("sound");
    write(
        folder.path(),
        &[
            ("adapter_config.json", files.config_json),
            ("adapter_model.safetensors", files.safetensors),
        ],
    );
    let engine = load(&ModelSource::folder(folder.path()), &[]).await;
    let options = ServeOptions {
        runtime_adapters,
        ..ServeOptions::default()
    };
    Server::start(Arc::new(engine.expect("it loads")), options).await
}

#[tokio::test]
async fn an_adapter_is_loaded_used_and_unloaded() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = server(&folder, true).await;
    let plain = ask(&server, "tiny").await;
    let body = json!({"lora_name": "lora", "lora_path": folder.path()});
    let answer = server.post(LOAD, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["data"][1]["id"], "lora");
    assert_eq!(models["data"][1]["parent"], "tiny");
    let tuned = ask(&server, "lora").await;
    assert_ne!(plain, tuned, "it does something");
    assert_eq!(ask(&server, "tiny").await, plain);

    // The name is taken, unless it is to be replaced.
    let error = server.post(LOAD, &body).await.error(400, None);
    assert_eq!(error["param"], "lora_name");
    let mut replace = body.clone();
    replace["load_inplace"] = json!(true);
    assert_eq!(server.post(LOAD, &replace).await.status, 200);
    assert_eq!(ask(&server, "lora").await, tuned, "the same files");

    let unload = json!({"lora_name": "lora"});
    let counted = async || {
        server
            .get("/metrics")
            .await
            .body
            .contains("model_name=\"lora\"")
    };
    assert!(counted().await);
    assert_eq!(server.post(UNLOAD, &unload).await.status, 200);
    assert!(!counted().await, "names that come and go leave nothing");
    let again = server.post(UNLOAD, &unload).await;
    again.error(404, Some("model_not_found"));
    let question = json!({"model": "lora", "messages": [{"role": "user", "content": "x"}]});
    let answer = server.post("/v1/chat/completions", &question).await;
    answer.error(404, Some("model_not_found"));
}

/// From a store, by the URL of what training left there.
#[tokio::test]
async fn an_adapter_is_loaded_from_a_store() {
    let (folder, training) = (tempfile::tempdir(), tempfile::tempdir());
    let (folder, training) = (folder.expect("a folder"), training.expect("a folder"));
    let server = server(&folder, true).await;
    let url = format!("file://{}", training.path().display());
    let store = Store::open(&url).expect("a store");
    let id = StageId::done("tiny", "letters").expect("a name");
    commit(&store, &id, done_files()).await;
    let path = format!("{url}/done/tiny/letters");
    let answer = server
        .post(LOAD, &json!({"lora_name": "lora", "lora_path": path}))
        .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_ne!(ask(&server, "lora").await, ask(&server, "tiny").await);
}

/// An adapter is understood on a thread that may take its time: where none is free it waits for
/// one, while the threads that answer go on answering.
#[test]
fn an_adapter_is_understood_beside_the_threads_that_answer() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let store = Store::memory();
        let base = StageId::models("tiny").expect("a name");
        commit(&store, &base, model_files()).await;
        let trained = StageId::done("tiny", "letters").expect("a name");
        commit(&store, &trained, done_files()).await;
        let engine = load(&ModelSource::stage(&store, "models/tiny"), &[]).await;
        let engine = engine.expect("it loads");
        let (release, released) = std::sync::mpsc::channel::<()>();
        let taken = tokio::task::spawn_blocking(move || released.recv());

        let source = AdapterSource {
            name: "lora".into(),
            source: ModelSource::stage(&store, "done/tiny/letters"),
        };
        let adapters = engine.adapters().expect("it takes some");
        let mut loading = adapters.load_adapter(&source, Existing::Keep);
        // Reading from memory needs no thread, so only understanding can be what it waits for.
        for _ in 0..100 {
            assert!(futures::poll!(&mut loading).is_pending());
            tokio::task::yield_now().await;
        }
        let asked = GenerateRequest::greedy("tiny", vec![1, 2, 3], 4);
        let answer = engine.generate(asked).await.expect("it serves");
        assert_eq!(answer.count().await, 6);
        release.send(()).expect("it is waited for");
        loading.await.expect("it loads");
        assert_eq!(engine.models().len(), 2);
        taken.await.expect("no panic").expect("released");
    });
}

#[tokio::test]
async fn what_cannot_be_loaded_is_a_400_and_changes_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = server(&folder, true).await;
    let empty = tempfile::tempdir().expect("a temporary folder");
    for (name, path, param) in [
        ("tiny", folder.path().to_str(), "lora_name"),
        ("", folder.path().to_str(), "lora_name"),
        ("x", empty.path().to_str(), "lora_path"),
        ("x", Some("/no/such/folder"), "lora_path"),
        ("x", Some("memory://nothing"), "lora_path"),
        ("x", Some("nonsense://done/a/b"), "lora_path"),
    ] {
        let body = json!({"lora_name": name, "lora_path": path});
        let error = server.post(LOAD, &body).await.error(400, None);
        assert_eq!(error["param"], param, "{error}");
    }
    server
        .post(LOAD, &json!({"lora_name": "x"}))
        .await
        .error(400, None);
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["data"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn nobody_loads_anything_unless_it_is_allowed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = server(&folder, false).await;
    let body = json!({"lora_name": "lora", "lora_path": folder.path()});
    server.post(LOAD, &body).await.error(404, None);
    server.post(UNLOAD, &body).await.error(404, None);
}
