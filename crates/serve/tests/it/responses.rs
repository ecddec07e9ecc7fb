//! The responses API, embeddings, and the document that lists everything.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use updraft_serve::{ApiKeys, EchoEngine, ServeOptions};

use crate::client::{NOW, Server};
use crate::life::until;

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
            json!({"text": {"format": {"type": "sound"}}}),
            "text.format.type",
        ),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"temperature": 9}), "temperature"),
        (json!({"input": [{"type": "reasoning"}]}), "input[0].type"),
        (
            json!({"input": [{"role": "x", "content": "y"}]}),
            "input[0].role",
        ),
        (json!({"input": []}), "messages"),
        (json!({"metadata": {"a": 5}}), "metadata.a"),
        (
            json!({"metadata": (0..17).map(|n| (n.to_string(), json!("x"))).collect::<serde_json::Map<_, _>>()}),
            "metadata",
        ),
        (json!({"prompt": {"id": "pmpt_1"}}), "prompt"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (
            json!({"include": ["message.output_text.logprobs"]}),
            "include",
        ),
        (json!({"n": 2}), "n"),
        (json!({"input": [{"role": "user", "content": 5}]}), "input"),
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
        runtime_adapters: true,
        ..ServeOptions::default()
    };
    let server = Server::start(Arc::new(EchoEngine::new(["echo"])), options).await;
    let document = server.get("/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().expect("an object");
    assert!(paths.len() > 15);
    for (path, operations) in paths {
        let url = path.replace("{id}", "echo");
        for (method, operation) in operations.as_object().expect("an object") {
            let answer = server.request(&method.to_uppercase(), &url, "", None).await;
            assert!(
                [200, 401].contains(&answer.status),
                "{method} {path}: {}",
                answer.status
            );
            for status in [
                "400", "401", "404", "405", "408", "413", "415", "429", "500", "503", "504",
            ] {
                let content = &operation["responses"][status]["content"]["application/json"];
                assert_eq!(
                    content["schema"]["$ref"], "#/components/schemas/Error",
                    "{path} {status}"
                );
            }
            let answered = operation["responses"]["200"]["content"].as_object();
            let silent = ["/health", "/ping"].contains(&path.as_str());
            assert_eq!(answered.is_none(), silent, "{path} says what a 200 is");
        }
    }
    // Every reference leads somewhere.
    let text = document.to_string();
    let refs = text.split("\"$ref\":\"#/components/schemas/").skip(1);
    for name in refs.filter_map(|rest| rest.split('"').next()) {
        assert!(
            document["components"]["schemas"][name].is_object(),
            "{name}"
        );
    }
}

/// A response is kept for who asked for it: to be fetched, answered on, and forgotten.
#[tokio::test]
async fn what_was_said_can_be_answered_on() {
    let server = Server::echo().await;
    let asked = json!({"input": "hi", "metadata": {"b": "x", "a": "y"}, "temperature": 0.1});
    let first = server.post(PATH, &asked).await.json();
    let id = first["id"].as_str().expect("a string");
    assert!(id.starts_with("resp_") && first["store"] == true);
    assert_eq!(first["metadata"], asked["metadata"]);
    let path = format!("{PATH}/{id}");
    assert_eq!(server.get(&path).await.json(), first);
    let body = json!({"input": "there", "previous_response_id": id});
    let second = server.post(PATH, &body).await.json();
    assert_eq!(second["previous_response_id"], id);
    assert_eq!(second["output"][0]["content"][0]["text"], "there");
    let streamed = server
        .post(PATH, &json!({"input": "hi", "stream": true}))
        .await
        .body;
    let last = streamed
        .lines()
        .rfind(|line| line.starts_with("data: "))
        .expect("events");
    let last: Value = serde_json::from_str(&last["data: ".len()..]).expect("JSON");
    let path_of = |response: &Value| format!("{PATH}/{}", response["id"].as_str().expect("an id"));
    let kept = server.get(&path_of(&last["response"])).await.json();
    assert_eq!(kept, last["response"]);
    let deleted = server.request("DELETE", &path, "", None).await.json();
    assert_eq!(
        deleted,
        json!({"id": id, "object": "response", "deleted": true})
    );
    server.get(&path).await.error(404, None);
    server
        .request("DELETE", &path, "", None)
        .await
        .error(404, None);
    let error = server.post(PATH, &body).await.error(400, None);
    assert_eq!(error["param"], "previous_response_id");
    let unkept = server
        .post(PATH, &json!({"input": "hi", "store": false}))
        .await
        .json();
    assert_eq!(unkept["store"], false);
    server.get(&path_of(&unkept)).await.error(404, None);
}

