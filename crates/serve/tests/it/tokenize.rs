//! Tokenizing and back.

use serde_json::json;

use crate::client::Server;

#[tokio::test]
async fn text_and_conversations_become_ids() {
    let server = Server::echo().await;
    let expected = json!({
        "count": 2, "max_model_len": 4096, "tokens": [104, 105], "token_strs": null
    });
    for body in [
        json!({"model": "echo", "prompt": "hi"}),
        json!({"content": "hi"}),
        json!({"messages": [{"role": "user", "content": "hi"}]}),
    ] {
        assert_eq!(
            server.post("/tokenize", &body).await.json(),
            expected,
            "{body}"
        );
    }
    let body = json!({"prompt": "hi", "return_token_strs": true});
    assert_eq!(
        server.post("/tokenize", &body).await.json()["token_strs"],
        json!(["h", "i"])
    );
    server.post("/tokenize", &json!({})).await.error(400, None);
    let mut begun = json!({"messages": [{"role": "user", "content": "hi"}]});
    begun["add_special_tokens"] = json!(true);
    let error = server.post("/tokenize", &begun).await.error(400, None);
    assert_eq!(
        error["param"], "add_special_tokens",
        "its template does that"
    );
}

#[tokio::test]
async fn ids_become_text() {
    let server = Server::echo().await;
    let answer = server
        .post("/detokenize", &json!({"tokens": [104, 105]}))
        .await
        .json();
    assert_eq!(answer, json!({"prompt": "hi", "content": "hi"}));
    let error = server
        .post("/detokenize", &json!({"tokens": [104, 99999]}))
        .await;
    assert_eq!(error.error(400, None)["param"], "tokens");
}
