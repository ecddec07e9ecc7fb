//! vLLM's fields besides OpenAI's.

use serde_json::{Value, json};

use crate::client::Server;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn ask(text: &str, more: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": text}]});
    for (key, value) in more.as_object().expect("fields") {
        body[key] = value.clone();
    }
    body
}

#[tokio::test]
async fn a_long_prompt_is_cut_at_the_side_asked_for() {
    let server = Server::echo().await;
    for (more, text) in [
        (json!({"truncate_prompt_tokens": 3}), "llo"),
        (
            json!({"truncate_prompt_tokens": 3, "truncation_side": "left"}),
            "llo",
        ),
        (
            json!({"truncate_prompt_tokens": 3, "truncation_side": "right"}),
            "hel",
        ),
        (json!({"truncate_prompt_tokens": 9}), "hello"),
        (json!({"truncate_prompt_tokens": null}), "hello"),
    ] {
        let answer = server.post(CHAT, &ask("hello", &more)).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], text, "{more}");
        let mut body = more.clone();
        body["prompt"] = json!("hello");
        body["echo"] = json!(true);
        let answer = server.post(TEXT, &body).await.json();
        assert_eq!(
            answer["choices"][0]["text"],
            format!("{text}{text}"),
            "{more}"
        );
    }
    // To the context, less one token to answer with.
    let body = ask(&"x".repeat(5000), &json!({"truncate_prompt_tokens": -1}));
    let answer = server.post(CHAT, &body).await.json();
    assert_eq!(answer["usage"]["prompt_tokens"], 4095);
}

#[tokio::test]
async fn token_ids_are_told_when_asked_for() {
    let server = Server::echo().await;
    let more = json!({"return_token_ids": true});
    let whole = server.post(CHAT, &ask("hi", &more)).await.json();
    assert_eq!(whole["prompt_token_ids"], json!([104, 105]));
    assert_eq!(whole["choices"][0]["token_ids"], json!([104, 105]));
    let more = json!({"return_token_ids": true, "stream": true});
    let chunks = server.post(CHAT, &ask("hi", &more)).await.chunks();
    assert_eq!(chunks[0]["prompt_token_ids"], json!([104, 105]));
    let ids = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array());
    assert_eq!(ids.flatten().cloned().collect::<Vec<_>>(), [104, 105]);
    let body = json!({"prompt": "hi", "return_token_ids": true});
    let choice = server.post(TEXT, &body).await.json()["choices"][0].clone();
    assert_eq!(
        (&choice["token_ids"], &choice["prompt_token_ids"]),
        (&json!([104, 105]), &json!([104, 105]))
    );
    let plain = server.post(CHAT, &ask("hi", &json!({}))).await.json();
    assert!(
        plain.get("prompt_token_ids").is_none() && plain["choices"][0].get("token_ids").is_none()
    );
}

#[tokio::test]
async fn a_prompts_logprobs_come_by_token_id() {
    let server = Server::echo().await;
    let expected = json!([null, {"105": {"logprob": 0.0, "rank": 1, "decoded_token": "i"}}]);
    let answer = server
        .post(CHAT, &ask("hi", &json!({"prompt_logprobs": 1})))
        .await
        .json();
    assert_eq!(answer["prompt_logprobs"], expected);
    let body = json!({"prompt": "hi", "prompt_logprobs": 0});
    let answer = server.post(TEXT, &body).await.json();
    assert_eq!(answer["choices"][0]["prompt_logprobs"], expected);
    assert_eq!(answer["choices"][0]["text"], "hi", "nothing is echoed");
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn usage_comes_with_every_chunk_when_asked_for() {
    let server = Server::echo().await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let more = json!({"stream": true, "stream_options": options});
    let chunks = server.post(CHAT, &ask("hey", &more)).await.chunks();
    let told = |chunk: &Value| chunk["usage"]["completion_tokens"].as_u64();
    let counts: Vec<_> = chunks.iter().skip(1).map(told).collect();
    assert_eq!(counts, [Some(1), Some(2), Some(3), Some(4), Some(4)]);
    let body = json!({"prompt": "hey", "stream": true, "stream_options": options});
    let chunks = server.post(TEXT, &body).await.chunks();
    let counts: Vec<_> = chunks.iter().map(told).collect();
    assert_eq!(counts, [Some(1), Some(2), Some(3), Some(4), Some(4)]);
    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = server.post(CHAT, &ask("hey", &more)).await.chunks();
    assert!(chunks[1]["usage"].is_null() && told(chunks.last().expect("some")) == Some(4));
}

#[tokio::test]
async fn an_answer_can_be_named_and_its_beginning_repeated() {
    let server = Server::echo().await;
    for (id, kept) in [("mine", true), ("with space", false), ("", false)] {
        let answer = server
            .post(CHAT, &ask("hi", &json!({"request_id": id})))
            .await
            .json();
        let name = answer["id"].as_str().expect("a string");
        assert_eq!(name == format!("chatcmpl-{id}"), kept, "{name}");
    }
    let begun = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "once"}]);
    let mut body = json!({"messages": begun, "echo": true, "continue_final_message": true});
    let whole = server.post(CHAT, &body).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], "onceonce");
    body["stream"] = json!(true);
    let chunks = server.post(CHAT, &body).await.chunks();
    let text = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(text.collect::<String>(), "onceonce");
}

