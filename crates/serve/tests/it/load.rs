//! Models from folders and stores, and what is said when something is missing.

use std::path::Path;
use std::sync::Arc;

use futures::{StreamExt, stream};
use serde_json::{Map, Value, json};
use tokio::io::AsyncReadExt;
use updraft_model::{Adapter, Architecture, LoraConfig, ModelConfig, Threads, merge, peft, tiny};
use updraft_serve::{
    AdapterSource, EngineOptions, Error, ModelEngine, ModelSource, Result, ServeOptions,
};
use updraft_store::{ManifestDraft, Opened, StageId, Store, open_stage};

use crate::client::Server;

const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The files of a tiny model, by name.
pub(crate) fn model_files() -> Vec<(&'static str, Vec<u8>)> {
    let mut config: Value =
        serde_json::from_slice(&tiny::config_json(Architecture::Qwen2)).expect("JSON");
    config["vocab_size"] = json!(258);
    let config = serde_json::to_vec(&config).expect("JSON");
    let weights = tiny::safetensors(&ModelConfig::from_json(&config).expect("sound"), 3);
    vec![
        ("config.json", config),
        ("model.safetensors", weights),
        ("tokenizer.json", tokenizer().to_string().into_bytes()),
        (
            "tokenizer_config.json",
            br#"{"eos_token": "<|im_end|>"}"#.to_vec(),
        ),
        ("chat_template.jinja", TEMPLATE.into()),
        (
            "generation_config.json",
            br#"{"eos_token_id": 257}"#.to_vec(),
        ),
    ]
}

/// A byte-level BPE without merges: one token per byte, and two control tokens.
fn tokenizer() -> Value {
    // GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100.
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    let mut vocab = Map::new();
    for byte in 0..=u8::MAX {
        let symbol = if printable(byte) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).expect("a letter")
        };
        vocab.insert(symbol.to_string(), json!(byte));
    }
    let added = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false,
        })
    };
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [added(256, "<|im_start|>"), added(257, "<|im_end|>")],
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

pub(crate) fn adapter(config: &ModelConfig) -> Adapter {
    let lora = LoraConfig {
        r: 4,
        ..LoraConfig::default()
    };
    let device = candle_core::Device::Cpu;
    let mut adapter = Adapter::init(&lora, config, 1, &device).expect("sound settings");
    adapter
        .update(|values| {
            for (index, value) in values.iter_mut().enumerate() {
                *value = (updraft_serve::uniform(9, index as u64) - 0.5) as f32;
            }
        })
        .expect("on the CPU");
    adapter
}

/// What training leaves: the adapter, and the base with the adapter merged into it.
pub(crate) fn done_files() -> Vec<(String, Vec<u8>)> {
    let base = model_files();
    let config = ModelConfig::from_json(&base[0].1).expect("sound");
    let weights = tiny::weights(&config, 3);
    let adapter = adapter(&config);
    let lora = peft::write_adapter(&adapter).expect("sound");
    let mut files = vec![
        (
            "lora_model/adapter_config.json".to_owned(),
            lora.config_json,
        ),
        (
            "lora_model/adapter_model.safetensors".to_owned(),
            lora.safetensors,
        ),
    ];
    for file in merge::merge(&weights, &config, &adapter).expect("it fits") {
        let (name, bytes) = file.expect("f32");
        files.push((format!("fused/{name}"), bytes));
    }
    let others = base
        .into_iter()
        .filter(|(name, _)| *name != "model.safetensors");
    files.extend(others.map(|(name, bytes)| (format!("fused/{name}"), bytes)));
    files
}

pub(crate) fn write(folder: &Path, files: &[(&str, Vec<u8>)]) {
    for (name, bytes) in files {
        std::fs::write(folder.join(name), bytes).expect("a temporary folder");
    }
}

pub(crate) async fn commit<N: AsRef<str>>(store: &Store, id: &StageId, files: Vec<(N, Vec<u8>)>) {
    let inputs = json!({"test": id.to_string()});
    let Opened::Open(stage) = open_stage(store, id, "test", &inputs)
        .await
        .expect("a store")
    else {
        panic!("the store is new");
    };
    let mut objects = Vec::new();
    for (name, bytes) in files {
        objects.push(
            stage
                .put_object(name.as_ref(), bytes.into())
                .await
                .expect("written"),
        );
    }
    let draft = ManifestDraft {
        objects,
        ..ManifestDraft::default()
    };
    stage.commit(draft).await.expect("committed");
}

pub(crate) async fn load(source: &ModelSource, adapters: &[AdapterSource]) -> Result<ModelEngine> {
    let options = EngineOptions::default();
    ModelEngine::load("tiny", source, adapters, &Threads::single(), &options).await
}

