//! Adapters that come and go while the server runs.

use std::sync::Arc;

use serde_json::json;
use updraft_model::{ModelConfig, peft};
use updraft_serve::{ModelSource, ServeOptions};
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
