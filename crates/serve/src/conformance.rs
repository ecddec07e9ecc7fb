//! The promises of [`Engine`], one function each.
//!
//! [`conformance_tests!`](crate::conformance_tests) makes a test of each. The engine under test
//! must be idle, admit at least eight requests, and have a context of at least 64 tokens.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use updraft_chat::TokenizerExt;

use crate::engine::{Engine, FinishReason, GenerateRequest, TokenEvent, Usage};
use crate::error::{Error, Result};
use crate::sampling::SamplingParams;

/// Makes a `#[tokio::test]` of each promise for the engine that the expression builds.
///
/// ```ignore
/// updraft_serve::conformance_tests!(Arc::new(EchoEngine::new(["echo"])));
/// ```
#[macro_export]
macro_rules! conformance_tests {
    ($engine:expr) => {
        $crate::conformance_tests!(@each $engine;
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
            an_embedding_is_the_same_again,
            a_dropped_stream_frees_what_it_held,
            idle_is_idle_again,
        );
    };
    (@each $engine:expr; $($promise:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                $crate::conformance::$promise($engine).await;
            }
        )*
    };
}

type Subject = Arc<dyn Engine>;

fn prompt() -> Vec<u32> {
    (1..=9).collect()
}

fn model(engine: &Subject) -> String {
    engine
        .models()
        .first()
        .expect("an engine serves something")
        .id
        .clone()
}

async fn run(engine: &Subject, request: GenerateRequest) -> Result<Vec<TokenEvent>> {
    engine.generate(request).await?.try_collect().await
}

fn ids(events: &[TokenEvent]) -> Vec<u32> {
    let id = |event: &TokenEvent| match event {
        TokenEvent::Token { id, .. } => Some(*id),
        _ => None,
    };
    events.iter().filter_map(id).collect()
}

/// The one end, which must be the last event.
fn end(events: &[TokenEvent]) -> (FinishReason, Usage) {
    let ends = events
        .iter()
        .filter(|event| matches!(event, TokenEvent::Finished { .. }));
    assert_eq!(ends.count(), 1, "exactly one end: {events:?}");
    match events.last() {
        Some(TokenEvent::Finished { reason, usage }) => {
            assert!(usage.cached_tokens < usage.prompt_tokens, "{usage:?}");
            let cached_tokens = 0; // What came before is no concern of the promises here.
            (
                *reason,
                Usage {
                    cached_tokens,
                    ..*usage
                },
            )
        }
        other => panic!("the end is not last but {other:?}"),
    }
}

async fn refused(engine: &Subject, request: GenerateRequest) -> Error {
    match engine.generate(request).await {
        Ok(_) => panic!("the request should have been refused before its stream"),
        Err(error) => error,
    }
}

/// Names are unique, each has a template and tokenizer, and nothing else has.
pub async fn models_are_named_once_and_can_chat(engine: Subject) {
    let models = engine.models();
    let names: BTreeSet<_> = models.iter().map(|info| &info.id).collect();
    assert!(!models.is_empty() && names.len() == models.len());
    assert!(
        models
            .iter()
            .all(|info| engine.chat(&info.id).is_some() && info.max_model_len > 0)
    );
    assert!(engine.chat("no such model").is_none());
}

/// An unknown model is refused before the stream.
pub async fn an_unknown_model_is_not_found(engine: Subject) {
    let request = GenerateRequest::greedy("no such model", prompt(), 4);
    let error = refused(&engine, request).await;
    assert!(matches!(error, Error::ModelNotFound { model } if model == "no such model"));
}

/// An empty prompt is refused.
pub async fn an_empty_prompt_is_refused(engine: Subject) {
    let request = GenerateRequest::greedy(model(&engine), Vec::new(), 4);
    assert!(matches!(
        refused(&engine, request).await,
        Error::InvalidRequest { .. }
    ));
}

/// Ids the model does not have are refused wherever they are.
pub async fn ids_outside_the_vocabulary_are_refused(engine: Subject) {
    let name = model(&engine);
    let valid = GenerateRequest::greedy(&name, prompt(), 4);
    let outside = u32::MAX;
    let mut sampling = SamplingParams::greedy();
    sampling.logit_bias = Arc::from([(outside, 1.0)]);
    for request in [
        GenerateRequest {
            prompt_ids: vec![outside],
            ..valid.clone()
        },
        GenerateRequest {
            stop_token_ids: Arc::from([outside]),
            ..valid.clone()
        },
        GenerateRequest { sampling, ..valid },
    ] {
        assert!(matches!(
            refused(&engine, request).await,
            Error::InvalidRequest { .. }
        ));
    }
}

