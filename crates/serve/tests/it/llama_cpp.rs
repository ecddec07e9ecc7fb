//! llama.cpp's own paths.

use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use crate::client::Server;

const PATH: &str = "/completion";

/// The data of a stream that just ends.
fn chunks(body: &str) -> Vec<Value> {
    let data = body.split("\n\n").filter(|frame| !frame.is_empty());
    data.map(|frame| {
        let data = frame.strip_prefix("data: ").expect("only data frames");
        serde_json::from_str(data).expect("JSON")
    })
    .collect()
}

#[tokio::test]
async fn a_prompt_is_continued_whole_and_streamed_alike() {
    let server = Server::echo().await;
    let body = json!({"prompt": "a\nb", "n_predict": 5, "n_probs": 1, "return_tokens": true});
    let whole = server.post(PATH, &body).await.json();
    for (field, expected) in [
        ("content", json!("a\nb")),
        ("tokens", json!([97, 10, 98])),
        ("stop", json!(true)),
        ("stop_type", json!("eos")),
        ("stopping_word", json!("")),
        ("truncated", json!(false)),
        ("has_new_line", json!(true)),
        ("prompt", json!("a\nb")),
        ("tokens_predicted", json!(4)),
        ("tokens_evaluated", json!(3)),
    ] {
        assert_eq!(whole[field], expected, "{field}");
    }
    assert_eq!(whole["generation_settings"]["n_predict"], 5);
    let timings = whole["timings"].as_object().expect("an object");
    assert!(
        timings
            .values()
            .all(|value| value.as_f64().is_some_and(|value| value >= 0.0))
    );
    assert_eq!(
        (&timings["prompt_n"], &timings["predicted_n"]),
        (&json!(3), &json!(4))
    );
    let first = json!({"id": 97, "token": "a", "logprob": 0.0, "bytes": [97]});
    let mut expected = first.clone();
    expected["top_logprobs"] = json!([first]);
    assert_eq!(whole["completion_probabilities"][0], expected);

    let mut streamed = body;
    streamed["stream"] = json!(true);
    let answer = server.post(PATH, &streamed).await;
    let mut chunks = chunks(&answer.body);
    let last = chunks.pop().expect("an end");
    assert_eq!(
        (&last["stop"], &last["stop_type"], &last["content"]),
        (&json!(true), &json!("eos"), &json!(""))
    );
    let text = chunks.iter().filter_map(|chunk| chunk["content"].as_str());
    assert_eq!(text.collect::<String>(), "a\nb");
    for chunk in &chunks {
        assert_eq!(chunk["tokens"].as_array().map(Vec::len), Some(1), "{chunk}");
        assert_eq!(
            chunk["completion_probabilities"].as_array().map(Vec::len),
            Some(1),
            "{chunk}"
        );
    }
}

#[tokio::test]
async fn prompts_are_texts_ids_and_mixtures() {
    let server = Server::echo().await;
    for (prompt, texts) in [
        (json!("ab"), vec!["ab"]),
        (json!([97, 98]), vec!["ab"]),
        (json!([97, "b", 99]), vec!["abc"]),
        (json!({"prompt_string": "ab"}), vec!["ab"]),
        (json!(["ab", "c"]), vec!["ab", "c"]),
        (
            json!([[97], "b", {"prompt_string": "c"}]),
            vec!["a", "b", "c"],
        ),
    ] {
        let answer = server.post(PATH, &json!({"prompt": prompt})).await.json();
        let answers = match &answer {
            Value::Array(answers) => answers.clone(),
            one => vec![one.clone()],
        };
        let found: Vec<_> = answers
            .iter()
            .map(|answer| answer["content"].as_str())
            .collect();
        let expected: Vec<_> = texts.into_iter().map(Some).collect();
        assert_eq!(found, expected, "{prompt}");
    }
    for prompt in [
        json!(""),
        json!([]),
        json!(null),
        json!([[]]),
        json!([97, {}]),
        json!([-1]),
        json!([99999]),
        json!({"prompt_string": "x", "multimodal_data": ["AA=="]}),
        json!({}),
    ] {
        let error = server
            .post(PATH, &json!({"prompt": prompt}))
            .await
            .error(400, None);
        let param = error["param"].as_str().expect("a field");
        assert_eq!(param.split('[').next(), Some("prompt"), "{prompt}: {error}");
    }
    let long = "x".repeat(5000);
    let error = server.post(PATH, &json!({"prompt": long})).await;
    let error = error.error(400, Some("context_length_exceeded"));
    assert_eq!(
        (&error["n_prompt_tokens"], &error["n_ctx"]),
        (&json!(5000), &json!(4096))
    );
}

