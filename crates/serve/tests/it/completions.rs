//! Text completions over an engine that says back what it is told.

use serde_json::json;

use crate::client::{NOW, Server};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_whole_answer_has_every_field() {
    let server = Server::echo().await;
    let body = json!({"model": "echo", "prompt": "hello"});
    let mut answer = server.post(PATH, &body).await.json();
    assert!(
        answer["id"]
            .take()
            .as_str()
            .expect("a string")
            .starts_with("cmpl-")
    );
    let expected = json!({
        "id": null, "object": "text_completion", "created": NOW, "model": "echo",
        "choices": [{"index": 0, "text": "hello", "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 0}},
    });
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn prompts_come_in_four_forms() {
    let server = Server::echo().await;
    for (prompt, texts) in [
        (json!("ab"), vec!["ab"]),
        (json!(["ab", "c"]), vec!["ab", "c"]),
        (json!([97, 98]), vec!["ab"]),
        (json!([[97, 98], [99]]), vec!["ab", "c"]),
    ] {
        let body = json!({"model": "echo", "prompt": prompt, "n": 2});
        let answer = server.post(PATH, &body).await.json();
        let choices = answer["choices"].as_array().expect("a list");
        let found: Vec<_> = choices
            .iter()
            .map(|choice| choice["text"].as_str())
            .collect();
        let expected: Vec<_> = texts.iter().flat_map(|text| [Some(*text); 2]).collect();
        assert_eq!(found, expected, "{prompt}");
        let prompt_tokens: usize = texts.iter().map(|text| text.len()).sum();
        assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens, "{prompt}");
    }
}

#[tokio::test]
async fn sixteen_tokens_are_the_default() {
    let server = Server::echo().await;
    let prompt = "a prompt of more than sixteen bytes";
    let answer = server.post(PATH, &json!({"prompt": prompt})).await.json();
    assert_eq!(answer["choices"][0]["text"], prompt[..16]);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn echo_puts_the_prompt_before_the_text() {
    let server = Server::echo().await;
    for (prompt, more, text) in [
        (json!("ab"), json!({}), "abab"),
        (json!([97, 98]), json!({"max_tokens": 1}), "aba"),
        (json!("ab"), json!({"max_tokens": 0}), "ab"),
        (json!("ab"), json!({"logprobs": 1}), "abab"),
    ] {
        let mut body = json!({"prompt": prompt, "echo": true});
        for (key, value) in more.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let answer = server.post(PATH, &body).await.json();
        assert_eq!(answer["choices"][0]["text"], text, "{body}");
        body["stream"] = json!(true);
        let chunks = server.post(PATH, &body).await.chunks();
        let texts = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["text"].as_str());
        assert_eq!(texts.collect::<String>(), text, "{body}");
    }
}

#[tokio::test]
async fn logprobs_run_in_parallel_and_cover_the_echo() {
    let server = Server::echo().await;
    let mut body = json!({"prompt": "hé", "echo": true, "logprobs": 1, "max_tokens": 1});
    let answer = server.post(PATH, &body).await.json();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(
        logprobs["tokens"],
        json!(["h", "\u{fffd}", "\u{fffd}", "h"])
    );
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 2]));
    assert_eq!(logprobs["token_logprobs"], json!([0.0, 0.0, 0.0, 0.0]));
    assert_eq!(logprobs["top_logprobs"][0], json!({}));
    assert_eq!(logprobs["top_logprobs"][3], json!({"h": 0.0}));

    body["stream"] = json!(true);
    let chunks = server.post(PATH, &body).await.chunks();
    let offsets = chunks.iter().filter_map(|chunk| {
        chunk["choices"][0]["logprobs"]["text_offset"]
            .as_array()
            .cloned()
    });
    assert_eq!(offsets.flatten().collect::<Vec<_>>(), [0, 1, 2, 2]);
}

#[tokio::test]
async fn bad_prompts_are_named() {
    let server = Server::echo().await;
    for prompt in [
        json!(""),
        json!([]),
        json!([[]]),
        json!(["a", ""]),
        json!([-1]),
        json!([99999]),
        json!({"text": "a"}),
        json!(null),
        json!([1, "a"]),
    ] {
        let error = server
            .post(PATH, &json!({"prompt": prompt}))
            .await
            .error(400, None);
        let param = error["param"].as_str().expect("a field");
        assert_eq!(param.split('[').next(), Some("prompt"), "{prompt}: {error}");
    }
    let many = vec!["a"; 200];
    assert_eq!(
        server
            .post(PATH, &json!({"prompt": many}))
            .await
            .error(400, None)["param"],
        "n"
    );
    for (field, value) in [
        ("logprobs", json!(21)),
        ("suffix", json!("x")),
        ("max_tokens", json!(9999)),
    ] {
        let mut body = json!({"prompt": "a"});
        body[field] = value;
        assert_eq!(server.post(PATH, &body).await.status, 400, "{field}");
    }
}
