//! What a stage refuses, before it costs anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use updraft_model::LoraConfig;
use updraft_store::faults::count;
use updraft_store::{CancelToken, NoProgress, StageId};
use updraft_train::{
    Error, ExamplePlan, ExampleSource, ExampleStream, TrainConfig, TrainStage, train_stage,
};

use super::{finished, train, world};
use crate::world::lora;

#[tokio::test(flavor = "multi_thread")]
async fn bad_settings_are_refused_before_the_store_is_touched() {
    let (store, stage) = world().await;
    let (counted, calls) = count(&store);
    let rank_zero = TrainStage {
        lora: LoraConfig { r: 0, ..lora() },
        ..stage.clone()
    };
    let error = train(&counted, &rank_zero).await.expect_err("rank 0");
    assert!(matches!(error, Error::Model(_)), "{error}");
    let epochs = TrainConfig {
        num_train_epochs: -1.0,
        ..stage.config.clone()
    };
    let error = train(
        &counted,
        &TrainStage {
            config: epochs,
            ..stage
        },
    )
    .await
    .expect_err("-1 epochs");
    assert!(
        matches!(
            error,
            Error::Config {
                field: "num_train_epochs",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(calls.total(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_opened_is_the_stages_error() {
    let (store, stage) = world().await;
    let asked = AtomicBool::new(false);
    let source = async {
        asked.store(true, Ordering::Relaxed);
        Err(Error::source("no such shard"))
    };
    let error = train_stage(&store, &stage, source, &NoProgress, &CancelToken::new())
        .await
        .expect_err("no data");
    assert!(
        asked.into_inner() && matches!(error, Error::Source(_)),
        "{error}"
    );
}

/// The configuration of a model that fits into no memory, and weights nobody needs to fetch.
#[cfg(target_os = "linux")] // which tells what is free
#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_said_before_the_weights_are_fetched() {
    let (store, stage) = world().await;
    let huge = br#"{"model_type": "qwen2", "hidden_size": 65536, "intermediate_size": 262144,
        "num_hidden_layers": 4096, "num_attention_heads": 512, "num_key_value_heads": 64,
        "vocab_size": 151936, "tie_word_embeddings": true}"#;
    let objects = vec![
        ("config.json", huge.to_vec()),
        ("model.safetensors", b"never read".to_vec()),
    ];
    let id = StageId::models("huge").expect("a name");
    let stage = TrainStage {
        base: finished(&store, id, objects).await,
        ..stage
    };
    let error = train(&store, &stage).await.expect_err("too large");
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
}

/// Examples that no machine holds.
#[derive(Debug)]
struct Endless(ExamplePlan);

impl ExampleSource for Endless {
    fn plan(&self) -> &ExamplePlan {
        &self.0
    }

    fn row(&self, _: u64, index: u64) -> u64 {
        index
    }

    fn open(&self, _: u64, _: u64) -> updraft_train::Result<ExampleStream<'_>> {
        Ok(Box::new(std::iter::empty()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_into_memory_is_refused_unless_one_insists() {
    let (store, mut stage) = world().await;
    let endless = || async {
        let plan = ExamplePlan {
            id: "endless".to_owned(),
            lengths: vec![u32::MAX; 8],
            trained_tokens: vec![1; 8],
        };
        let train: Arc<dyn ExampleSource> = Arc::new(Endless(plan));
        Ok(train.into())
    };
    let cancel = CancelToken::new();
    let error = train_stage(&store, &stage, endless(), &NoProgress, &cancel).await;
    let error = error.expect_err("it does not fit");
    // Where the system does not say what is free, the run itself finds the rows too long.
    if cfg!(target_os = "linux") {
        let refused = matches!(
            error,
            Error::OutOfMemory { fits, .. } if fits.batch_size.is_none() && fits.tokens.is_some()
        );
        assert!(refused, "{error}");
    }
    stage.config.ignore_memory_estimate = true;
    let error = train_stage(&store, &stage, endless(), &NoProgress, &cancel).await;
    let error = error.expect_err("no row fits");
    assert!(matches!(error, Error::TooLong { .. }), "{error}");
}