async fn refused(source: &ModelSource) -> String {
    let error = load(source, &[]).await.expect_err("it cannot be served");
    let message = error.to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

/// What a model says to a fixed question; the same each time.
pub(crate) async fn ask(server: &Server, model: &str) -> String {
    let body = json!({
        "model": model, "messages": [{"role": "user", "content": "How many?"}],
        "temperature": 0, "max_tokens": 24, "logprobs": true,
    });
    let answer = server.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["choices"][0]["message"]["content"]
        .as_str()
        .expect("text")
        .to_owned()
}

pub(crate) async fn serve(engine: ModelEngine) -> Server {
    Server::start(Arc::new(engine), ServeOptions::default()).await
}

/// The same folder on a GPU answers the same, log-probabilities or not, and says what it does not do.
#[cfg(all(feature = "cuda-emulator", not(feature = "cuda")))] // then `cuda` names the emulator
#[tokio::test]
async fn a_gpu_serves_a_folder() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), &model_files());
    let source = ModelSource::folder(folder.path());
    let on_gpu = EngineOptions {
        kv_cache_bytes: Some(4 << 20),
        ..EngineOptions::for_compute(updraft_model::Compute::Cuda(0))
    };
    let load_with = async |options: &EngineOptions| {
        ModelEngine::load("tiny", &source, &[], &Threads::single(), options).await
    };
    let here = serve(load(&source, &[]).await.expect("it loads")).await;
    let there = serve(load_with(&on_gpu).await.expect("it loads")).await;
    assert_eq!(ask(&there, "tiny").await, ask(&here, "tiny").await);
    let body = json!({
        "messages": [{"role": "user", "content": "How many?"}], "temperature": 0, "max_tokens": 24,
    });
    let plain = there.post("/v1/chat/completions", &body).await.json();
    let answer = &plain["choices"][0]["message"]["content"];
    assert_eq!(answer, &json!(ask(&here, "tiny").await));
    let quantized = EngineOptions {
        quantization: Some(updraft_model::Quantization::Q8_0),
        ..on_gpu
    };
    let refused = load_with(&quantized).await.expect_err("not on a GPU");
    assert!(
        refused.to_string().contains("or serve on the CPU"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_folder_is_served_and_streams_what_it_answers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), &model_files());
    let server = serve(
        load(&ModelSource::folder(folder.path()), &[])
            .await
            .expect("it loads"),
    )
    .await;
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["max_model_len"], 256);
    let body = json!({
        "messages": [{"role": "user", "content": "é"}], "temperature": 0, "max_tokens": 40,
    });
    let whole = server.post("/v1/chat/completions", &body).await.json();
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let chunks = server
        .post("/v1/chat/completions", &streamed)
        .await
        .chunks();
    let text = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(
        whole["choices"][0]["message"]["content"],
        text.collect::<String>()
    );
    // <|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n
    assert_eq!(whole["usage"]["prompt_tokens"], 1 + 5 + 2 + 1 + 1 + 1 + 10);
}

#[tokio::test]
async fn stages_are_served_from_folders_and_objects_alike() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let local = Store::open(folder.path().to_str().expect("UTF-8")).expect("a folder");
    let mut answers = Vec::new();
    for store in [local, Store::memory()] {
        commit(
            &store,
            &StageId::models("tiny").expect("a name"),
            model_files(),
        )
        .await;
        commit(
            &store,
            &StageId::done("tiny", "letters").expect("a name"),
            done_files(),
        )
        .await;
        let tuned = ModelSource::stage(&store, "done/tiny/letters");
        let adapter = AdapterSource {
            name: "lora".into(),
            source: tuned.clone(),
        };
        let base = load(&ModelSource::stage(&store, "models/tiny"), &[adapter])
            .await
            .expect("base");
        let base = serve(base).await;
        let tuned = serve(load(&tuned, &[]).await.expect("tuned")).await;
        let models = base.get("/v1/models").await.json();
        assert_eq!(models["data"][1]["id"], "lora");
        assert_eq!(models["data"][1]["parent"], "tiny");
        let (plain, lora, fused) = (
            ask(&base, "tiny").await,
            ask(&base, "lora").await,
            ask(&tuned, "tiny").await,
        );
        assert_ne!(plain, lora, "the adapter does something");
        assert_eq!(lora, fused, "unmerged and merged answer alike");
        answers.push((plain, lora));
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test]
async fn what_is_missing_is_named_with_the_next_step() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path();
    let source = ModelSource::folder(path);
    assert!(
        refused(&ModelSource::folder(path.join("nowhere")))
            .await
            .contains("nowhere")
    );
    for (file, words) in [
        (
            "tokenizer.json",
            "has no tokenizer.json; save the model's tokenizer",
        ),
        (
            "chat_template.jinja",
            "has no chat template; add chat_template.jinja",
        ),
        ("config.json", "has no config.json; give a model folder"),
        ("model.safetensors", "has no model.safetensors; "),
    ] {
        write(path, &model_files());
        std::fs::remove_file(path.join(file)).expect("it was there");
        let message = refused(&source).await;
        assert!(message.contains(words), "{file}: {message}");
    }
    write(path, &model_files());
    std::fs::write(path.join("model.safetensors"), b"truncated").expect("written");
    assert!(refused(&source).await.contains("cannot load"));
}

