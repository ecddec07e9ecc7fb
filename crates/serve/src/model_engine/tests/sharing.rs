//! What is shared between requests, and what never is.

use super::*;

/// Every request as it is told to the client, without what of its prompt was cached.
pub(super) fn answers(events: Vec<Vec<TokenEvent>>) -> Vec<Vec<TokenEvent>> {
    let plain = |event| match event {
        TokenEvent::Started { .. } => TokenEvent::Started { cached_tokens: 0 },
        TokenEvent::Finished { reason, mut usage } => {
            usage.cached_tokens = 0;
            TokenEvent::Finished { reason, usage }
        }
        other => other,
    };
    let plain = |events: Vec<TokenEvent>| events.into_iter().map(plain).collect();
    events.into_iter().map(plain).collect()
}

fn cached_tokens(events: &[TokenEvent]) -> u32 {
    match (events.first(), events.last()) {
        (Some(TokenEvent::Started { cached_tokens }), Some(TokenEvent::Finished { usage, .. })) => {
            assert_eq!(usage.cached_tokens, *cached_tokens);
            *cached_tokens
        }
        other => panic!("{other:?}"),
    }
}

/// Not only the tokens but every bit of their log-probabilities: cache off, cold, warm, warm in
/// company, and warm under a cache so small that it is always won back.
#[tokio::test]
async fn answers_do_not_depend_on_the_prefix_cache() {
    let adapters = [("a", adapter(1))];
    let engine = |options: &EngineOptions| {
        ModelEngine::new(served(&weights(), &adapters), options).expect("sound options")
    };
    let asked = |salt: Option<&str>| -> Vec<GenerateRequest> {
        let request = |index: u32| GenerateRequest {
            prompt_ids: (0..40 + index * 3).map(|at| at * 17 % 256).collect(),
            logprobs: Some(2),
            cache_salt: salt.map(str::to_owned),
            ..GenerateRequest::greedy(
                if index.is_multiple_of(2) { "tiny" } else { "a" },
                vec![1],
                20,
            )
        };
        (0..8).map(request).collect()
    };
    let off = EngineOptions {
        prefix_cache: false,
        ..small()
    };
    let uncached = engine(&off);
    let expected = one_by_one(&uncached, asked(None)).await;
    assert!(expected.iter().all(|events| cached_tokens(events) == 0));
    assert_eq!(uncached.stats()[0].prefix_cache_queries, 0);

    let tight = EngineOptions {
        max_model_len: Some(96),
        kv_cache_bytes: Some(9 * KvPages::bytes_per_block(&config(), 16, candle_core::DType::F32)),
        ..small()
    };
    for options in [small(), tight] {
        let engine = engine(&options);
        for _ in 0..2 {
            let alone = one_by_one(&engine, asked(None)).await;
            assert_eq!(answers(alone), expected);
            let crowded = together(&engine, asked(None)).await;
            assert_eq!(answers(crowded), expected);
        }
        let stats = engine.stats().remove(0);
        assert!(
            stats.prefix_cache_hits > 0 && stats.prefix_cache_hits < stats.prefix_cache_queries
        );
    }

    // Base and adapter never share, and neither do salts.
    let engine = engine(&small());
    let cached = |events: Vec<Vec<TokenEvent>>| -> Vec<u32> {
        events.iter().map(|events| cached_tokens(events)).collect()
    };
    let cold = [0, 0, 32, 32, 32, 48, 48, 48];
    for salt in [None, Some("x"), Some("y")] {
        let events = one_by_one(&engine, asked(salt)).await;
        assert_eq!(cached(events.clone()), cold, "{salt:?}");
        assert_eq!(answers(events), expected);
    }
    let warm = one_by_one(&engine, asked(None)).await;
    assert_eq!(cached(warm), [32, 32, 32, 48, 48, 48, 48, 48]);
}

/// The name is given to another adapter, then to none, while a request runs: it ends as it began,
/// and nothing of its cache is used by whoever has the name next.
#[tokio::test]
async fn requests_keep_the_adapter_they_began_with() {
    let of = |seed| served(&weights(), &[("a", adapter(seed))]);
    let expected = |seed| async move {
        let engine = ModelEngine::new(of(seed), &small()).expect("sound options");
        one_by_one(&engine, requests("a")).await
    };
    let (first, second) = (expected(1).await, expected(2).await);
    let engine = ModelEngine::new(of(1), &small()).expect("sound options");
    assert_eq!(one_by_one(&engine, requests("a")).await, first);
    let mut under_way = Vec::new();
    for request in requests("a") {
        under_way.push(engine.generate(request).await.expect("a valid request"));
    }
    let again = ServedAdapter {
        name: "a".into(),
        root: "a".into(),
        adapter: adapter(2),
    };
    engine
        .registry
        .add(again, Existing::Replace)
        .expect("it may be replaced");
    // Cold, although the same prompts lie in the cache under the first generation.
    assert_eq!(one_by_one(&engine, requests("a")).await, second);
    engine.unload_adapter("a").expect("it was there");
    let gone = engine.generate(requests("a").remove(0)).await;
    assert!(matches!(gone, Err(Error::ModelNotFound { .. })));
    let ended = join_all(under_way.into_iter().map(TryStreamExt::try_collect)).await;
    let ended: Result<Vec<Vec<TokenEvent>>> = ended.into_iter().collect();
    assert_eq!(answers(ended.expect("no error")), answers(first));
}