#[tokio::test]
async fn a_response_in_the_background_ends_or_is_cancelled() {
    let engine = EchoEngine::new(["echo"]).with_pace(Duration::from_millis(5));
    let server = Server::start(Arc::new(engine.clone()), ServeOptions::default()).await;
    let begin = async |text: &str| {
        let body = json!({"input": text, "background": true});
        let begun = server.post(PATH, &body).await.json();
        assert_eq!(
            (&begun["status"], &begun["background"]),
            (&json!("in_progress"), &json!(true))
        );
        format!("{PATH}/{}", begun["id"].as_str().expect("an id"))
    };
    let path = begin("hi").await;
    let ended = loop {
        let response = server.get(&path).await.json();
        if response["status"] != "in_progress" {
            break response;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(
        (&ended["status"], &ended["output"][0]["content"][0]["text"]),
        (&json!("completed"), &json!("hi"))
    );
    let cancel = async |path: &str| {
        server
            .request("POST", &format!("{path}/cancel"), "", None)
            .await
    };
    assert_eq!(
        cancel(&path).await.json(),
        ended,
        "what has ended stays as it is"
    );

    for deleted in [false, true] {
        let path = begin(&"x".repeat(2000)).await;
        assert_eq!(engine.running(), 1);
        match deleted {
            true => assert_eq!(server.request("DELETE", &path, "", None).await.status, 200),
            false => assert_eq!(cancel(&path).await.json()["status"], "cancelled"),
        }
        until("it is ended", || engine.running() == 0).await;
        let kept = server.get(&path).await;
        assert_eq!(kept.status, if deleted { 404 } else { 200 });
        assert!(deleted || kept.json()["status"] == "cancelled");
        // There is no answer to go on from.
        let id = path.rsplit('/').next().expect("an id");
        let body = json!({"input": "go on", "previous_response_id": id});
        let error = server.post(PATH, &body).await.error(400, None);
        assert_eq!(error["param"], "previous_response_id");
    }
    let plain = server.post(PATH, &json!({"input": "hi"})).await.json();
    let plain = format!("{PATH}/{}", plain["id"].as_str().expect("an id"));
    assert_eq!(cancel(&plain).await.error(400, None)["param"], "background");
    cancel(&format!("{PATH}/resp_none")).await.error(404, None);
    for more in [json!({"stream": true}), json!({"store": false})] {
        let mut body = json!({"input": "hi", "background": true});
        more.as_object()
            .expect("fields")
            .iter()
            .for_each(|(key, value)| body[key] = value.clone());
        assert_eq!(
            server.post(PATH, &body).await.error(400, None)["param"],
            "background"
        );
    }
}

/// Who cannot ask for a response again has no use for one in the background.
#[tokio::test]
async fn nothing_is_made_in_the_background_where_nothing_is_kept() {
    let options = ServeOptions {
        max_kept_responses: 0,
        ..ServeOptions::default()
    };
    let server = Server::start(Arc::new(EchoEngine::new(["echo"])), options).await;
    let body = json!({"input": "hi", "background": true});
    let error = server.post(PATH, &body).await.error(400, None);
    assert_eq!(error["param"], "background");
    assert_eq!(
        server.post(PATH, &json!({"input": "hi"})).await.json()["store"],
        false
    );
}

/// An answer without the form that was asked for would be wrong, in this API as in the others.
#[tokio::test]
async fn forms_in_words_of_others_are_refused() {
    let server = Server::echo().await;
    for field in ["guided_json", "guided_regex", "grammar"] {
        let mut body = json!({"input": "hi"});
        body[field] = json!({"type": "object"});
        let error = server.post(PATH, &body).await.error(400, None);
        assert_eq!(error["param"], field, "{error}");
    }
}

/// As any other request: counted, ended when it takes too long, and up to 2,048 inputs.
#[tokio::test]
async fn embeddings_are_requests_like_others() {
    let server = Server::echo().await;
    let inputs: Vec<String> = (0..300).map(|number| format!("{number:03}")).collect();
    let body = json!({"input": inputs, "encoding_format": null});
    let answer = server.post("/v1/embeddings", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let data = answer.json()["data"].as_array().expect("a list").clone();
    assert_eq!(data.len(), 300);
    assert!(
        data[299]["embedding"].is_array(),
        "floats, where none are named"
    );
    assert_ne!(data[0]["embedding"], data[299]["embedding"]);
    let metrics = server.get("/metrics").await.body;
    for line in [
        "vllm:prompt_tokens_total{model_name=\"echo\",engine=\"0\"} 900\n",
        "vllm:request_success_total{model_name=\"echo\",engine=\"0\",finished_reason=\"length\"} 300\n",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    let body = json!({"input": vec!["x"; 2049]});
    let error = server.post("/v1/embeddings", &body).await.error(400, None);
    assert_eq!(error["param"], "input");

    let slow = EchoEngine::new(["echo"]).with_pace(std::time::Duration::from_secs(9));
    let options = ServeOptions {
        request_timeout: Some(std::time::Duration::from_millis(50)),
        ..ServeOptions::default()
    };
    let server = Server::start(Arc::new(slow.clone()), options).await;
    let answer = server.post("/v1/embeddings", &json!({"input": "x"})).await;
    answer.error(504, Some("timeout"));
    until("it is ended", || slow.running() == 0).await;
}

/// Nobody reads with another key what was asked with one.
#[tokio::test]
async fn a_response_belongs_to_its_key() {
    let options = ServeOptions {
        api_keys: ApiKeys::new(["one", "two"]),
        ..ServeOptions::default()
    };
    let server = Server::start(Arc::new(EchoEngine::new(["echo"])), options).await;
    let header =
        |key: &str| format!("Authorization: Bearer {key}\r\nContent-Type: application/json\r\n");
    let asked = server
        .request("POST", PATH, &header("one"), Some("{\"input\": \"hi\"}"))
        .await
        .json();
    let id = asked["id"].as_str().expect("an id").to_owned();
    let path = format!("{PATH}/{id}");
    assert_eq!(
        server
            .request("GET", &path, &header("one"), None)
            .await
            .status,
        200
    );
    for method in ["GET", "DELETE"] {
        server
            .request(method, &path, &header("two"), None)
            .await
            .error(404, None);
    }
    let body = json!({"input": "and?", "previous_response_id": id}).to_string();
    server
        .request("POST", PATH, &header("two"), Some(&body))
        .await
        .error(400, None);
    server
        .request("POST", PATH, &header("one"), Some(&body))
        .await
        .json();
}
