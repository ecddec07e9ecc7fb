//! What an engine may spend, and that it gets everything back.

use super::*;

#[tokio::test]
async fn a_full_queue_refuses_and_recovers() {
    let options = EngineOptions {
        max_num_seqs: 1,
        max_queued_requests: 2,
        ..small()
    };
    let engine = engine(&options);
    let long = || GenerateRequest::greedy("tiny", vec![1; 9], 200);
    let mut streams = Vec::new();
    let refused = loop {
        match engine.generate(long()).await {
            Ok(stream) => streams.push(stream),
            Err(error) => break error,
        }
        assert!(
            streams.len() < 10,
            "one runs and two wait, a few may have ended"
        );
    };
    assert!(matches!(refused, Error::Overloaded { .. }));
    drop(streams);
    run(&*engine, long()).await;
}

#[tokio::test]
async fn options_that_cannot_work_are_refused() {
    let block = KvPages::bytes_per_block(&config(), 16, candle_core::DType::F32);
    for (options, word) in [
        (
            EngineOptions {
                max_model_len: Some(257),
                ..small()
            },
            "max_model_len",
        ),
        (
            EngineOptions {
                max_model_len: Some(64),
                kv_cache_bytes: Some(3 * block),
                ..small()
            },
            "kv_cache_bytes",
        ),
        (
            EngineOptions {
                kv_cache_bytes: Some(1),
                ..small()
            },
            "kv_cache_bytes",
        ),
        (
            EngineOptions {
                max_model_len: Some(0),
                ..small()
            },
            "max_model_len must be at least 1",
        ),
        (
            EngineOptions {
                block_size: 0,
                ..small()
            },
            "block_size",
        ),
        (
            EngineOptions {
                max_num_seqs: 0,
                ..small()
            },
            "max_num_seqs",
        ),
        (
            EngineOptions {
                max_num_batched_tokens: 15,
                ..small()
            },
            "max_num_batched_tokens",
        ),
    ] {
        let error = ModelEngine::new(served(&weights(), &[]), &options).expect_err(word);
        assert!(error.to_string().contains(word), "{error}");
    }
    // What is not asked for adapts to the memory there is.
    let tight = EngineOptions {
        kv_cache_bytes: Some(3 * block),
        ..small()
    };
    assert_eq!(engine(&tight).models()[0].max_model_len, 48);
}

/// Clients that ask and vanish: while they are admitted, in the queue, in the prompt, at any token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_that_vanish_leave_nothing() {
    let engine = engine(&EngineOptions {
        max_num_seqs: 8,
        block_size: 4,
        kv_cache_bytes: Some(60 * KvPages::bytes_per_block(&config(), 4, candle_core::DType::F32)),
        ..small()
    });
    let client = |client: u64| {
        let engine = engine.clone();
        let draw = move |what, below: f64| (crate::rng::uniform(client, what) * below) as u32;
        async move {
            let prompt_ids = (0..1 + draw(1, 60.0)).map(|at| at * draw(2, 3.0) % 256);
            let request = GenerateRequest::greedy("tiny", prompt_ids.collect(), draw(3, 60.0));
            let admitted = engine.generate(request);
            let stream = if draw(4, 5.0) == 0 {
                tokio::time::timeout(std::time::Duration::ZERO, admitted).await
            } else {
                Ok(admitted.await)
            };
            match stream {
                Ok(Ok(stream)) => {
                    stream.take(draw(5, 20.0) as usize).count().await;
                }
                Ok(Err(error)) => assert!(matches!(error, Error::Overloaded { .. }), "{error}"),
                Err(_) => {}
            }
        }
    };
    futures::stream::iter((0..1000).map(client))
        .buffer_unordered(100)
        .count()
        .await;
    crate::conformance::until_idle(&engine).await;
    let fresh = GenerateRequest::greedy("tiny", (0..30).collect(), 20);
    assert!(
        run(&*engine, fresh).await.len() > 20,
        "it answers as before"
    );
}
