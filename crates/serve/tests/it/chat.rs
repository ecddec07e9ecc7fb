//! Chat completions over an engine that says back what it is told.

use serde_json::{Value, json};

use crate::client::{NOW, Server};

const PATH: &str = "/v1/chat/completions";

fn ask(text: &str, more: Value) -> Value {
    let mut body = json!({"model": "echo", "messages": [{"role": "user", "content": text}]});
    let Value::Object(more) = more else {
        panic!("fields are an object")
    };
    more.into_iter().for_each(|(key, value)| body[key] = value);
    body
}

/// The text, finish reason and number of chunks of a streamed choice.
fn gather(chunks: &[Value], index: u64) -> (String, String, usize) {
    let mut text = String::new();
    let mut reason = None;
    let mut count = 0;
    for choice in chunks
        .iter()
        .flat_map(|chunk| chunk["choices"].as_array().expect("a list"))
    {
        if choice["index"] == index {
            assert!(reason.is_none(), "nothing comes after the end");
            count += 1;
            text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
            assert!(
                choice.get("finish_reason").is_some(),
                "always there, mostly null"
            );
            reason = choice["finish_reason"].as_str().map(str::to_owned);
        }
    }
    (text, reason.expect("an end"), count)
}

#[tokio::test]
async fn a_whole_answer_has_every_field() {
    let server = Server::echo().await;
    let answer = server.post(PATH, &ask("hello", json!({}))).await;
    assert_eq!(answer.status, 200);
    let mut body = answer.json();
    let id = body["id"].take();
    assert!(id.as_str().expect("a string").starts_with("chatcmpl-"));
    let expected = json!({
        "id": null, "object": "chat.completion", "created": NOW, "model": "echo",
        "choices": [{
            "index": 0, "message": {"role": "assistant", "content": "hello", "refusal": null},
            "logprobs": null, "finish_reason": "stop",
        }],
        "usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 0}},
    });
    assert_eq!(body, expected);
}

#[tokio::test]
async fn a_stream_opens_with_the_role_and_ends_empty() {
    let server = Server::echo().await;
    let chunks = server
        .post(PATH, &ask("hi", json!({"stream": true})))
        .await
        .chunks();
    let choices: Vec<_> = chunks
        .iter()
        .map(|chunk| chunk["choices"][0].clone())
        .collect();
    let choice = |delta: Value, reason: Value| json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason});
    let expected = [
        choice(json!({"role": "assistant", "content": ""}), Value::Null),
        choice(json!({"content": "h"}), Value::Null),
        choice(json!({"content": "i"}), Value::Null),
        choice(json!({}), json!("stop")),
    ];
    assert_eq!(choices, expected);
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(
            (&chunk["id"], &chunk["created"]),
            (&chunks[0]["id"], &json!(NOW))
        );
        assert!(chunk.get("usage").is_none(), "not asked for");
    }
}

