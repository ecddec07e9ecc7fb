//! Architectures that the decoder does not cover, against logits that transformers recorded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use safetensors::SafeTensors;
use updraft_chat::{ByteTokenizer, Chat, ChatTemplate, SpecialTokens};
use updraft_serve::{
    CANDLE_ARCHITECTURES, CandleEngine, Engine, Error, GenerateRequest, TokenEvent,
};

fn folder(model_type: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/candle");
    fixtures.join(model_type)
}

fn chat() -> Chat {
    let special_tokens = SpecialTokens::new([("eos_token", "<|end|>")]);
    let template = ChatTemplate::new("{{ messages[-1].content }}", special_tokens);
    let tokenizer = Arc::new(ByteTokenizer::new(["<|end|>"]));
    Chat::new(template.expect("valid Jinja"), tokenizer)
}

fn engine(model_type: &str) -> Arc<dyn Engine> {
    let engine = CandleEngine::with_chat(model_type, &folder(model_type), chat());
    Arc::new(engine.unwrap_or_else(|error| panic!("{model_type}: {error:?}")))
}

/// Token ids, and the log-probabilities of all tokens after each of them.
fn recorded(model_type: &str) -> (Vec<u32>, Vec<Vec<f32>>) {
    let bytes = std::fs::read(folder(model_type).join("logits.safetensors")).expect("recorded");
    let file = SafeTensors::deserialize(&bytes).expect("sound");
    let ids = file.tensor("ids").expect("ids");
    let ids = ids.data().as_chunks::<8>().0.iter();
    let ids = ids.map(|&id| i64::from_le_bytes(id) as u32).collect();
    let logits = file.tensor("logits").expect("logits");
    let vocab_size = logits.shape()[1];
    let logits = logits.data().as_chunks::<4>().0.iter();
    let logits: Vec<f32> = logits.map(|&logit| f32::from_le_bytes(logit)).collect();
    let log_softmax = |row: &[f32]| {
        let sum = row.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>();
        row.iter().map(|&logit| logit - sum.ln() as f32).collect()
    };
    (ids, logits.chunks(vocab_size).map(log_softmax).collect())
}

/// Every log-probability that an engine reports must be the recorded one.
fn check(what: &str, reported: &[(u32, f32)], expected: &[f32]) {
    assert_eq!(reported.len(), expected.len(), "{what}");
    for &(id, logprob) in reported {
        let difference = (logprob - expected[id as usize]).abs();
        assert!(difference < 1e-4, "{what}, token {id}: {difference:e}");
    }
}

#[tokio::test]
async fn every_architecture_gives_the_logits_of_transformers() {
    for &model_type in CANDLE_ARCHITECTURES {
        let (ids, expected) = recorded(model_type);
        let all = Some(expected[0].len() as u32);
        let engine = engine(model_type);
        // The prompt in one piece, and its last logits with the first token.
        let request = GenerateRequest {
            logprobs: all,
            ..GenerateRequest::greedy(model_type, ids.clone(), 1)
        };
        let events = engine.generate(request).await.expect("a request");
        let events: Vec<_> = events.try_collect().await.expect("an answer");
        let first = events.iter().find_map(|event| match event {
            TokenEvent::Token { logprobs, .. } => logprobs.as_ref(),
            _ => None,
        });
        let what = format!("{model_type}, whole prompt");
        check(
            &what,
            &first.expect("a token").top,
            &expected[ids.len() - 1],
        );
        // The prompt token by token, over the model's own cache.
        let request = GenerateRequest {
            prompt_logprobs: all,
            ..GenerateRequest::greedy(model_type, ids.clone(), 0)
        };
        let events = engine.generate(request).await.expect("a request");
        let events: Vec<_> = events.try_collect().await.expect("an answer");
        let prompt = events.iter().find_map(|event| match event {
            TokenEvent::Prompt(logprobs) => Some(logprobs),
            _ => None,
        });
        let prompt = prompt.expect("asked for");
        for (position, logprobs) in prompt.iter().enumerate().skip(1) {
            let what = format!("{model_type}, position {position}");
            let reported = &logprobs.as_ref().expect("all but the first").top;
            check(&what, reported, &expected[position - 1]);
        }
    }
}