#[tokio::test]
async fn what_cannot_be_is_named() {
    let server = Server::echo().await;
    for (more, param) in [
        (json!({"prompt_logprobs": -1}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 1_000_000_000}), "prompt_logprobs"),
        (
            json!({"prompt_logprobs": 1, "stream": true}),
            "prompt_logprobs",
        ),
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [99999]}), "allowed_token_ids"),
        (json!({"logprob_token_ids": [99999]}), "logprob_token_ids"),
        (json!({"bad_words": [""]}), "bad_words"),
        (json!({"bad_words": vec!["x"; 2000]}), "bad_words"),
        (
            json!({"truncate_prompt_tokens": 0}),
            "truncate_prompt_tokens",
        ),
        (
            json!({"truncate_prompt_tokens": -2}),
            "truncate_prompt_tokens",
        ),
        (json!({"truncation_side": "middle"}), "truncation_side"),
        (
            json!({"structured_outputs": {"regex": "a"}}),
            "structured_outputs.regex",
        ),
        (
            json!({"structured_outputs": {"json": 5}}),
            "structured_outputs.json",
        ),
        (json!({"add_special_tokens": true}), "add_special_tokens"),
    ] {
        let error = server.post(CHAT, &ask("hi", &more)).await.error(400, None);
        assert_eq!(error["param"], param, "{more}: {error}");
    }
}

/// A stop string counts if it ends after `min_tokens`, wherever it begins: as with vLLM the text
/// ends where it begins, although more tokens were made.
#[tokio::test]
async fn least_tokens_come_before_the_end_of_any_stop_string() {
    let server = Server::echo().await;
    for stream in [false, true] {
        let text = async |stop: &str, min_tokens: u32| {
            let more = json!({"stop": stop, "min_tokens": min_tokens, "max_tokens": 9});
            let mut body = ask("banana", &more);
            body["stream"] = json!(stream);
            let answer = server.post(CHAT, &body).await;
            if !stream {
                let text = &answer.json()["choices"][0]["message"]["content"];
                return text.as_str().expect("text").to_owned();
            }
            let chunks = answer.chunks().into_iter();
            let text =
                |chunk: Value| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned());
            chunks.filter_map(text).collect()
        };
        for (stop, min_tokens, expected) in [
            ("a", 0, "b"),
            ("a", 1, "b"),
            ("a", 2, "ban"),
            ("a", 4, "banan"),
            ("na", 2, "ba"),
            ("na", 3, "ba"),
            ("na", 4, "bana"),
            ("na", 5, "bana"),
            ("na", 6, "banana"),
            ("anan", 4, "b"),
        ] {
            assert_eq!(
                text(stop, min_tokens).await,
                expected,
                "{stop} {min_tokens}"
            );
        }
    }
}

/// A prompt may fill the context if nothing is to follow it.
#[tokio::test]
async fn a_prompt_alone_may_fill_the_context() {
    let server = Server::echo().await;
    let full = |max_tokens: u32| json!({"prompt": "x".repeat(4096), "max_tokens": max_tokens});
    let answer = server.post(TEXT, &full(0)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let usage = answer.json()["usage"].clone();
    assert_eq!(usage["prompt_tokens"], 4096);
    let code = Some("context_length_exceeded");
    server.post(TEXT, &full(1)).await.error(400, code);
    let longer = json!({"prompt": "x".repeat(4097), "max_tokens": 0});
    server.post(TEXT, &longer).await.error(400, code);
}

/// Streams tell what their prompt was in the first chunk of each choice.
#[tokio::test]
async fn streamed_texts_tell_their_prompts_ids() {
    let server = Server::echo().await;
    for echo in [false, true] {
        let body = json!({
            "prompt": ["ab", "c"], "n": 2, "stream": true, "return_token_ids": true, "echo": echo,
        });
        let chunks = server.post(TEXT, &body).await.chunks();
        for (index, ids) in [
            (0, [97, 98].as_slice()),
            (1, &[97, 98]),
            (2, &[99]),
            (3, &[99]),
        ] {
            let of_choice = chunks.iter().map(|chunk| &chunk["choices"][0]);
            let mut of_choice = of_choice.filter(|choice| choice["index"] == index);
            let first = of_choice.next().expect("a chunk");
            assert_eq!(first["prompt_token_ids"], json!(ids), "{first}");
            assert_eq!(first["text"] != "", echo);
            assert!(of_choice.all(|choice| choice["prompt_token_ids"].is_null()));
        }
    }
}

/// The four bytes of one character are four tokens, all of one character's place.
#[tokio::test]
async fn offsets_count_characters_not_their_parts() {
    let server = Server::echo().await;
    for stream in [false, true] {
        let body = json!({"prompt": "a\u{1F600}b", "logprobs": 0, "stream": stream});
        let answer = server.post(TEXT, &body).await;
        let offsets: Vec<Value> = match stream {
            false => answer.json()["choices"][0]["logprobs"]["text_offset"]
                .as_array()
                .expect("offsets")
                .clone(),
            true => {
                let chunks = answer.chunks();
                let offsets = chunks
                    .iter()
                    .filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array());
                offsets.flatten().cloned().collect()
            }
        };
        assert_eq!(json!(offsets), json!([0, 1, 2, 2, 2, 2]), "stream {stream}");
    }
}