#[tokio::test]
async fn usage_is_the_last_chunk_when_asked_for() {
    let server = Server::echo().await;
    let body = ask(
        "hi",
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    let mut chunks = server.post(PATH, &body).await.chunks();
    let last = chunks.pop().expect("chunks");
    assert_eq!(last["choices"], json!([]));
    let usage = json!({"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(last["usage"], usage);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk.get("usage") == Some(&Value::Null))
    );
}

#[tokio::test]
async fn streamed_equals_whole() {
    let server = Server::echo().await;
    for (text, more) in [
        ("plain", json!({})),
        ("naïve café 😀 ends", json!({})),
        ("cut short 😀", json!({"max_tokens": 12})), // In the middle of the emoji.
        ("one, two, three", json!({"stop": [", th", "zzz"]})),
        (
            "one, two",
            json!({"stop": ", ", "include_stop_str_in_output": true}),
        ),
        ("no stop, th", json!({"stop": ", three"})),
        ("again", json!({"ignore_eos": true, "max_tokens": 14})),
        (
            "again",
            json!({"ignore_eos": true, "max_tokens": 14, "skip_special_tokens": false}),
        ),
    ] {
        let whole = server.post(PATH, &ask(text, more.clone())).await.json();
        let mut streamed = ask(text, more.clone());
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        let chunks = server.post(PATH, &streamed).await.chunks();
        let (streamed, reason, _) = gather(&chunks, 0);
        assert_eq!(
            whole["choices"][0]["message"]["content"], streamed,
            "{text} {more}"
        );
        assert_eq!(
            whole["choices"][0]["finish_reason"], reason,
            "{text} {more}"
        );
        assert_eq!(
            whole["usage"],
            chunks.last().expect("chunks")["usage"],
            "{text} {more}"
        );
    }
}

#[tokio::test]
async fn stop_strings_and_lengths_cut_where_they_should() {
    let server = Server::echo().await;
    for (more, text, reason, completion_tokens) in [
        (json!({"stop": "lo"}), "hel", "stop", 5),
        (json!({"stop": ["x", "l"]}), "he", "stop", 3),
        (
            json!({"stop": "l", "include_stop_str_in_output": true}),
            "hel",
            "stop",
            3,
        ),
        (json!({"max_tokens": 2}), "he", "length", 2),
        (
            json!({"max_tokens": 4, "max_completion_tokens": 3}),
            "hel",
            "length",
            3,
        ),
        (json!({"stop_token_ids": [108]}), "he", "stop", 3),
        (
            json!({"stop": null, "max_tokens": null}),
            "hello",
            "stop",
            6,
        ),
        (json!({"stop": "o wor"}), "hello", "stop", 6), // Held back, then let go.
    ] {
        let body = server.post(PATH, &ask("hello", more.clone())).await.json();
        let choice = &body["choices"][0];
        assert_eq!(choice["message"]["content"], text, "{more}");
        assert_eq!(choice["finish_reason"], reason, "{more}");
        assert_eq!(
            body["usage"]["completion_tokens"], completion_tokens,
            "{more}"
        );
    }
}

#[tokio::test]
async fn n_answers_share_a_prompt() {
    let server = Server::echo().await;
    let body = server.post(PATH, &ask("abc", json!({"n": 3}))).await.json();
    let choices = body["choices"].as_array().expect("a list");
    let indices: Vec<_> = choices
        .iter()
        .map(|choice| choice["index"].as_u64())
        .collect();
    assert_eq!(indices, [Some(0), Some(1), Some(2)]);
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(body["usage"], usage);

    let chunks = server
        .post(PATH, &ask("abc", json!({"n": 2, "stream": true})))
        .await
        .chunks();
    for index in 0..2 {
        assert_eq!(gather(&chunks, index), ("abc".into(), "stop".into(), 5));
    }
}

#[tokio::test]
async fn logprobs_come_with_their_tokens() {
    let server = Server::echo().await;
    let asked = json!({"logprobs": true, "top_logprobs": 2});
    let body = server.post(PATH, &ask("hi", asked.clone())).await.json();
    let top = json!([{"token": "h", "logprob": 0.0, "bytes": [104]}]);
    let first = json!({"token": "h", "logprob": 0.0, "bytes": [104], "top_logprobs": top});
    let content = body["choices"][0]["logprobs"]["content"].clone();
    assert_eq!(content[0], first);
    assert_eq!(
        content.as_array().expect("a list").len(),
        2,
        "the stop token is not sent"
    );

    let mut streamed = ask("hi", asked);
    streamed["stream"] = json!(true);
    let chunks = server.post(PATH, &streamed).await.chunks();
    let logprobs = chunks.iter().filter_map(|chunk| {
        chunk["choices"][0]["logprobs"]["content"]
            .as_array()
            .cloned()
    });
    assert_eq!(Value::from(logprobs.flatten().collect::<Vec<_>>()), content);
}

/// Tokens that a stop string cut away leave no log-probabilities behind.
#[tokio::test]
async fn logprobs_end_where_the_text_does() {
    let server = Server::echo().await;
    for (text, stop, tokens) in [("hello", "lo", 3), ("a😀b!", "!", 6), ("a😀b!", "b", 5)] {
        let mut body = ask(text, json!({"logprobs": true, "stop": stop}));
        for stream in [false, true] {
            body["stream"] = json!(stream);
            let answer = server.post(PATH, &body).await;
            let choices = match stream {
                true => answer
                    .chunks()
                    .into_iter()
                    .map(|chunk| chunk["choices"][0].clone())
                    .collect(),
                false => vec![answer.json()["choices"][0].clone()],
            };
            let count =
                |choice: &Value| choice["logprobs"]["content"].as_array().map_or(0, Vec::len);
            assert_eq!(
                choices.iter().map(count).sum::<usize>(),
                tokens,
                "{text} {stop} {stream}"
            );
        }
    }
}

#[tokio::test]
async fn conversations_are_taken_in_every_form() {
    let server = Server::echo().await;
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let call = json!({
        "id": "x", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}
    });
    for (messages, text) in [
        (json!([{"role": "user", "content": parts}]), "a\nb"),
        (
            json!([{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]),
            "y",
        ),
        (
            json!([
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": null, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "x", "content": "r"},
            ]),
            "r",
        ),
    ] {
        let body = json!({"model": "echo", "messages": messages});
        let answer = server.post(PATH, &body).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], text, "{body}");
    }
}

