//! Requests that no honest client sends.

use std::sync::Arc;

use serde_json::json;
use updraft_serve::{EchoEngine, ServeOptions};

use crate::client::Server;

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn bodies_that_are_no_request() {
    let server = Server::echo().await;
    let deep = format!("{{\"messages\": {}", "[".repeat(1_000_000));
    for body in [
        "",
        "{",
        "null",
        "[]",
        "\"text\"",
        "{}",
        "{} {}",
        "{\"messages\": \"hi\"}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"temperature\": NaN}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"temperature\": 1e400}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"n\": 1, \"n\": 2}",
        deep.as_str(),
    ] {
        let error = server.post_text(PATH, body).await.error(400, None);
        assert!(
            error.to_string().len() < 2048,
            "an error is short: {}",
            error.to_string().len()
        );
    }
    // The server is none the worse.
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_a_413() {
    let options = ServeOptions {
        max_body_bytes: 1000,
        ..ServeOptions::default()
    };
    let server = Server::start(Arc::new(EchoEngine::new(["echo"])), options).await;
    let body = json!({"messages": [{"role": "user", "content": "x".repeat(2000)}]});
    server.post(PATH, &body).await.error(413, None);
}

#[tokio::test]
async fn only_json_is_taken() {
    let server = Server::echo().await;
    for headers in ["", "Content-Type: text/plain\r\n"] {
        server
            .request("POST", PATH, headers, Some("{}"))
            .await
            .error(415, None);
    }
}

#[tokio::test]
async fn wrong_paths_and_methods_answer_in_the_same_form() {
    let server = Server::echo().await;
    server.get("/v2/models").await.error(404, None);
    let answer = server.get(PATH).await;
    answer.error(405, None);
    assert_eq!(answer.header("allow"), Some("POST"));
    server
        .request("DELETE", "/v1/models", "", None)
        .await
        .error(405, None);
    let long = format!("/{}", "a".repeat(5000));
    assert!(
        server.get(&long).await.body.len() < 2048,
        "nothing is echoed at length"
    );
}

#[tokio::test]
async fn a_request_keeps_an_honest_id() {
    let server = Server::echo().await;
    let id = |header: &'static str| {
        let server = &server;
        async move {
            let answer = server.request("GET", "/health", header, None).await;
            answer
                .header("x-request-id")
                .expect("always there")
                .to_owned()
        }
    };
    assert_eq!(id("X-Request-Id: mine-1\r\n").await, "mine-1");
    let (first, second) = (id("").await, id("X-Request-Id: with space\r\n").await);
    assert!(first.starts_with("req-") && second.starts_with("req-") && first != second);
}

/// What others were broken by: each is refused with the field's name, and nothing is fetched,
/// loaded, rendered or allocated for it.
#[tokio::test]
async fn known_attacks_are_refused() {
    let server = Server::echo().await;
    let media = |kind: &str, value: serde_json::Value| json!({"messages": [{"role": "user", "content": [{"type": kind, kind: value}]}]});
    let url = json!({"url": "http://169.254.169.254/latest/meta-data"});
    let with = |field: &str, value: serde_json::Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
        body[field] = value;
        body
    };
    for (body, param) in [
        (media("image_url", url.clone()), "messages[0].content[0]"),
        (media("audio_url", url.clone()), "messages[0].content[0]"),
        (media("video_url", url), "messages[0].content[0]"),
        (media("input_audio", json!({})), "messages[0].content[0]"),
        (with("n", json!(1_000_000_000)), "n"),
        (with("n", json!(-1)), "n"),
        (with("best_of", json!(1_000_000_000)), "best_of"),
        (with("prompt_embeds", json!("gASV")), "prompt_embeds"),
        (with("prompt_logprobs", json!(-1)), "prompt_logprobs"),
        (with("prompt_logprobs", json!(i64::MAX)), "prompt_logprobs"),
        (
            with("truncate_prompt_tokens", json!(i64::MIN)),
            "truncate_prompt_tokens",
        ),
        (
            with("allowed_token_ids", json!([-1])),
            "allowed_token_ids[0]",
        ),
        (
            with("structured_outputs", json!({"regex": "(a+)+$"})),
            "structured_outputs.regex",
        ),
        (with("chat_template", json!("{{ 1 }}")), "chat_template"),
        (with("guided_regex", json!("(a+)+$")), "guided_regex"),
        (with("max_tokens", json!(i64::MAX)), "max_tokens"),
        (with("min_tokens", json!(i64::MAX)), "min_tokens"),
        (with("top_logprobs", json!(1_000_000)), "top_logprobs"),
        (with("stop_token_ids", json!([-1])), "stop_token_ids[0]"),
        (with("stop", json!(vec!["x"; 1000])), "stop"),
        (with("logit_bias", json!({"-1": 1})), "logit_bias"),
        (with("tools", json!([{"type": "x"}])), "tools"),
        (with("messages", json!([])), "messages"),
    ] {
        let error = server.post(PATH, &body).await.error(400, None);
        assert_eq!(error["param"], param, "{body}: {error}");
    }
    // A template's own variables can be set, the engine's helpers and limits cannot.
    for variables in [
        json!({"messages": []}),
        json!({"tokenize": true, "add_generation_prompt": [], "raise_exception": 1}),
        json!({"bos_token": "x".repeat(1000)}),
    ] {
        let status = server
            .post(PATH, &with("chat_template_kwargs", variables.clone()))
            .await
            .status;
        assert!([200, 400].contains(&status), "{variables}: {status}");
    }
    // llama.cpp's own, which once read outside of its memory.
    for more in [
        "n_discard",
        "n_keep",
        "id_slot",
        "n_indent",
        "t_max_predict_ms",
    ] {
        let mut body = json!({"prompt": "x", "n_predict": 2});
        body[more] = json!(-1_000_000_000);
        assert_eq!(
            server.post("/completion", &body).await.status,
            200,
            "{more}"
        );
    }
    for body in [
        json!({"prompt": []}),
        json!({"prompt": ""}),
        json!({"prompt": [[]]}),
        json!({"prompt": [1, "x"]}),
        json!({"prompt": [-1]}),
        json!({"prompt": vec!["x"; 10_000]}),
        json!({"prompt": "x", "n": 100, "logprobs": 1_000_000}),
        json!({"prompt": "x", "suffix": "y"}),
    ] {
        server.post("/v1/completions", &body).await.error(400, None);
    }
    assert_eq!(server.get("/health").await.status, 200);
}

/// The error never repeats what was sent at length.
#[tokio::test]
async fn errors_do_not_amplify() {
    let server = Server::echo().await;
    let long = "x".repeat(1 << 20);
    for body in [
        json!({"messages": [{"role": long, "content": "x"}]}),
        json!({"model": long, "messages": [{"role": "user", "content": "x"}]}),
        json!({"messages": [{"role": "user", "content": "x"}], "temperature": long}),
        json!({"messages": [{"role": "user", "content": "x"}], "logit_bias": {long.as_str(): 1}}),
    ] {
        let answer = server.post(PATH, &body).await;
        assert!([400, 404].contains(&answer.status));
        assert!(answer.body.len() < 4096, "{}", answer.body.len());
    }
}
