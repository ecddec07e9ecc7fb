//! The stage: from a base model and data in a store to an adapter and a merged
//! model there.

mod refusals;
mod stops;
mod workers;

use std::sync::Arc;

use updraft_model::{Architecture, Compute, LoraConfig, Threads, load_model_files, peft, tiny};
use updraft_store::faults::count;
use updraft_store::{
    CancelToken, FinishedStage, ManifestDraft, NoProgress, Opened, StageId, Store, open_stage,
    sha256_hex,
};
use updraft_train::metrics::{Sink, parse_log};
use updraft_train::{
    Error, EvalRecord, ExampleSource, Sources, StepRecord, TrainConfig, TrainStage, Trained,
    train_stage,
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
        compute: Compute::Cpu,
        launch: None,
        threads: Threads::new(2).expect("threads"),
    };
    (store, stage)
}

/// Trained in f16 on a GPU, whatever verifies it computes on the CPU.
#[cfg(all(feature = "cuda-emulator", not(feature = "cuda")))] // then `cuda` names the emulator
#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_trains_a_stage() {
    let (store, on_cpu) = world().await;
    let expected = train(&store, &on_cpu).await.expect("trained").stage;
    let on_gpu = TrainStage {
        compute: Compute::Cuda(0),
        ..on_cpu.clone()
    };
    let again = train(&store, &on_gpu).await.expect("found");
    assert!(
        again.report.is_none(),
        "where it was trained is not part of its key"
    );

    let (store, on_gpu) = world().await;
    let on_gpu = TrainStage {
        compute: Compute::Cuda(0),
        config: TrainConfig {
            fp16: true,
            ..on_gpu.config
        },
        ..on_gpu
    };
    let Trained { stage, report } = train(&store, &on_gpu).await.expect("trained");
    let report = report.expect("this process trained");
    assert!(report.peak_gpu_memory_bytes.is_some_and(|bytes| bytes > 0));
    let loss = |manifest: &updraft_store::Manifest| manifest.attributes["train_loss"].as_f64();
    let here = loss(&expected.manifest().await.expect("a manifest")).expect("a loss");
    let there = loss(&stage.manifest().await.expect("a manifest")).expect("a loss");
    assert!((here / there - 1.0).abs() < 1e-2, "{here} {there}");
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
            compute: Compute::Cpu,
            launch: None,
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
