//! What a request may hold before its first token is computed, and how several of its completions
//! get there together.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use updraft_model::Threads;
use updraft_serve::{EchoEngine, EngineOptions, ModelEngine, ModelSource, ServeOptions};

use crate::client::{Answer, Server};
use crate::load::{ask, model_files, write};
use crate::slow::closed_window;

const CHAT: &str = "/v1/chat/completions";

async fn tiny(options: &EngineOptions) -> Server {
    tiny_with(options, ServeOptions::default()).await
}

async fn tiny_with(options: &EngineOptions, serve: ServeOptions) -> Server {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), &model_files());
    let source = ModelSource::folder(folder.path());
    let engine = ModelEngine::load("tiny", &source, &[], &Threads::single(), options).await;
    let engine = Arc::new(engine.expect("it loads"));
    Server::start(engine, serve).await
}

/// A number from `/metrics`.
async fn metric(server: &Server, name: &str) -> f64 {
    let metrics = server.get("/metrics").await.body;
    let start = format!("vllm:{name}{{model_name=\"tiny\",engine=\"0\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
    line.expect("the metric").parse().expect("a number")
}

/// Completions that come one after the other get one forward pass each; those that come together
/// share theirs.
#[tokio::test]
async fn prompts_of_one_request_share_their_steps() {
    let server = tiny(&EngineOptions::default()).await;
    let prompts: Vec<Value> = (0..64).map(|id| json!([id, id + 1, id + 2])).collect();
    let body = json!({"prompt": prompts, "max_tokens": 1, "temperature": 0, "ignore_eos": true});
    let answer = server.post("/v1/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choices = answer.json()["choices"].as_array().map(Vec::len);
    assert_eq!(choices, Some(64));
    let steps = metric(&server, "iteration_tokens_total_count").await;
    assert!(steps <= 4.0, "{steps} steps");
    let body = json!({"prompt": "x", "n": 64, "max_tokens": 2, "ignore_eos": true});
    assert_eq!(server.post("/v1/completions", &body).await.status, 200);
    let more = metric(&server, "iteration_tokens_total_count").await - steps;
    assert!(more <= 8.0, "{more} steps for 64 choices of two tokens");
}

/// More choices than the queue has room for are a matter of waiting, not of asking for less.
#[tokio::test]
async fn what_alone_exceeds_the_queue_is_taken_when_nothing_waits() {
    let options = EngineOptions {
        max_num_seqs: 1,
        max_queued_requests: 2,
        max_queued_tokens: 50,
        ..EngineOptions::default()
    };
    let server = tiny(&options).await;
    let body = json!({"prompt": "x".repeat(40), "n": 8, "max_tokens": 2});
    for _ in 0..2 {
        let answer = server.post("/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_eq!(answer.json()["usage"]["prompt_tokens"], 40);
    }
    // Beside others that wait it is refused as a whole, and nothing of it stays.
    let mut long = body.clone();
    long["max_tokens"] = json!(200);
    long["ignore_eos"] = json!(true);
    let headers = "Content-Type: application/json\r\n";
    let long = long.to_string();
    let held = server.send("POST", "/v1/completions", headers, Some(&long));
    let _held = held.await;
    while metric(&server, "num_requests_waiting").await < 7.0 {}
    let answer = server.post("/v1/completions", &body).await;
    answer.error(429, Some("rate_limit_exceeded"));
    assert!(metric(&server, "num_requests_waiting").await <= 7.0);
}

/// Every list and text of a request is bounded, and says so by its name and limit before anything
/// is made of it.
#[tokio::test]
async fn lists_and_texts_are_bounded() {
    let server = Server::echo().await;
    let biases = |count: u32| (0..count).map(|id| (id.to_string(), json!(1)));
    let biases = |count| biases(count).collect::<serde_json::Map<_, _>>();
    let strings = |count, bytes| json!(vec!["x".repeat(bytes); count]);
    for (field, value, limit) in [
        ("stop_token_ids", json!(vec![1; 1025]), "1024"),
        ("logprob_token_ids", json!(vec![1; 21]), "20"),
        ("allowed_token_ids", json!(vec![1; (1 << 18) + 1]), "262144"),
        ("logit_bias", json!(biases(1025)), "1024"),
        ("bad_words", strings(1025, 1), "1024"),
        ("bad_words", strings(1, 129), "128"),
        ("stop", strings(5, 1), "4"),
        ("stop", strings(1, 1025), "1024"),
        ("cache_salt", json!("x".repeat(1025)), "1024"),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
        body[field] = value;
        let error = server.post(CHAT, &body).await.error(400, None);
        assert_eq!(error["param"], field, "{error}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(limit), "{field}: {message}");
    }
    for (field, value) in [
        ("stop", strings(17, 1)),
        ("stop", strings(1, 1025)),
        ("response_fields", strings(65, 1)),
        ("logit_bias", json!(vec![json!([1, 1]); 1025])),
        ("logit_bias", json!([["x".repeat(129), 1]])),
    ] {
        let mut body = json!({"prompt": "x"});
        body[field] = value;
        let error = server.post("/completion", &body).await.error(400, None);
        assert_eq!(error["param"], field, "{error}");
    }
    // What repeats itself counts once, and as much as may be is taken.
    let mut ids: Vec<u32> = vec![1; 1000];
    ids.extend([2; 24]);
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "stop_token_ids": ids,
        "bad_words": vec!["yz"; 1024], "stop": strings(4, 1024), "max_tokens": 1,
    });
    assert_eq!(server.post(CHAT, &body).await.status, 200);
}

/// What is kept as it comes takes many times as much memory as JSON: it is counted before any of
/// it is taken, and so is what would be made of it.
#[tokio::test]
async fn what_a_body_would_grow_to_is_bounded() {
    let server = Server::echo().await;
    let many = |value: &str| format!("[{0}{value}]", format!("{value},").repeat(1 << 18));
    let text = |body: &str, value: &str| body.replace("MANY", &many(value));
    for (path, body, value, param) in [
        (
            CHAT,
            r#"{"messages": [{"role": "user", "z": MANY}]}"#,
            "0",
            "messages[0].z",
        ),
        (
            CHAT,
            r#"{"messages": [{"role": "user", "content": MANY}]}"#,
            "{}",
            "messages[0].content",
        ),
        (
            CHAT,
            r#"{"chat_template_kwargs": {"a": MANY}}"#,
            "0",
            "chat_template_kwargs.a",
        ),
        (
            CHAT,
            r#"{"response_format": {"schema": MANY}}"#,
            "0",
            "response_format.schema",
        ),
        (
            CHAT,
            r#"{"structured_outputs": {"json": MANY}}"#,
            "0",
            "structured_outputs.json",
        ),
        (CHAT, r#"{"tool_choice": MANY}"#, "0", "tool_choice"),
        ("/tokenize", r#"{"messages": MANY}"#, "{}", "messages"),
        (
            "/completion",
            r#"{"prompt": "x", "json_schema": MANY}"#,
            "0",
            "json_schema",
        ),
        (
            "/completion",
            r#"{"prompt": [MANY, MANY]}"#,
            "[0]",
            "prompt[1]",
        ),
        (
            "/v1/responses",
            r#"{"input": "x", "metadata": {"a": MANY}}"#,
            "0",
            "metadata.a",
        ),
        (
            "/v1/responses",
            r#"{"input": "x", "text": {"format": MANY}}"#,
            "0",
            "text.format",
        ),
        ("/v1/responses", r#"{"input": MANY}"#, "{}", "input"),
        ("/detokenize", r#"{"tokens": MANY}"#, "0", "tokens"),
    ] {
        let error = server
            .post_text(path, &text(body, value))
            .await
            .error(400, None);
        let named = error["param"].as_str().expect("a field");
        assert!(named.starts_with(param), "{path} {body}: {error}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains("are possible"), "{path} {body}: {message}");
    }
    // Fields that nobody knows are skipped, however much they hold.
    let unknown = r#"{"messages": [{"role": "user", "content": "x"}], "unknown": MANY}"#;
    let answer = server.post_text(CHAT, &text(unknown, "0")).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    for field in ["with_pieces", "return_token_strs"] {
        let mut body = json!({"content": "x".repeat((1 << 18) + 1)});
        assert_eq!(
            server.post("/tokenize", &body).await.json()["count"],
            (1 << 18) + 1
        );
        body[field] = json!(true);
        let error = server.post("/tokenize", &body).await.error(400, None);
        assert_eq!(error["param"], field, "{error}");
    }
}

/// An answer that is told whole is bounded by what it may tell; a stream tells it bit by bit.
#[tokio::test]
async fn told_logprobs_are_bounded() {
    let server = Server::echo().await;
    let chat = |n: u32, max_tokens: u32| {
        json!({
            "messages": [{"role": "user", "content": "x"}], "n": n, "max_tokens": max_tokens,
            "logprobs": true, "top_logprobs": 20,
        })
    };
    let text = |n: u32, max_tokens: u32| json!({"prompt": "x", "n": n, "max_tokens": max_tokens, "logprobs": 20});
    let prompts =
        json!({"prompt": vec![vec![1; 4000]; 128], "prompt_logprobs": 20, "max_tokens": 1});
    for (path, body) in [
        (CHAT, chat(128, 4000)),
        ("/v1/completions", text(128, 4000)),
        ("/v1/completions", prompts),
        (
            "/completion",
            json!({"prompt": vec!["x"; 128], "n_probs": 20, "n_predict": 4000}),
        ),
    ] {
        let error = server.post(path, &body).await.error(400, None);
        assert_eq!(error["param"], "logprobs", "{path}: {error}");
    }
    let mut streamed = chat(128, 4000);
    streamed["stream"] = json!(true);
    assert_eq!(server.post(CHAT, &streamed).await.chunks().len(), 3 * 128);
    assert_eq!(server.post(CHAT, &chat(128, 3000)).await.status, 200);
}

/// All bodies together take so much and no more, however slowly they come.
#[tokio::test]
async fn bodies_share_their_room() {
    let options = ServeOptions {
        max_body_bytes: 8_000,
        max_bytes_in_flight: 10_000,
        ..ServeOptions::default()
    };
    let server = Server::start(Arc::new(EchoEngine::new(["echo"])), options).await;
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "user": "x".repeat(6000),
    });
    let headers = "Content-Type: application/json\r\n";
    // It says 8,000 and sends 6,000 of them.
    let mut slow = tokio::net::TcpStream::connect(server.addr)
        .await
        .expect("it listens");
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: 8000\r\n\r\n{}",
        " ".repeat(6000)
    );
    slow.write_all(head.as_bytes()).await.expect("sent");
    let refused = until_status(&server, &body, 429).await;
    refused.error(429, Some("rate_limit_exceeded"));
    assert!(refused.header("retry-after").is_some());
    drop(slow);
    until_status(&server, &body, 200).await; // Its room is free again.
    // Ten of them one after the other need no more room than one.
    for _ in 0..10 {
        assert_eq!(server.post(CHAT, &body).await.status, 200);
    }
}

/// The first answer with this status; the server sees what other clients do a moment later.
async fn until_status(server: &Server, body: &Value, status: u16) -> Answer {
    for _ in 0..500 {
        let answer = server.post(CHAT, body).await;
        if answer.status == status {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never {status}");
}

/// What cannot fit is refused for its size, before its tokens are counted: the number told is the
/// fewest that it can have.
#[tokio::test]
async fn texts_that_cannot_fit_are_not_tokenized() {
    let server = Server::echo().await;
    // The echo's longest token has 7 bytes, and normalizing may leave a third of a text.
    let text = "x".repeat(3 * 7 * 5000);
    for (path, body) in [
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": text}]}),
        ),
        ("/v1/completions", json!({"prompt": ["x", text]})),
        ("/v1/responses", json!({"input": text})),
        ("/v1/embeddings", json!({"input": text})),
        ("/completion", json!({"prompt": text})),
    ] {
        let code = Some("context_length_exceeded");
        let error = server.post(path, &body).await.error(400, code);
        assert_eq!(error["n_prompt_tokens"], 5000, "{path}: {error}");
    }
    let cut = json!({"prompt": text, "truncate_prompt_tokens": 5, "max_tokens": 1});
    let usage = server.post("/v1/completions", &cut).await.json()["usage"].clone();
    assert_eq!(usage["prompt_tokens"], 5, "unless it is to be cut: {usage}");
    // Whether it is to be cut or only counted: a tokenizer takes much more than the text.
    let text = "x".repeat((4 << 20) + 1);
    let messages = json!([{"role": "user", "content": text}]);
    for (path, body, param) in [
        (
            CHAT,
            json!({"messages": messages, "truncate_prompt_tokens": 5}),
            "messages",
        ),
        (
            "/v1/completions",
            json!({"prompt": ["x", text], "truncate_prompt_tokens": 5}),
            "prompt",
        ),
        ("/tokenize", json!({"content": text}), "prompt"),
        ("/tokenize", json!({"messages": messages}), "messages"),
        (
            "/chat/completions/input_tokens",
            json!({"messages": messages}),
            "messages",
        ),
    ] {
        let error = server.post(path, &body).await.error(400, None);
        assert_eq!(error["param"], param, "{path}: {error}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains("4194304"), "{path}: {message}");
    }
    // Too many are refused before the first is looked at.
    let many = json!({"prompt": vec![""; 200]});
    let error = server.post("/v1/completions", &many).await.error(400, None);
    assert_eq!(error["param"], "n");
}

/// What brings others to their knees, against an engine that computes: much of everything, floods
/// of ids, and clients that take nothing. It ends, nothing of it stays, and the next answer is what
/// it was before.
#[tokio::test]
async fn a_real_engine_withstands_what_others_do_not() {
    let serve = ServeOptions {
        write_timeout: Duration::from_millis(100),
        ..ServeOptions::default()
    };
    let server = tiny_with(&EngineOptions::default(), serve).await;
    let expected = ask(&server, "tiny").await;

    let much = json!({
        "messages": [{"role": "user", "content": "x"}], "n": 32, "logprobs": true,
        "top_logprobs": 20, "max_tokens": 100, "ignore_eos": true,
    });
    let answer = server.post(CHAT, &much).await.json();
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 32);
    for choice in choices {
        let content = choice["logprobs"]["content"].as_array().expect("a list");
        assert!(content.len() == 100 && content[99]["top_logprobs"][19].is_object());
    }

    for (field, value) in [
        ("stop_token_ids", json!(vec![1; 100_000])),
        ("logprob_token_ids", json!(vec![1; 100_000])),
        ("allowed_token_ids", json!(vec![1; 1_000_000])),
        ("bad_words", json!(vec!["x"; 100_000])),
        ("stop", json!(vec!["x"; 100_000])),
        ("stop_token_ids", json!([u32::MAX])),
        ("allowed_token_ids", json!([258])),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
        body[field] = value;
        let error = server.post(CHAT, &body).await.error(400, None);
        assert_eq!(error["param"], field, "{error}");
    }

    let (mut client, _open, connection) = closed_window(&server).await;
    let mut answers = Vec::new();
    for _ in 0..8 {
        let request = axum::http::Request::post(format!("http://{}{CHAT}", server.addr))
            .header("content-type", "application/json")
            .body(())
            .expect("a request");
        client = client.ready().await.expect("room");
        let (answer, mut sending) = client.send_request(request, false).expect("room");
        let mut endless = much.clone();
        endless["stream"] = json!(true);
        endless["n"] = json!(2);
        let sent = sending.send_data(endless.to_string().into(), true);
        sent.expect("it is sent");
        answers.push(answer.await.expect("a head"));
    }
    for _ in 0..1000 {
        let running = metric(&server, "num_requests_running").await;
        if running + metric(&server, "kv_cache_usage_perc").await == 0.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(metric(&server, "num_requests_running").await, 0.0);
    assert_eq!(metric(&server, "num_requests_waiting").await, 0.0);
    assert_eq!(metric(&server, "kv_cache_usage_perc").await, 0.0);
    assert_eq!(ask(&server, "tiny").await, expected, "as before");
    connection.abort();
}