/// Prompt and completion beyond the context are refused, with the numbers.
pub async fn what_exceeds_the_context_is_refused(engine: Subject) {
    let name = model(&engine);
    let max_model_len = engine.models()[0].max_model_len;
    let long = GenerateRequest::greedy(&name, prompt(), max_model_len);
    match refused(&engine, long).await {
        Error::ContextLength {
            prompt_tokens: 9,
            max_model_len: limit,
            ..
        } => {
            assert_eq!(limit, max_model_len);
        }
        other => panic!("{other:?}"),
    }
    let endless = GenerateRequest::greedy(&name, prompt(), u32::MAX);
    assert!(matches!(
        refused(&engine, endless).await,
        Error::ContextLength { .. }
    ));
}

/// Settings without meaning are refused.
pub async fn settings_out_of_range_are_refused(engine: Subject) {
    let sampling = SamplingParams {
        temperature: -1.0,
        ..SamplingParams::greedy()
    };
    let request = GenerateRequest {
        sampling,
        ..GenerateRequest::greedy(model(&engine), prompt(), 4)
    };
    assert!(matches!(
        refused(&engine, request).await,
        Error::InvalidRequest { .. }
    ));
}

/// Without stop tokens exactly `max_tokens` come.
pub async fn max_tokens_ends_with_length(engine: Subject) {
    let request = GenerateRequest::greedy(model(&engine), prompt(), 12);
    let events = run(&engine, request).await.expect("a valid request");
    assert_eq!(ids(&events).len(), 12);
    let usage = Usage {
        prompt_tokens: 9,
        completion_tokens: 12,
        ..Usage::default()
    };
    assert_eq!(end(&events), (FinishReason::Length, usage));
}

/// `max_tokens` 0 is a prompt without completion.
pub async fn no_tokens_can_be_asked_for(engine: Subject) {
    let request = GenerateRequest::greedy(model(&engine), prompt(), 0);
    let events = run(&engine, request).await.expect("a valid request");
    let usage = Usage {
        prompt_tokens: 9,
        completion_tokens: 0,
        ..Usage::default()
    };
    assert_eq!(end(&events), (FinishReason::Length, usage));
    assert!(ids(&events).is_empty());
}

/// A stop token is the end; it is counted, but not sent.
pub async fn a_stop_token_ends_unsent_but_counted(engine: Subject) {
    let free = GenerateRequest::greedy(model(&engine), prompt(), 12);
    let tokens = ids(&run(&engine, free.clone()).await.expect("a valid request"));
    let stop = tokens[5];
    let before = tokens
        .iter()
        .position(|&id| id == stop)
        .expect("it was there");
    let stopped = GenerateRequest {
        stop_token_ids: Arc::from([stop]),
        ..free
    };
    let events = run(&engine, stopped).await.expect("a valid request");
    assert_eq!(ids(&events), tokens[..before]);
    let usage = Usage {
        prompt_tokens: 9,
        completion_tokens: before as u32 + 1,
        ..Usage::default()
    };
    assert_eq!(end(&events), (FinishReason::Stop, usage));
}

/// Stop tokens are not chosen before `min_tokens`.
pub async fn min_tokens_come_before_any_stop_token(engine: Subject) {
    let free = GenerateRequest::greedy(model(&engine), prompt(), 12);
    let tokens = ids(&run(&engine, free.clone()).await.expect("a valid request"));
    let stop = vec![tokens[0]];
    let request = GenerateRequest {
        stop_token_ids: stop.clone().into(),
        min_tokens: 3,
        ..free
    };
    let events = run(&engine, request).await.expect("a valid request");
    let sent = ids(&events);
    assert!(
        sent.len() >= 3 && sent.iter().all(|id| !stop.contains(id)),
        "{sent:?}"
    );
}

/// The same greedy request gives the same tokens alone and among others.
pub async fn greedy_does_not_depend_on_company(engine: Subject) {
    let name = model(&engine);
    let request = |start: u32| GenerateRequest::greedy(&name, (start..start + 9).collect(), 12);
    let mut alone = Vec::new();
    for start in 1..=6 {
        alone.push(ids(&run(&engine, request(start))
            .await
            .expect("a valid request")));
    }
    let together =
        futures::future::join_all((1..=6).map(|start| run(&engine, request(start)))).await;
    for (alone, together) in alone.iter().zip(together) {
        assert_eq!(alone, &ids(&together.expect("a valid request")));
    }
}

/// The same seed gives the same tokens.
pub async fn a_seed_repeats_its_draws(engine: Subject) {
    let request = GenerateRequest {
        sampling: SamplingParams::seeded(11),
        ..GenerateRequest::greedy(model(&engine), prompt(), 12)
    };
    let first = run(&engine, request.clone())
        .await
        .expect("a valid request");
    let again = run(&engine, request).await.expect("a valid request");
    assert_eq!(ids(&first), ids(&again));
}