#[tokio::test]
async fn its_own_words_are_understood() {
    let server = Server::echo().await;
    let ask = |more: Value| {
        let mut body = json!({"prompt": "hello", "n_predict": 10});
        for (key, value) in more.as_object().expect("fields") {
            body[key] = value.clone();
        }
        body
    };
    for (more, content, stop_type, word) in [
        (json!({"stop": ["lo"]}), "hel", "word", "lo"),
        (json!({"n_predict": 2}), "he", "limit", ""),
        (
            json!({"ignore_eos": true, "n_predict": 6}),
            "hello",
            "limit",
            "",
        ),
        (
            json!({"seed": -1, "repeat_penalty": 1.1, "cache_prompt": false}),
            "hello",
            "eos",
            "",
        ),
        (
            json!({"logit_bias": [[104, -100], [" x ", false]]}),
            "hello",
            "eos",
            "",
        ),
        (
            json!({"logit_bias": {"104": 1, " x ": -100}}),
            "hello",
            "eos",
            "",
        ),
    ] {
        let answer = server.post(PATH, &ask(more.clone())).await.json();
        assert_eq!(answer["content"], content, "{more}: {answer}");
        assert_eq!(
            (&answer["stop_type"], &answer["stopping_word"]),
            (&json!(stop_type), &json!(word))
        );
    }
    let fields = json!({"response_fields": ["content", "timings/prompt_n", "nowhere"]});
    let answer = server.post(PATH, &ask(fields)).await.json();
    assert_eq!(answer, json!({"content": "hello", "timings/prompt_n": 5}));
    // What is turned off, as clients send it that send everything.
    let neutral = json!({
        "adaptive_target": -1.0, "dry_multiplier": 0.0, "dynatemp_range": 0.0, "image_data": [],
        "lora": [], "mirostat": 0, "n_cmpl": 1, "n_indent": 0, "t_max_predict_ms": -1,
        "top_n_sigma": -1.0, "typical_p": 1.0, "xtc_probability": 0.0, "n_keep": 0,
    });
    let answer = server.post(PATH, &ask(neutral)).await.json();
    assert_eq!(answer["content"], "hello");
    // Of a stream only the end is the answer; of several prompts each is one.
    let streamed = json!({"response_fields": ["stop_type", "prompt"], "stream": true});
    let streamed = chunks(&server.post(PATH, &ask(streamed)).await.body);
    let (end, parts) = streamed.split_last().expect("an end");
    assert_eq!(end, &json!({"stop_type": "eos", "prompt": "hello"}));
    assert!(parts.len() == 5 && parts.iter().all(|part| part["content"].is_string()));
    let several = json!({"response_fields": ["content"], "prompt": ["a", "b"]});
    let several = server.post(PATH, &ask(several)).await.json();
    assert_eq!(several, json!([{"content": "a"}, {"content": "b"}]));
    let never = server
        .post(PATH, &ask(json!({"ignore_eos": true})))
        .await
        .json();
    let never = &never["generation_settings"]["logit_bias"];
    assert_eq!(never, &json!([{"token": 256, "bias": null}]));
    for (more, param) in [
        (json!({"grammar": "root ::= \"a\""}), "grammar"),
        (json!({"n_probs": 1000}), "n_probs"),
        (json!({"post_sampling_probs": true}), "post_sampling_probs"),
        (json!({"logit_bias": [[1]]}), "logit_bias"),
        (json!({"logit_bias": "x"}), "logit_bias"),
        (json!({"stop": [""]}), "stop"),
        (json!({"temperature": 9}), "temperature"),
        (json!({"prompt": ["a", "b"], "stream": true}), "stream"),
        (json!({"adaptive_target": 0.5}), "adaptive_target"),
        (json!({"dry_multiplier": 0.8}), "dry_multiplier"),
        (json!({"dynatemp_range": 0.5}), "dynatemp_range"),
        (json!({"image_data": [{"id": 1}]}), "image_data"),
        (json!({"lora": [{"id": 0, "scale": 0.5}]}), "lora"),
        (json!({"mirostat": 2}), "mirostat"),
        (json!({"n": 2}), "n_cmpl"),
        (json!({"n_indent": 4}), "n_indent"),
        (json!({"t_max_predict_ms": 100}), "t_max_predict_ms"),
        (json!({"top_n_sigma": 1.0}), "top_n_sigma"),
        (json!({"typical_p": 0.9}), "typical_p"),
        (json!({"xtc_probability": 0.1}), "xtc_probability"),
    ] {
        let error = server.post(PATH, &ask(more.clone())).await.error(400, None);
        let named = error["param"].as_str().expect("a field");
        assert_eq!(named.split('[').next(), Some(param), "{more}: {error}");
    }
}

#[tokio::test]
async fn tokens_are_counted_and_shown_in_pieces() {
    let server = Server::echo().await;
    let messages = json!({"messages": [{"role": "user", "content": "hello"}]});
    for path in [
        "/chat/completions/input_tokens",
        "/v1/chat/completions/input_tokens",
    ] {
        let answer = server.post(path, &messages).await.json();
        assert_eq!(answer["input_tokens"], 5);
    }
    let body = json!({"content": "hé", "with_pieces": true});
    let pieces = server.post("/tokenize", &body).await.json()["tokens"].clone();
    let expected = json!([
        {"id": 104, "piece": "h"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]},
    ]);
    assert_eq!(pieces, expected);
    let whole = server.post("/chat/completions", &messages).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], "hello");
    assert_eq!(server.get("/models").await.json()["data"][0]["id"], "echo");
}

#[tokio::test]
async fn a_slot_is_taken_while_a_request_runs() {
    let engine = updraft_serve::EchoEngine::new(["echo"])
        .with_pace(std::time::Duration::from_millis(5))
        .with_max_running(2);
    let options = updraft_serve::ServeOptions::default();
    let server = Server::start(std::sync::Arc::new(engine), options).await;
    let taken = |slots: Value| -> Vec<bool> {
        let slots = slots.as_array().expect("a list").clone();
        slots
            .iter()
            .map(|slot| slot["is_processing"] == true)
            .collect()
    };
    assert_eq!(taken(server.get("/slots").await.json()), [false, false]);
    let body = json!({"prompt": "x".repeat(200), "stream": true}).to_string();
    let headers = "Content-Type: application/json\r\n";
    let mut connection = server.send("POST", PATH, headers, Some(&body)).await;
    let mut some = [0; 64];
    connection.read_exact(&mut some).await.expect("it streams");
    assert_eq!(taken(server.get("/slots").await.json()), [true, false]);
    assert_eq!(server.get("/load").await.json()["server_load"], 1);
}
