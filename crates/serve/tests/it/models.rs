//! The list of models, and names with slashes.

use std::sync::Arc;

use serde_json::json;
use updraft_serve::{EchoEngine, ServeOptions};

use crate::client::{NOW, Server};

#[tokio::test]
async fn every_model_is_listed_and_found() {
    let names = ["base", "owner/name", "/data/done/model"];
    let server = Server::start(Arc::new(EchoEngine::new(names)), ServeOptions::default()).await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let model = json!({
        "id": "base", "object": "model", "created": NOW, "owned_by": "updraft", "root": "base",
        "parent": null, "max_model_len": 4096, "permission": [],
    });
    assert_eq!(list["data"][0], model);
    for (path, id) in [
        ("/v1/models/base", "base"),
        ("/v1/models/owner/name", "owner/name"),
        ("/v1/models/owner%2Fname", "owner/name"),
        ("/v1/models//data/done/model", "/data/done/model"),
        ("/v1/models/%2Fdata%2Fdone%2Fmodel", "/data/done/model"),
    ] {
        assert_eq!(server.get(path).await.json()["id"], id, "{path}");
    }
    server
        .get("/v1/models/other")
        .await
        .error(404, Some("model_not_found"));
    let body = json!({"model": "/data/done/model", "messages": [{"role": "user", "content": "x"}]});
    assert_eq!(
        server.post("/v1/chat/completions", &body).await.json()["model"],
        "/data/done/model"
    );
}
