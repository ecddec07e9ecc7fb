//! The responses API, embeddings, and the document that lists everything.

use std::sync::Arc;

use serde_json::{Value, json};
use updraft_serve::{ApiKeys, EchoEngine, ServeOptions};

use crate::client::{NOW, Server};

const PATH: &str = "/v1/responses";

#[tokio::test]
async fn an_input_of_any_form_is_answered() {
    let server = Server::echo().await;
    let parts = json!([{"type": "input_text", "text": "hi"}]);
    for input in [
        json!("hi"),
        json!([{"role": "user", "content": "hi"}]),
        json!([{"type": "message", "role": "user", "content": parts}]),
        json!([
            {"role": "developer", "content": "x"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "y"}]},
            {"role": "user", "content": "hi"},
        ]),
    ] {
        let answer = server.post(PATH, &json!({"input": input})).await.json();
        assert_eq!(answer["object"], "response", "{answer}");
        assert_eq!(
            (&answer["status"], &answer["created_at"]),
            (&json!("completed"), &json!(NOW))
        );
        let item = &answer["output"][0];
        assert_eq!(
            (&item["type"], &item["role"]),
            (&json!("message"), &json!("assistant"))
        );
        assert_eq!(item["content"][0]["text"], "hi");
        assert_eq!(answer["usage"]["output_tokens"], 3);
    }
    let body = json!({"input": "hello", "max_output_tokens": 2});
    let cut = server.post(PATH, &body).await.json();
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
}

#[tokio::test]
async fn events_come_in_their_order_and_agree_with_the_whole() {
    let server = Server::echo().await;
    let body = json!({"input": "hi", "stream": true});
    let answer = server.post(PATH, &body).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let events: Vec<Value> = answer
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect();
    let kinds: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().expect("a type"))
        .collect();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(kinds, expected);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let mut streamed = events[9]["response"].clone();
    let mut whole = server.post(PATH, &json!({"input": "hi"})).await.json();
    for response in [&mut streamed, &mut whole] {
        response["id"] = Value::Null;
        response["output"][0]["id"] = Value::Null;
    }
    assert_eq!(streamed, whole);
}

#[tokio::test]
async fn what_responses_cannot_do_is_named() {
    let server = Server::echo().await;
    for (more, param) in [
        (
            json!({"previous_response_id": "resp_1"}),
            "previous_response_id",
        ),
        (json!({"tools": [{"type": "web_search"}]}), "tools"),
        (
            json!({"text": {"format": {"type": "json_object"}}}),
            "text.format",
        ),
        (json!({"background": true}), "background"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"temperature": 9}), "temperature"),
        (json!({"input": [{"type": "reasoning"}]}), "input[0].type"),
        (
            json!({"input": [{"role": "x", "content": "y"}]}),
            "input[0].role",
        ),
        (json!({"input": []}), "messages"),
    ] {
        let mut body = json!({"input": "hi"});
        let Value::Object(more) = more else {
            panic!("fields are an object")
        };
        more.into_iter().for_each(|(key, value)| body[key] = value);
        let error = server.post(PATH, &body).await.error(400, None);
        assert_eq!(error["param"], param, "{error}");
    }
}

#[tokio::test]
async fn texts_and_ids_are_embedded_alike_in_both_encodings() {
    let server = Server::echo().await;
    let path = "/v1/embeddings";
    let floats = server
        .post(
            path,
            &json!({"input": ["ab", "aa"], "encoding_format": "float"}),
        )
        .await
        .json();
    assert_eq!(
        floats["usage"],
        json!({"prompt_tokens": 4, "total_tokens": 4})
    );
    let vector = |index: usize| -> Vec<f32> {
        serde_json::from_value(floats["data"][index]["embedding"].clone()).expect("numbers")
    };
    for index in 0..2 {
        let length: f32 = vector(index).iter().map(|v| v * v).sum();
        assert!((length - 1.0).abs() < 1e-6, "{length}");
    }
    assert_ne!(vector(0), vector(1));
    let body = json!({"input": [[97, 98]], "encoding_format": "base64"});
    let encoded = server.post(path, &body).await.json();
    let text = encoded["data"][0]["embedding"].as_str().expect("a string");
    // Little-endian f32s, of which the first 97 are zero: 97 x 4 bytes are 517 letters and more.
    assert!(text.starts_with(&"A".repeat(517)), "{text}");
    for body in [
        json!({"input": ""}),
        json!({"input": []}),
        json!({"input": "x", "dimensions": 3}),
    ] {
        server.post(path, &body).await.error(400, None);
    }
}

#[tokio::test]
async fn the_document_lists_every_path() {
    let options = ServeOptions {
        api_keys: ApiKeys::new(["key"]),
        ..ServeOptions::default()
    };
    let server = Server::start(Arc::new(EchoEngine::new(["echo"])), options).await;
    let document = server.get("/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().expect("an object");
    assert!(paths.len() > 10);
    for (path, operations) in paths {
        let path = path.replace("{id}", "echo");
        for method in operations.as_object().expect("an object").keys() {
            let answer = server
                .request(&method.to_uppercase(), &path, "", None)
                .await;
            assert!(
                [200, 401].contains(&answer.status),
                "{method} {path}: {}",
                answer.status
            );
        }
    }
}
