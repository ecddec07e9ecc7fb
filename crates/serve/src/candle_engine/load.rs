//! A model folder for candle-transformers.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;
use updraft_chat::{Chat, ChatFiles, TemplateFiles};
use updraft_model::{INDEX_FILE, SINGLE_FILE};

use super::architecture::{OneSequence, build};
use super::config::{ModelSettings, settings};
use crate::conventions;
use crate::error::{BoxError, Error, Result};
use crate::sampling::SamplingDefaults;

/// A model ready to run.
pub(super) struct Loaded {
    pub(super) model: Box<dyn OneSequence>,
    pub(super) settings: ModelSettings,
}

/// Builds the model of a folder as transformers writes it, in f32.
///
/// # Errors
/// [`Error::Read`] for a file, [`Error::Load`] for what is in it.
pub(super) fn load_model(folder: &Path) -> Result<Loaded> {
    let failed = |source: BoxError| Error::Load {
        model: folder.display().to_string(),
        source,
    };
    let mut settings = settings(&read(&folder.join("config.json"))?).map_err(failed)?;
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for path in weight_files(folder)? {
        let of_file = candle_core::safetensors::load(&path, &Device::Cpu);
        for (name, tensor) in of_file.map_err(|error| failed(error.into()))? {
            let tensor = tensor.to_dtype(DType::F32);
            tensors.insert(name, tensor.map_err(|error| failed(error.into()))?);
        }
    }
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let config = settings.config.take();
    let model = build(&settings.model_type, config, weights).map_err(failed)?;
    Ok(Loaded { model, settings })
}

/// The folder's tokenizer and template.
///
/// # Errors
/// [`Error::Read`] and [`Error::Load`] as for the model.
pub(super) fn load_chat(folder: &Path) -> Result<Chat> {
    let optional = |name: &str| std::fs::read(folder.join(name)).ok();
    let tokenizer_json = read(&folder.join("tokenizer.json"))?;
    let (template, config) = (
        optional("chat_template.jinja"),
        optional("tokenizer_config.json"),
    );
    let chat = Chat::from_files(&ChatFiles {
        tokenizer_json: &tokenizer_json,
        template: TemplateFiles {
            chat_template_jinja: template.as_deref(),
            tokenizer_config: config.as_deref(),
            ..TemplateFiles::default()
        },
        generation_config: optional("generation_config.json").as_deref(),
    });
    chat.map_err(|error| Error::Load {
        model: folder.display().to_string(),
        source: error.into(),
    })
}

/// What the folder's files say about using the model: sampling, and what begins a text.
///
/// # Errors
/// [`Error::Load`] for a file that says something else.
pub(super) fn load_conventions(folder: &Path) -> Result<(SamplingDefaults, Vec<u32>)> {
    let failed = |error: serde_json::Error| Error::Load {
        model: folder.display().to_string(),
        source: error.into(),
    };
    let file = |name: &str| std::fs::read(folder.join(name)).ok();
    let sampling = conventions::sampling(file("generation_config.json").as_deref());
    let text_prefix = conventions::text_prefix(file("tokenizer.json").as_deref());
    Ok((sampling.map_err(failed)?, text_prefix.map_err(failed)?))
}

/// The one weight file, or those the index names.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join(INDEX_FILE);
    if !index.exists() {
        return Ok(vec![folder.join(SINGLE_FILE)]);
    }
    let wrong = |source: BoxError| Error::Read {
        path: index.display().to_string(),
        source,
    };
    let parsed: Value =
        serde_json::from_slice(&read(&index)?).map_err(|error| wrong(error.into()))?;
    let names = parsed["weight_map"].as_object().into_iter().flatten();
    let names: BTreeSet<&str> = names.filter_map(|(_, name)| name.as_str()).collect();
    if let Some(name) = names.iter().find(|name| name.contains(['/', '\\'])) {
        return Err(wrong(
            format!("{name:?} is not a weight file's name").into(),
        ));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Read {
        path: path.display().to_string(),
        source: source.into(),
    })
}