#[tokio::test]
async fn stages_that_cannot_be_served_are_named() {
    let store = Store::memory();
    for (name, words) in [
        ("models/none", "memory:// holds no finished `models/none`"),
        ("done/none/letters", "holds no finished"),
        ("standardized/letters", "is data"),
        ("nonsense", "cannot load"),
    ] {
        let message = refused(&ModelSource::stage(&store, name)).await;
        assert!(message.contains(words), "{name}: {message}");
    }
}

#[tokio::test]
async fn two_names_cannot_be_the_same() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), &model_files());
    let lora = tempfile::tempdir().expect("a temporary folder");
    let config = ModelConfig::from_json(&model_files()[0].1).expect("sound");
    let files = peft::write_adapter(&adapter(&config)).expect("sound");
    write(
        lora.path(),
        &[
            ("adapter_config.json", files.config_json),
            ("adapter_model.safetensors", files.safetensors),
        ],
    );
    let adapter = AdapterSource {
        name: "tiny".into(),
        source: ModelSource::folder(lora.path()),
    };
    let error = load(&ModelSource::folder(folder.path()), &[adapter]).await;
    assert!(
        error
            .expect_err("a name twice")
            .to_string()
            .contains("`tiny`")
    );
}

#[tokio::test]
async fn an_adapter_with_whole_modules_is_refused_for_its_merged_model() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), &model_files());
    let config = ModelConfig::from_json(&model_files()[0].1).expect("sound");
    let lora = LoraConfig {
        modules_to_save: vec!["lm_head".to_owned()],
        ..LoraConfig::default()
    };
    let device = candle_core::Device::Cpu;
    let saving = Adapter::init_over(&lora, &config, &tiny::weights(&config, 3), 1, &device);
    let files = peft::write_adapter(&saving.expect("sound settings")).expect("sound");
    let lora = tempfile::tempdir().expect("a temporary folder");
    write(
        lora.path(),
        &[
            ("adapter_config.json", files.config_json),
            ("adapter_model.safetensors", files.safetensors),
        ],
    );
    let adapter = AdapterSource {
        name: "lora".into(),
        source: ModelSource::folder(lora.path()),
    };
    let refused = load(&ModelSource::folder(folder.path()), &[adapter]).await;
    let Err(Error::Load { source, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(
        source.to_string().contains("serve its merged model"),
        "{source}"
    );
}

/// A thousand clients that ask and vanish: before the answer, within it, or not at all. Nothing of
/// them is left: no block, no place in the batch, no task, no response.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_that_vanish_leave_nothing_behind() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), &model_files());
    let source = ModelSource::folder(folder.path());
    let server = serve(load(&source, &[]).await.expect("it loads")).await;
    let expected = ask(&server, "tiny").await;
    let tasks = tokio::runtime::Handle::current().metrics();
    until_idle(&server).await;
    let before = tasks.num_alive_tasks();
    let clients = (0..1000u64).map(|client| {
        let server = &server;
        let body = json!({
            "messages": [{"role": "user", "content": "x".repeat(client as usize % 60)}],
            "stream": !client.is_multiple_of(3), "n": 1 + client % 2, "max_tokens": 100,
            "seed": client,
        });
        async move {
            let path = "/v1/chat/completions";
            let headers = "Content-Type: application/json\r\n";
            let body = body.to_string();
            let mut connection = server.send("POST", path, headers, Some(&body)).await;
            let mut read = vec![0; (updraft_serve::uniform(3, client) * 4000.0) as usize];
            if !client.is_multiple_of(4) {
                // Whoever gets an answer shorter than this goes at its end.
                let _ = connection.read_exact(&mut read).await;
            }
        }
    });
    stream::iter(clients).buffer_unordered(100).count().await;
    until_idle(&server).await;
    for _ in 0..500 {
        if tasks.num_alive_tasks() <= before {
            let after = ask(&server, "tiny").await;
            assert_eq!(after, expected, "and it answers as before");
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("{} tasks are left of {before}", tasks.num_alive_tasks());
}

/// Until nothing runs, nothing waits and every block is free.
async fn until_idle(server: &Server) {
    for _ in 0..500 {
        let metrics = server.get("/metrics").await.body;
        let idle = [
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
        ];
        let label = "{model_name=\"tiny\",engine=\"0\"}";
        if idle
            .iter()
            .all(|name| metrics.contains(&format!("vllm:{name}{label} 0\n")))
        {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("something is left: {}", server.get("/metrics").await.body);
}