/// Log-probabilities come with each token when asked for, and never otherwise.
pub async fn logprobs_come_when_asked_for(engine: Subject) {
    let silent = GenerateRequest::greedy(model(&engine), prompt(), 4);
    let asked = GenerateRequest {
        logprobs: Some(1),
        ..silent.clone()
    };
    for event in run(&engine, silent).await.expect("a valid request") {
        assert!(!matches!(
            event,
            TokenEvent::Token {
                logprobs: Some(_),
                ..
            }
        ));
    }
    for event in run(&engine, asked).await.expect("a valid request") {
        if let TokenEvent::Token { id, logprobs } = event {
            let logprobs = logprobs.expect("asked for");
            assert!(logprobs.logprob <= 0.0);
            assert_eq!(
                logprobs.top,
                [(id, logprobs.logprob)],
                "greedy takes the likeliest"
            );
        }
    }
}

/// The prompt's log-probabilities come before its tokens: one per token, none for the first.
pub async fn prompt_logprobs_come_first(engine: Subject) {
    let request = GenerateRequest {
        prompt_logprobs: Some(1),
        ..GenerateRequest::greedy(model(&engine), prompt(), 2)
    };
    let events = run(&engine, request).await.expect("a valid request");
    let started = |event: &&TokenEvent| matches!(event, TokenEvent::Started { .. });
    match events.iter().find(|event| !started(event)) {
        Some(TokenEvent::Prompt(logprobs)) => {
            assert_eq!(logprobs.len(), 9);
            assert!(logprobs[0].is_none() && logprobs[1..].iter().all(Option::is_some));
        }
        other => panic!("{other:?}"),
    }
}

/// An embedding comes when asked for, once, and the same each time.
pub async fn an_embedding_is_the_same_again(engine: Subject) {
    let plain = GenerateRequest::greedy(model(&engine), prompt(), 0);
    let asked = GenerateRequest {
        embed: true,
        ..plain.clone()
    };
    let embeddings = |events: Vec<TokenEvent>| -> Vec<Vec<f32>> {
        let embedding = |event| match event {
            TokenEvent::Embedding(values) => Some(values),
            _ => None,
        };
        events.into_iter().filter_map(embedding).collect()
    };
    let first = embeddings(run(&engine, asked.clone()).await.expect("a valid request"));
    assert!(first.len() == 1 && !first[0].is_empty());
    assert!(first[0].iter().all(|value| value.is_finite()));
    let again = embeddings(run(&engine, asked).await.expect("a valid request"));
    assert_eq!(first, again);
    let none = embeddings(run(&engine, plain).await.expect("a valid request"));
    assert!(none.is_empty());
}

/// A request whose stream is dropped, before or after its first token, holds nothing any more.
pub async fn a_dropped_stream_frees_what_it_held(engine: Subject) {
    let name = model(&engine);
    let max_tokens = engine.models()[0].max_model_len - 9;
    for tokens in 0..6 {
        let request = GenerateRequest::greedy(&name, prompt(), max_tokens);
        let mut stream = engine.generate(request).await.expect("a valid request");
        for _ in 0..tokens {
            stream
                .next()
                .await
                .expect("not at its end")
                .expect("no error");
        }
    }
    until_idle(&engine).await;
}

/// After requests end, no request and no block is left.
pub async fn idle_is_idle_again(engine: Subject) {
    let name = model(&engine);
    let request = || GenerateRequest::greedy(&name, prompt(), 5);
    let all = futures::future::join_all((0..8).map(|_| run(&engine, request()))).await;
    assert!(all.iter().all(Result::is_ok));
    until_idle(&engine).await;
    let chat = engine.chat(&name).expect("its model");
    assert!(chat.tokenizer().vocab_size() > 0);
}

/// Waits until no request and no block is left; the statistics follow the events.
pub(crate) async fn until_idle(engine: &Subject) {
    for _ in 0..500 {
        let idle = engine.stats().iter().all(|stats| {
            stats.alive && stats.running == 0 && stats.waiting == 0 && stats.kv_cache_usage == 0.0
        });
        if idle {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("still busy: {:?}", engine.stats());
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::{EchoEngine, Engines};

    mod echo {
        use super::*;

        crate::conformance_tests!(Arc::new(EchoEngine::new(["echo"])));
    }

    mod several {
        use super::*;

        crate::conformance_tests!(Arc::new(
            Engines::new(vec![
                Arc::new(EchoEngine::new(["a", "b"])),
                Arc::new(EchoEngine::new(["c"])),
            ])
            .expect("distinct names")
        ));
    }
}
