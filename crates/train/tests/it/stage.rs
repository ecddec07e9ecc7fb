//! The stage: from a base model and data in a store to an adapter and a merged
//! model there.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use updraft_model::{Architecture, LoraConfig, Threads, load_model_files, peft, tiny};
use updraft_store::faults::{Fault, count, inject, watch};
use updraft_store::{
    CancelToken, FinishedStage, ManifestDraft, NoProgress, Opened, Progress, ProgressSink, StageId,
    Store, garbage, open_stage, sha256_hex,
};
use updraft_train::metrics::{Sink, parse_log};
use updraft_train::{
    Error, EvalRecord, ExamplePlan, ExampleSource, ExampleStream, Sources, StepRecord, TrainConfig,
    TrainStage, Trained, train_stage,
};

use crate::world::{config, lora, model, source};

/// Commits a stage of these objects.
async fn finished(store: &Store, id: StageId, objects: Vec<(&str, Vec<u8>)>) -> FinishedStage {
    let hashed = objects
        .iter()
        .map(|(name, bytes)| (name, sha256_hex(bytes)));
    let inputs: Vec<_> = hashed.collect();
    let opened = open_stage(store, &id, "import", &inputs)
        .await
        .expect("a stage");
    let Opened::Open(writer) = opened else {
        panic!("finished before")
    };
    let mut draft = ManifestDraft::default();
    for (name, bytes) in objects {
        draft.objects.push(
            writer
                .put_object(name, bytes.into())
                .await
                .expect("an object"),
        );
    }
    writer.commit(draft).await.expect("a manifest")
}

/// A store that holds the tiny model and a data set, and what to train there.
async fn world() -> (Store, TrainStage) {
    world_in(Store::memory()).await
}