#[test]
fn an_architecture_that_neither_covers_is_refused_by_name() {
    let other = tempfile::tempdir().expect("a folder");
    let copy = |name: &str| {
        std::fs::copy(folder("phi3").join(name), other.path().join(name)).expect(name);
    };
    copy("model.safetensors");
    copy("config.json");
    let edit = |from: &str, to: &str| {
        let path = other.path().join("config.json");
        let text = std::fs::read_to_string(&path).expect("a configuration");
        assert!(text.contains(from));
        std::fs::write(&path, text.replace(from, to)).expect("written");
    };
    let refused = || {
        let engine = CandleEngine::with_chat("x", other.path(), chat());
        let error = engine.expect_err("must be refused");
        let Error::Load { source, .. } = error else {
            panic!("{error:?}")
        };
        source.to_string()
    };
    edit("\"phi3\"", "\"mamba\"");
    let message = refused();
    assert!(
        message.contains("\"mamba\" is not supported") && message.contains("gemma2"),
        "{message}"
    );
    edit("\"mamba\"", "\"gemma\"");
    refused(); // Other settings and other tensors.
}

#[tokio::test]
async fn what_it_cannot_do_is_refused_before_the_stream() {
    let engine = engine("phi3");
    let plain = GenerateRequest::greedy("phi3", vec![1, 2], 1);
    let embed = GenerateRequest {
        embed: true,
        ..plain
    };
    let refused = engine
        .generate(embed)
        .await
        .err()
        .expect("no hidden states");
    assert!(
        matches!(refused, Error::InvalidRequest { .. }),
        "{refused:?}"
    );
}

/// The folder's files beside the weights say what requests leave out.
#[tokio::test]
async fn what_the_models_makers_say_is_heard() {
    let copy = tempfile::tempdir().expect("a temporary folder");
    for file in ["config.json", "model.safetensors"] {
        let bytes = std::fs::read(folder("phi3").join(file)).expect("a fixture");
        std::fs::write(copy.path().join(file), bytes).expect("written");
    }
    let write = |name, json| std::fs::write(copy.path().join(name), json).expect("written");
    write(
        "generation_config.json",
        r#"{"temperature": 0.5, "top_k": 7}"#,
    );
    write(
        "tokenizer.json",
        r#"{"post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}}}"#,
    );
    let engine = CandleEngine::with_chat("phi3", copy.path(), chat()).expect("it loads");
    let info = engine.models().remove(0);
    assert_eq!(
        (info.sampling.temperature, info.sampling.top_k),
        (Some(0.5), Some(7))
    );
    assert_eq!(info.text_prefix, [3]);
}

/// Clients that went while they waited keep nobody out, even while the one before them is served.
#[tokio::test]
async fn those_who_went_leave_their_place_in_the_queue() {
    let engine = engine("phi3");
    let longest = engine.models()[0].max_model_len - 2;
    let ask = || engine.generate(GenerateRequest::greedy("phi3", vec![1, 2], longest));
    let mut running = ask().await.expect("nobody else is there");
    assert!(running.next().await.is_some());
    let mut waiting = Vec::new();
    let refused = loop {
        match ask().await {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::Overloaded { .. }), "{refused:?}");
    drop(waiting);
    // The queue is looked at before each token of the one that runs.
    let mut again = ask().await;
    while again.is_err() && running.next().await.is_some() {
        again = ask().await;
    }
    assert!(again.is_ok());
    assert!(running.next().await.is_some(), "it was not over before");
}

/// The promises of every engine, but for embeddings.
#[cfg(feature = "conformance")]
mod promises {
    use super::engine;
    use updraft_serve::conformance;

    macro_rules! kept {
        ($($promise:ident,)*) => {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $promise() {
                    conformance::$promise(engine("phi3")).await;
                }
            )*
        };
    }

    kept! {
        models_are_named_once_and_can_chat,
        an_unknown_model_is_not_found,
        an_empty_prompt_is_refused,
        ids_outside_the_vocabulary_are_refused,
        what_exceeds_the_context_is_refused,
        settings_out_of_range_are_refused,
        max_tokens_ends_with_length,
        no_tokens_can_be_asked_for,
        a_stop_token_ends_unsent_but_counted,
        min_tokens_come_before_any_stop_token,
        greedy_does_not_depend_on_company,
        a_seed_repeats_its_draws,
        logprobs_come_when_asked_for,
        prompt_logprobs_come_first,
        a_dropped_stream_frees_what_it_held,
        idle_is_idle_again,
    }
}