#[tokio::test]
async fn what_clients_send_besides_is_ignored() {
    let server = Server::echo().await;
    let more = json!({
        "user": "me", "store": true, "metadata": {"a": "b"}, "service_tier": "auto",
        "parallel_tool_calls": true, "reasoning_effort": "low", "verbosity": "low",
        "response_format": {"type": "text"}, "tool_choice": "none", "seed": -5, "n": 1,
        "logit_bias": {"104": 1.5}, "frequency_penalty": -2, "presence_penalty": 2, "top_k": -1,
        "temperature": 2, "top_p": 1, "never_heard_of_it": [1, {"x": null}], "tools": null,
    });
    let answer = server.post(PATH, &ask("hi", more)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    // A request that names no model is for the first one.
    let anonymous = json!({"messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(server.post(PATH, &anonymous).await.json()["model"], "echo");
}

#[tokio::test]
async fn known_fields_out_of_range_are_named() {
    let server = Server::echo().await;
    for (more, param) in [
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 1.5}), "min_p"),
        (json!({"frequency_penalty": 3}), "frequency_penalty"),
        (json!({"presence_penalty": -3}), "presence_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"logit_bias": {"104": 101}}), "logit_bias"),
        (json!({"logit_bias": {"hello": 1}}), "logit_bias"),
        (json!({"logit_bias": {"99999": 1}}), "logit_bias"),
        (json!({"stop_token_ids": [99999]}), "stop_token_ids"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1_000_000_000}), "n"),
        (json!({"best_of": 5}), "best_of"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"min_tokens": 5, "max_tokens": 2}), "min_tokens"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": 5}), "stop"),
        (json!({"seed": 1.5}), "seed"),
        (
            json!({"stream_options": {"include_usage": true}}),
            "stream_options",
        ),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "top_logprobs",
        ),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "robot", "content": "x"}]}),
            "messages[0].role",
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            "messages[0].content",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
        ),
        (json!({"tools": []}), "tools"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (json!({"guided_json": {}}), "guided_json"),
        (json!({"chat_template": "{{ x }}"}), "chat_template"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
        ),
    ] {
        for stream in [false, true] {
            let mut body = ask("hi", more.clone());
            body["stream"] = json!(stream);
            if stream && param == "stream_options" {
                continue;
            }
            let error = server.post(PATH, &body).await.error(400, None);
            assert_eq!(error["type"], "invalid_request_error");
            assert_eq!(error["param"], param, "{more}: {error}");
        }
    }
}

#[tokio::test]
async fn too_long_a_request_is_a_400_also_when_streamed() {
    let server = Server::echo().await;
    for stream in [false, true] {
        for body in [
            ask("hi", json!({"max_tokens": 4095, "stream": stream})),
            ask(&"x".repeat(4096), json!({"stream": stream})),
            ask(&"x".repeat(9999), json!({"stream": stream})),
        ] {
            let error = server
                .post(PATH, &body)
                .await
                .error(400, Some("context_length_exceeded"));
            assert!(
                error["message"]
                    .as_str()
                    .expect("a string")
                    .contains("4096"),
                "{error}"
            );
        }
    }
}

#[tokio::test]
async fn an_unknown_model_is_a_404() {
    let server = Server::echo().await;
    let error = server
        .post(PATH, &ask("hi", json!({"model": "gpt-9"})))
        .await;
    let error = error.error(404, Some("model_not_found"));
    assert!(
        error["message"]
            .as_str()
            .expect("a string")
            .contains("gpt-9")
    );
}