async fn world_in(store: Store) -> (Store, TrainStage) {
    let weights = tiny::safetensors(&model(), 1);
    let base = vec![
        ("config.json", tiny::config_json(Architecture::Qwen2)),
        ("generation_config.json", b"{}".to_vec()),
        ("tokenizer.json", br#"{"model": {}}"#.to_vec()),
        ("tokenizer_config.json", b"{}".to_vec()),
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
        ("model.safetensors", weights),
    ];
    let base = finished(&store, StageId::models("tiny").expect("a name"), base).await;
    let id = StageId::model_ready("tiny", "world").expect("a name");
    let data = finished(&store, id, vec![("shard.parquet", b"rows".to_vec())]).await;
    let stage = TrainStage {
        model: "tiny".to_owned(),
        dataset: "world".to_owned(),
        base,
        data,
        held_out: None,
        lora: lora(),
        config: TrainConfig {
            max_steps: Some(4),
            save_steps: 2,
            ..config()
        },
        report_to: Vec::new(),
        threads: Threads::new(2).expect("threads"),
    };
    (store, stage)
}

async fn open_source() -> Result<Sources, Error> {
    let train: Arc<dyn ExampleSource> = Arc::new(source(26));
    Ok(train.into())
}

async fn train(store: &Store, stage: &TrainStage) -> Result<Trained, Error> {
    train_stage(
        store,
        stage,
        open_source(),
        &NoProgress,
        &CancelToken::new(),
    )
    .await
}

/// The manifest's bytes and every object it lists.
async fn snapshot(store: &Store, stage: &FinishedStage) -> Vec<(String, Vec<u8>)> {
    let mut objects = Vec::new();
    for object in store.list(&stage.dir()).await.expect("a listing") {
        let bytes = store
            .get(&object.path)
            .await
            .expect("the store")
            .expect("listed");
        objects.push((object.path, bytes.to_vec()));
    }
    objects
}

#[tokio::test(flavor = "multi_thread")]
async fn it_leaves_an_adapter_a_merged_model_and_a_curve() {
    let (store, stage) = world().await;
    let Trained {
        stage: done,
        report,
    } = train(&store, &stage).await.expect("trained");
    assert_eq!(report.expect("this process trained").steps, 4);
    assert!(done.dir().starts_with("done/tiny/world/"));

    let manifest = done.manifest().await.expect("a manifest");
    let names: Vec<&str> = manifest
        .objects
        .iter()
        .map(|object| object.path.as_str())
        .collect();
    let expected = [
        "lora_model/adapter_config.json",
        "lora_model/adapter_model.safetensors",
        "lora_model/README.md",
        "lora_model/chat_template.jinja",
        "lora_model/tokenizer.json",
        "lora_model/tokenizer_config.json",
        "fused/chat_template.jinja",
        "fused/config.json",
        "fused/generation_config.json",
        "fused/tokenizer.json",
        "fused/tokenizer_config.json",
        "fused/model.safetensors",
        "loss.jsonl",
        "loss.svg",
    ];
    assert_eq!(names, expected);
    assert_eq!(
        (manifest.counts["steps"], manifest.counts["examples"]),
        (4, 24)
    );

    let text = async |name: &str| {
        let entry = manifest.object(name).expect(name);
        String::from_utf8(done.read(entry).await.expect(name).to_vec()).expect("text")
    };
    let log: Vec<StepRecord> = parse_log(text("loss.jsonl").await.as_bytes()).expect("a log");
    assert_eq!(log.len(), 4);
    assert_eq!(log[0].learning_rate, 0.0);
    let card = text("lora_model/README.md").await;
    assert!(
        card.starts_with("---\nbase_model: tiny\nlibrary_name: peft\n"),
        "{card}"
    );
    assert!(card.contains("| learning_rate | 0.01 |"), "{card}");

    let fused = load_model_files(&done, "fused")
        .await
        .expect("the merged model opens");
    assert_eq!(fused.config, model());
    let read = async |name: &str| {
        done.read(manifest.object(name).expect(name))
            .await
            .expect(name)
    };
    let adapter_config = read(&format!("lora_model/{}", peft::CONFIG_FILE)).await;
    let adapter_weights = read(&format!("lora_model/{}", peft::WEIGHTS_FILE)).await;
    let adapter =
        peft::read_adapter(&adapter_config, &adapter_weights, &model()).expect("the adapter opens");
    assert_eq!(
        adapter.config().base_model_name_or_path.as_deref(),
        Some("tiny")
    );

    let listed = store.list(&done.dir()).await.expect("a listing");
    assert_eq!(
        listed.len(),
        expected.len() + 1,
        "no checkpoint is left beside the manifest"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sinks_have_every_step_and_decide_nothing() {
    let (store, stage) = world().await;
    let folder = tempfile::tempdir().expect("a folder");
    let sinks = ["jsonl", "tensorboard"].map(|name| Sink::named(name, folder.path()));
    let told = TrainStage {
        report_to: sinks
            .into_iter()
            .collect::<Result<_, _>>()
            .expect("their names"),
        ..stage.clone()
    };
    let done = train(&store, &told).await.expect("trained").stage;
    let lines = std::fs::read_to_string(folder.path().join("metrics.jsonl")).expect("a log");
    assert_eq!(lines.matches("\"grad_norm\"").count(), 4, "{lines}");
    assert!(folder.path().join("runs").is_dir());
    let (other_store, stage) = world().await;
    let untold = train(&other_store, &stage).await.expect("trained").stage;
    assert_eq!(
        snapshot(&other_store, &untold).await,
        snapshot(&store, &done).await
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_weight_trained_it_leaves_a_model_and_a_curve() {
    let (store, stage) = world().await;
    let full = TrainStage {
        lora: LoraConfig::full_fine_tuning(),
        ..stage
    };
    let done = train(&store, &full).await.expect("trained").stage;
    let manifest = done.manifest().await.expect("a manifest");
    let names: Vec<&str> = manifest
        .objects
        .iter()
        .map(|object| &object.path[..])
        .collect();
    assert!(
        names.iter().all(|name| !name.starts_with("lora_model/")),
        "{names:?}"
    );
    assert!(names.contains(&"fused/README.md") && names.contains(&"fused/model.safetensors"));
    let fused = load_model_files(&done, "fused")
        .await
        .expect("the model opens");
    assert_eq!(fused.config, model());
    let again = train(&store, &full).await.expect("found");
    assert!(again.stage.reused());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_stage_costs_one_get_and_no_put() {
    let (store, stage) = world().await;
    train(&store, &stage).await.expect("trained");
    let (counted, calls) = count(&store);
    let never = async { panic!("the data is not needed") };
    let again = train_stage(&counted, &stage, never, &NoProgress, &CancelToken::new())
        .await
        .expect("found");
    assert!(again.report.is_none() && again.stage.reused());
    assert_eq!((calls.reads(), calls.total()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_decides_the_result_decides_the_key_and_nothing_else_does() {
    let (store, stage) = world().await;
    let key = async |stage: &TrainStage| *train(&store, stage).await.expect("trained").stage.key();
    let first = key(&stage).await;
    let same = [
        TrainStage {
            config: TrainConfig {
                save_steps: 1,
                ..stage.config.clone()
            },
            ..stage.clone()
        },
        TrainStage {
            threads: Threads::single(),
            ..stage.clone()
        },
    ];
    for same in &same {
        assert_eq!(key(same).await, first);
    }
    let others = [
        TrainStage {
            config: TrainConfig {
                seed: 1,
                ..stage.config.clone()
            },
            ..stage.clone()
        },
        TrainStage {
            lora: LoraConfig {
                lora_alpha: 4.0,
                ..lora()
            },
            ..stage.clone()
        },
    ];
    for other in &others {
        assert_ne!(key(other).await, first);
    }
}

/// A folder's merged weights are mapped instead of read; the bytes are the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_holds_the_same_bytes_as_any_other_store() {
    let (store, stage) = world().await;
    let anywhere = train(&store, &stage).await.expect("trained").stage;
    let folder = tempfile::tempdir().expect("a folder");
    let store_url = folder.path().to_str().expect("a plain path");
    let (local, stage) = world_in(Store::open(store_url).expect("a store")).await;
    let here = train(&local, &stage).await.expect("trained").stage;
    assert_eq!(
        snapshot(&local, &here).await,
        snapshot(&store, &anywhere).await
    );
}

/// The smallest world with two checkpoints.
async fn small_world() -> (Store, TrainStage) {
    let (store, stage) = world().await;
    let config = TrainConfig {
        max_steps: Some(2),
        save_steps: 1,
        save_total_limit: 1,
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 1,
        ..stage.config
    };
    let threads = Threads::single();
    let stage = TrainStage {
        config,
        threads,
        ..stage
    };
    (store, stage)
}

/// Every fault at every store call, from opening the stage to deleting the last checkpoint.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_store_call_it_ends_in_the_same_bytes() {
    let (store, stage) = small_world().await;
    let (counted, calls) = count(&store);
    let done = train(&counted, &stage).await.expect("trained");
    let whole = snapshot(&store, &done.stage).await;
    let calls = calls.total();
    assert!(calls > 40, "{calls} calls");
    for fault in Fault::ALL {
        for at in 1..=calls {
            let (store, stage) = small_world().await;
            let (faulty, injected) = inject(&store, fault, at);
            let outcome = train(&faulty, &stage).await;
            assert!(injected.struck(), "{fault:?} at {at}");
            let done = match outcome {
                Ok(trained) => trained.stage,
                Err(_) => train(&store, &stage).await.expect("a second life").stage,
            };
            let objects = snapshot(&store, &done).await;
            let (left, committed): (Vec<_>, Vec<_>) = objects
                .into_iter()
                .partition(|(path, _)| path.contains("/checkpoints/"));
            assert_eq!(committed, whole, "{fault:?} at {at}");
            // What a kill left of the checkpoints when the stage stood already can be swept up.
            let id = StageId::done("tiny", "world").expect("a name");
            let garbage = garbage(&store, &id).await.expect("a listing");
            let swept: Vec<_> = garbage.into_iter().map(|object| object.path).collect();
            let left: Vec<_> = left.into_iter().map(|(path, _)| path).collect();
            assert_eq!(swept, left, "{fault:?} at {at}");
        }
    }
}

/// Cancelled ahead of each store call there is, training, exporting or verifying: it stops, commits nothing, and the next
/// run ends in the same bytes.
#[tokio::test(flavor = "multi_thread")]
async fn cancelled_at_any_store_call_it_stops_and_ends_in_the_same_bytes() {
    let (store, stage) = small_world().await;
    let (counted, calls) = count(&store);
    let done = train(&counted, &stage).await.expect("trained");
    let whole = snapshot(&store, &done.stage).await;
    let (mut exporting, mut finished) = (0, 0);
    for at in 1..=calls.total() {
        let (store, stage) = small_world().await;
        let cancel = CancelToken::new();
        let (counted, calls) = count(&store);
        let asking = cancel.clone();
        let watched = watch(&counted, move |call| {
            if call == at {
                asking.cancel();
            }
        });
        let outcome = train_stage(&watched, &stage, open_source(), &NoProgress, &cancel).await;
        let objects = store.list("done/tiny/world").await.expect("a listing");
        let written = |name: &str| objects.iter().any(|object| object.path.contains(name));
        match outcome {
            Ok(_) => finished += 1,
            Err(Error::Cancelled { step }) => {
                assert!(
                    !written("manifest.json") && !written("current.json"),
                    "at {at}"
                );
                if written("/lora_model/") {
                    exporting += 1;
                    assert_eq!(step, 2, "at {at}");
                    // The call that was on its way, and perhaps what it is made of.
                    let more = calls.total() - at;
                    assert!(more <= 1, "{more} calls after {at}");
                }
            }
            Err(error) => panic!("{error} at {at}"),
        }
        let again = train(&store, &stage).await.expect("a second life").stage;
        assert_eq!(snapshot(&store, &again).await, whole, "at {at}");
    }
    assert!(exporting >= 18, "{exporting} while exporting");
    // From its listing on the commit is not stopped; and the checkpoints' deletion is not.
    assert!(finished < 30, "{finished} finished all the same");
}

/// A stage that stands is a success, even if its checkpoints cannot be deleted; they are garbage.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_that_cannot_be_deleted_are_garbage_and_no_error() {
    let (store, stage) = world().await;
    let (counted, calls) = count(&store);
    train(&counted, &stage).await.expect("trained");
    let (store, stage) = world().await;
    let (faulty, injected) = inject(&store, Fault::KillBefore, calls.total());
    let done = train(&faulty, &stage).await.expect("committed").stage;
    assert!(injected.struck());
    let id = StageId::done("tiny", "world").expect("a name");
    let left = garbage(&store, &id).await.expect("a listing");
    assert!(!left.is_empty());
    for object in &left {
        assert!(object.path.contains("/checkpoints/"), "{}", object.path);
        store.delete(&object.path).await.expect("swept");
    }
    let again = train(&store, &stage).await.expect("found").stage;
    assert_eq!(again.key(), done.key());
    for object in &again.manifest().await.expect("a manifest").objects {
        again.read(object).await.expect("it is whole");
    }
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

/// Cancels at the second step, and remembers what it was told.
#[derive(Debug, Default)]
struct Watch {
    cancel: CancelToken,
    seen: Mutex<Vec<Progress>>,
}

impl ProgressSink for Watch {
    fn report(&self, progress: &Progress) {
        self.seen.lock().expect("no panic").push(progress.clone());
        if progress.done == 2 {
            self.cancel.cancel();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_it_says_so_and_continues() {
    let (store, stage) = world().await;
    let stage = TrainStage {
        config: TrainConfig {
            max_steps: Some(400),
            ..stage.config
        },
        ..stage
    };
    let watch = Watch::default();
    let error = train_stage(&store, &stage, open_source(), &watch, &watch.cancel)
        .await
        .expect_err("cancelled");
    let Error::Cancelled { step } = error else {
        panic!("{error}")
    };
    assert!((2..400).contains(&step));

    let first = watch.seen.lock().expect("no panic")[0].clone();
    assert_eq!(
        (
            first.stage.as_str(),
            first.done,
            first.total,
            first.unit.as_str()
        ),
        ("train", 1, Some(400), "steps")
    );
    for metric in ["loss", "learning_rate", "tokens_per_second"] {
        assert!(first.metrics.contains_key(metric), "{metric}");
    }
    let report = train(&store, &stage)
        .await
        .expect("the rest")
        .report
        .expect("trained");
    assert_eq!((report.resumed_from, report.steps), (step, 400));
}

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

#[tokio::test(flavor = "multi_thread")]
async fn held_out_data_is_evaluated_and_decides_the_key() {
    let (store, stage) = world().await;
    let id = StageId::model_ready("tiny", "held-out").expect("a name");
    let held_out = finished(&store, id, vec![("shard.parquet", b"other rows".to_vec())]).await;
    let with = TrainStage {
        held_out: Some(held_out),
        config: TrainConfig {
            eval_steps: Some(3),
            ..stage.config.clone()
        },
        ..stage.clone()
    };
    let sources = async {
        Ok(Sources {
            held_out: Some(Arc::new(source(7))),
            ..open_source().await?
        })
    };
    let trained = train_stage(&store, &with, sources, &NoProgress, &CancelToken::new())
        .await
        .expect("trained");
    let done = trained.stage;
    let manifest = done.manifest().await.expect("a manifest");
    let entry = manifest.object("eval.jsonl").expect("listed");
    let evals = done.read(entry).await.expect("readable");
    let evals: Vec<EvalRecord> = parse_log(&evals).expect("a log");
    assert_eq!(
        evals.iter().map(|eval| eval.step).collect::<Vec<_>>(),
        [3, 4]
    );
    let eval = trained.report.expect("this process trained").eval;
    assert_eq!(eval.as_ref(), evals.last());
    assert_eq!(manifest.attributes["eval_step"], 4);
    let without = train(&store, &stage).await.expect("trained").stage;
    assert_ne!(done.key(), without.key());
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
