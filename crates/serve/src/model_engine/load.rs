//! From a source to a running engine.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use candle_core::Device;
use updraft_chat::{Chat, ChatFiles, TemplateFiles};
use updraft_model::{Decoder, ModelConfig, ModelFiles, Threads, load_model_files, peft};

use super::source::{Found, Kind, ModelSource, Place, find};
use super::{EngineOptions, ModelEngine, ServedAdapter, ServedModel};
use crate::conventions;
use crate::error::{BoxError, Error, Result};

/// An adapter to serve over a base model.
#[derive(Debug, Clone)]
pub struct AdapterSource {
    /// The id in requests.
    pub name: String,
    /// Where `adapter_config.json` and `adapter_model.safetensors` are.
    pub source: ModelSource,
}

impl ModelEngine {
    /// Loads a model and its adapters and starts serving them, the model as `name`.
    ///
    /// Weights on this machine are mapped, elsewhere fetched. On the CPU what is stored in bf16 stays so, and
    /// other number types are converted once to f32, unless
    /// [quantization](EngineOptions::quantization) is asked for; everything is computed in f32. A GPU computes in
    /// the type that the weights are stored in, with sums in f32; in f16 instead of bf16 before `sm_80`.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::NoSuchStage`], [`Error::Read`] and [`Error::Load`] say
    /// what is wrong with the model and what to do; [`Error::Options`] what is wrong with the
    /// options.
    pub async fn load(
        name: impl Into<String>,
        source: &ModelSource,
        adapters: &[AdapterSource],
        threads: &Threads,
        options: &EngineOptions,
    ) -> Result<Self> {
        let name = name.into();
        options.check_compute()?;
        let found = find(source, Kind::Model).await?;
        let files = model_files(&found).await?;
        let mut served = Vec::with_capacity(adapters.len());
        for adapter in adapters {
            served.push(load_adapter(adapter, &files.config).await?);
        }
        let (root, threads) = (found.root, threads.clone());
        let options = options.clone();
        blocking(move || {
            // The tokenizer's vocabulary takes about as long as the weights.
            let (chat, decoder) = std::thread::scope(|scope| {
                let chat = scope.spawn(|| load_chat(&root, &files));
                let decoder = load_decoder(&files, &options, &threads);
                (chat.join(), decoder)
            });
            let file = |name: &str| files.files.get(name).map(Bytes::as_ref);
            let sampling = conventions::sampling(file("generation_config.json"));
            let text_prefix = conventions::text_prefix(file("tokenizer.json"));
            let model = ServedModel {
                chat: chat.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
                decoder: decoder.map_err(|source| failed(&root, source))?,
                sampling: sampling.map_err(|error| failed(&root, error))?,
                text_prefix: text_prefix.map_err(|error| failed(&root, error))?,
                name,
                root,
                adapters: served,
            };
            Self::new(model, &options)
        })
        .await
    }
}

async fn model_files(found: &Found) -> Result<ModelFiles> {
    let files = match &found.place {
        Place::Folder(folder) => {
            let folder = folder.clone();
            blocking(move || Ok(ModelFiles::from_dir(&folder))).await?
        }
        Place::Stage(stage, below) => load_model_files(stage, below).await,
    };
    files.map_err(|error| match error {
        updraft_model::Error::MissingFile { folder, file, next } => Error::MissingFile {
            model: folder,
            file,
            next_step: next,
        },
        other => failed(&found.root, other),
    })
}

fn load_decoder(
    files: &ModelFiles,
    options: &EngineOptions,
    threads: &Threads,
) -> updraft_model::Result<Decoder> {
    let (config, weights) = (&files.config, &files.weights);
    match options.quantization {
        None => Decoder::load_as_stored(options.compute, config, weights, threads),
        Some(quantization) => {
            Decoder::load_quantized(config, weights, quantization, &Device::Cpu, threads)
        }
    }
}

fn load_chat(root: &str, files: &ModelFiles) -> Result<Chat> {
    let file = |name: &str| files.files.get(name).map(Bytes::as_ref);
    let missing = |file, next_step| Error::MissingFile {
        model: root.to_owned(),
        file,
        next_step,
    };
    let tokenizer_json = file("tokenizer.json").ok_or_else(|| {
        missing(
            "tokenizer.json",
            "save the model's tokenizer beside its weights",
        )
    })?;
    let chat = Chat::from_files(&ChatFiles {
        tokenizer_json,
        template: TemplateFiles {
            chat_template_jinja: file("chat_template.jinja"),
            tokenizer_config: file("tokenizer_config.json"),
            chat_template_json: file("chat_template.json"),
            special_tokens_map: file("special_tokens_map.json"),
            additional_chat_templates: &[],
        },
        generation_config: file("generation_config.json"),
    });
    chat.map_err(|error| match error {
        updraft_chat::Error::NoTemplate => {
            let next_step = "add chat_template.jinja, or serve the model's instruct variant";
            missing("chat template", next_step)
        }
        other => failed(root, other),
    })
}

pub(super) async fn load_adapter(
    adapter: &AdapterSource,
    base: &ModelConfig,
) -> Result<ServedAdapter> {
    let found = find(&adapter.source, Kind::Adapter).await?;
    let config = adapter_file(&found, "adapter_config.json").await?;
    let weights = adapter_file(&found, "adapter_model.safetensors").await?;
    let (base, root) = (base.clone(), found.root.clone());
    let loaded = blocking(move || {
        let loaded = peft::read_adapter(&config, &weights, &base);
        loaded.map_err(|source| failed(&root, source))
    });
    let loaded = loaded.await?;
    if loaded.saves_modules() {
        let reason = "it holds whole modules (modules_to_save), which requests with other adapters \
                      cannot share; serve its merged model";
        return Err(failed(&found.root, reason));
    }
    let name = adapter.name.clone();
    Ok(ServedAdapter {
        name,
        root: found.root,
        adapter: Arc::new(loaded),
    })
}

async fn adapter_file(found: &Found, file: &'static str) -> Result<Bytes> {
    let bytes = match &found.place {
        Place::Folder(folder) => {
            let path = folder.join(file);
            blocking(move || read_file(&path)).await?
        }
        Place::Stage(stage, below) => {
            let failed = |source: updraft_store::Error| failed(&found.root, source);
            let manifest = stage.manifest().await.map_err(failed)?;
            let path = format!("{below}/{file}");
            match manifest.objects.iter().find(|object| object.path == path) {
                Some(object) => Some(stage.read(object).await.map_err(failed)?),
                None => None,
            }
        }
    };
    bytes.ok_or_else(|| Error::MissingFile {
        model: found.root.clone(),
        file,
        next_step: "name the folder of a PEFT adapter",
    })
}

fn read_file(path: &Path) -> Result<Option<Bytes>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes.into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            path: path.display().to_string(),
            source: source.into(),
        }),
    }
}

/// Runs what takes a while on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => Err(Error::Step {
            source: panic.into(),
        }),
    }
}

fn failed(root: &str, source: impl Into<BoxError>) -> Error {
    Error::Load {
        model: root.to_owned(),
        source: source.into(),
    }
}
