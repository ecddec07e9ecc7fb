//! What a model's own files say about using it.

use serde_json::{Value, json};
use updraft_serve::ModelSource;

use crate::load::{load, model_files, serve, write};

/// How much a thinking model may think is its template's business, in either API's words.
#[tokio::test]
async fn templates_read_the_reasoning_effort() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), &model_files());
    let template = "{{ reasoning_effort | default('none') }}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).expect("written");
    let source = ModelSource::folder(folder.path());
    let server = serve(load(&source, &[]).await.expect("it loads")).await;
    let chat = "/v1/chat/completions";
    let messages = json!([{"role": "user", "content": "x"}]);
    let kwargs = json!({"reasoning_effort": "minimal"});
    for (path, body, effort) in [
        (chat, json!({"messages": messages}), "none"),
        (
            chat,
            json!({"messages": messages, "reasoning_effort": null}),
            "none",
        ),
        (
            chat,
            json!({"messages": messages, "reasoning_effort": "high"}),
            "high",
        ),
        (
            chat,
            json!({"messages": messages, "reasoning_effort": "high", "chat_template_kwargs": kwargs}),
            "minimal",
        ),
        ("/v1/responses", json!({"input": "x"}), "none"),
        (
            "/v1/responses",
            json!({"input": "x", "reasoning": {"effort": "low"}}),
            "low",
        ),
        (
            "/v1/responses",
            json!({"input": "x", "reasoning": {}}),
            "none",
        ),
    ] {
        let mut body = body;
        body["max_tokens"] = json!(1);
        body["max_output_tokens"] = json!(1);
        let answer = server.post(path, &body).await.json();
        let usage = &answer["usage"];
        let tokens = usage.get("prompt_tokens").unwrap_or(&usage["input_tokens"]);
        assert_eq!(tokens, effort.len(), "one for each byte: {body}");
    }
}

/// What a model's makers recommend holds where a request says nothing, and yields where it does;
/// any of several tokens ends an answer.
#[tokio::test]
async fn generation_config_says_what_requests_leave_out() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let texts = async |generation_config: &str, more: Value| {
        write(folder.path(), &model_files());
        std::fs::write(
            folder.path().join("generation_config.json"),
            generation_config,
        )
        .expect("written");
        let server = serve(
            load(&ModelSource::folder(folder.path()), &[])
                .await
                .expect("it loads"),
        )
        .await;
        let mut body =
            json!({"prompt": "How many?", "max_tokens": 60, "seed": 5, "return_token_ids": true});
        more.as_object()
            .expect("fields")
            .iter()
            .for_each(|(key, value)| body[key] = value.clone());
        let choice = server.post("/v1/completions", &body).await.json()["choices"][0].clone();
        assert!(choice["token_ids"].is_array(), "{choice}");
        (choice["token_ids"].clone(), choice["finish_reason"].clone())
    };
    let plain = r#"{"eos_token_id": 257}"#;
    let greedy = texts(plain, json!({"temperature": 0})).await;
    let drawn = texts(plain, json!({})).await;
    assert_ne!(
        greedy, drawn,
        "a random model's draws are not its likeliest tokens"
    );
    for (recommended, asked) in [
        (json!({"temperature": 0.0}), json!({"temperature": 0})),
        (json!({"top_k": 1}), json!({"top_k": 1})),
        (
            json!({"top_p": 0.3, "temperature": 0.7}),
            json!({"top_p": 0.3, "temperature": 0.7}),
        ),
        (json!({"min_p": 0.9}), json!({"min_p": 0.9})),
        (
            json!({"repetition_penalty": 1.8}),
            json!({"repetition_penalty": 1.8}),
        ),
    ] {
        let mut config = recommended.clone();
        config["eos_token_id"] = json!(257);
        let config = config.to_string();
        let expected = texts(plain, asked).await;
        assert_eq!(texts(&config, json!({})).await, expected, "{recommended}");
        let neutral = json!({
            "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1,
        });
        assert_eq!(
            texts(&config, neutral).await,
            drawn,
            "what is asked comes first: {recommended}"
        );
        assert_ne!(expected, drawn, "{recommended} does something");
    }
    // The answer's fourth token becomes an end beside the usual one.
    let fourth = greedy.0[3].as_u64().expect("an id");
    let first = greedy
        .0
        .as_array()
        .expect("ids")
        .iter()
        .position(|id| *id == fourth)
        .expect("it is there");
    let several = json!({"eos_token_id": [257, fourth], "temperature": 0.0}).to_string();
    let (ids, reason) = texts(&several, json!({})).await;
    assert_eq!(
        (ids.as_array().map(Vec::len), reason),
        (Some(first), json!("stop"))
    );
    let (ids, _) = texts(&several, json!({"ignore_eos": true})).await;
    assert_eq!(ids, greedy.0);
}
