//! What a request says about the tokens to choose from, and what it is told of them.

use super::*;

fn asking(change: impl FnOnce(&mut GenerateRequest)) -> GenerateRequest {
    let mut request = GenerateRequest {
        logprobs: Some(3),
        ..GenerateRequest::greedy("tiny", (1..20).collect(), 24)
    };
    change(&mut request);
    request
}

async fn tokens(request: GenerateRequest) -> Vec<(u32, TokenLogprobs)> {
    let events = run(&*engine(&small()), request).await.into_iter();
    let token = |event| match event {
        TokenEvent::Token { id, logprobs } => Some((id, logprobs.expect("asked for"))),
        _ => None,
    };
    events.filter_map(token).collect()
}

#[tokio::test]
async fn only_allowed_tokens_are_chosen() {
    let allowed = vec![3, 5, 200];
    for temperature in [0.0, 1.0] {
        let request = asking(|request| {
            request.sampling.temperature = temperature;
            request.sampling.allowed_token_ids = allowed.clone().into();
        });
        let chosen = tokens(request).await;
        assert_eq!(chosen.len(), 24);
        assert!(
            chosen.iter().all(|(id, _)| allowed.contains(id)),
            "{chosen:?}"
        );
        let ranks: Vec<u32> = chosen.iter().map(|(_, logprobs)| logprobs.rank).collect();
        assert!(
            ranks.iter().any(|rank| *rank > 1),
            "of all tokens, not of those allowed: {ranks:?}"
        );
    }
}

/// Words of one token never come; of longer ones the last token does not follow the others.
#[tokio::test]
async fn bad_words_are_never_completed() {
    let ids =
        |chosen: &[(u32, TokenLogprobs)]| chosen.iter().map(|(id, _)| *id).collect::<Vec<_>>();
    let free = ids(&tokens(asking(|_| {})).await);
    let single = free[2];
    let begins = free
        .iter()
        .position(|id| *id == single)
        .expect("it is there");
    let without = ids(&tokens(asking(|request| {
        request.bad_words = vec![vec![single]].into();
    }))
    .await);
    assert!(!without.contains(&single), "{without:?}");
    assert_eq!(
        without[..begins],
        free[..begins],
        "until there nothing changes"
    );
    let word = free[3..6].to_vec();
    let ends = 2 + free
        .windows(3)
        .position(|three| three == word)
        .expect("it is there");
    let without = ids(&tokens(asking(|request| {
        request.bad_words = vec![word.clone()].into();
    }))
    .await);
    assert!(without.windows(3).all(|three| three != word), "{without:?}");
    assert_eq!(
        without[..ends],
        free[..ends],
        "until its end nothing changes"
    );
}

#[tokio::test]
async fn named_tokens_are_told_instead_of_the_likeliest() {
    let likeliest = tokens(asking(|_| {})).await;
    let named = tokens(asking(|request| request.logprob_ids = vec![7, 250].into())).await;
    for ((id, top), (same, named)) in likeliest.iter().zip(&named) {
        assert_eq!((id, top.logprob, top.rank), (same, named.logprob, 1));
        assert_eq!(top.top[0], (*id, top.logprob));
        assert_eq!(
            named.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [7, 250]
        );
        assert!(named.top.iter().all(|(_, logprob)| *logprob <= top.logprob));
    }
}

/// Penalties, biases and stops that name tokens at the vocabulary's very end, over a vocabulary
/// larger than the tokenizer's.
#[tokio::test]
async fn settings_reach_to_the_vocabularys_end_and_not_beyond() {
    let last = config().vocab_size as u32 - 1;
    let request = asking(|request| {
        request.prompt_ids = vec![last, 0, last];
        request.sampling = SamplingParams {
            repetition_penalty: 1.5,
            frequency_penalty: 2.0,
            presence_penalty: -2.0,
            logit_bias: vec![(last, 100.0), (0, -100.0)].into(),
            ..SamplingParams::greedy()
        };
        request.stop_token_ids = vec![last].into();
        request.min_tokens = 24;
    });
    let chosen = tokens(request).await;
    assert!(
        chosen.len() == 24 && chosen.iter().all(|(id, _)| *id != last && *id != 0),
        "{chosen:?}"
    );
    for change in [
        (|request: &mut GenerateRequest| request.sampling.logit_bias = vec![(288, 1.0)].into())
            as fn(&mut GenerateRequest),
        |request| request.stop_token_ids = vec![288].into(),
        |request| request.logprob_ids = vec![288].into(),
        |request| request.bad_words = vec![vec![1, 288]].into(),
        |request| request.sampling.allowed_token_ids = vec![288].into(),
    ] {
        let refused = engine(&small()).generate(asking(change)).await;
        assert!(matches!(refused, Err(Error::InvalidRequest { .. })));
    }
}

/// Settings that exclude each other are the request's fault, not the model's.
#[tokio::test]
async fn settings_that_leave_no_token_are_refused() {
    let request = asking(|request| {
        request.sampling.allowed_token_ids = vec![5].into();
        request.bad_words = vec![vec![5]].into();
    });
    let events = engine(&small())
        .generate(request)
        .await
        .expect("each alone is sound");
    let ended: Result<Vec<TokenEvent>> = events.try_collect().await;
    assert!(
        matches!(ended, Err(Error::InvalidRequest { .. })),
        "{ended:?}"
    );
}
