//! A model's files, opened from a folder or from a stage in the store.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;
use updraft_store::{FinishedStage, sha256_hex};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::weights::{INDEX_FILE, Index, SINGLE_FILE, Weights, map_file};

/// The file every model has.
pub(crate) const CONFIG_FILE: &str = "config.json";
/// The tokenizer, whole.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";

/// A model as transformers lays it out: its configuration, its weights, and the small files.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// `config.json`, parsed.
    pub config: ModelConfig,
    /// The weights, mapped where they lie on this machine.
    pub weights: Weights,
    /// Every file that is not weights, by name: `config.json` and `generation_config.json`, the
    /// tokenizer's files, the chat template.
    pub files: BTreeMap<String, Bytes>,
}

/// Whether a file of a model folder or repository is any use to us or to those who load our copy.
pub(crate) fn is_small_file(name: &str) -> bool {
    const NAMES: [&str; 8] = [
        CONFIG_FILE,
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "preprocessor_config.json",
    ];
    let known =
        NAMES.contains(&name) || name.starts_with("tokenizer") || name.starts_with("chat_template");
    known
        && [".json", ".jinja", ".txt", ".model"]
            .iter()
            .any(|end| name.ends_with(end))
}

impl ModelFiles {
    /// Opens a model folder.
    ///
    /// # Errors
    /// [`Error::MissingFile`] without `config.json` or weights, and those of
    /// [`ModelConfig::from_json`] and [`Weights::from_dir`].
    pub fn from_dir(folder: &Path) -> Result<Self> {
        let io = |source| Error::Io {
            path: folder.to_owned(),
            source,
        };
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let Some(name) = path
                .file_name()
                .and_then(|name| name.to_str())
                .filter(|name| is_small_file(name))
            else {
                continue;
            };
            let bytes = std::fs::read(&path).map_err(|source| Error::Io {
                path: path.clone(),
                source,
            })?;
            files.insert(name.to_owned(), bytes.into());
        }
        Self::new(&folder.display().to_string(), files, |_| {
            Weights::from_dir(folder)
        })
    }

    /// Names the content: the SHA-256 of every file's name and SHA-256, weights, tokenizer and
    /// template included. It reads all of the weights.
    pub fn fingerprint(&self) -> String {
        let small = self.files.iter();
        let shards = self.weights.shards().iter();
        let all = small.chain(shards.map(|shard| (&shard.name, &shard.bytes)));
        let lines = all.map(|(name, bytes)| format!("{} {name}\n", sha256_hex(bytes)));
        sha256_hex(lines.collect::<String>().as_bytes())
    }

    fn new(
        folder: &str,
        files: BTreeMap<String, Bytes>,
        weights: impl FnOnce(&ModelConfig) -> Result<Weights>,
    ) -> Result<Self> {
        let config =
            ModelConfig::from_json(required(files.get(CONFIG_FILE), folder, CONFIG_FILE)?)?;
        Ok(Self {
            weights: weights(&config)?,
            config,
            files,
        })
    }
}

/// The configuration of the model that a stage holds, without its weights; `prefix` as for
/// [`load_model_files`].
///
/// # Errors
/// [`Error::Store`]; [`Error::MissingFile`] if there is none; those of [`ModelConfig::from_json`].
pub async fn load_model_config(stage: &FinishedStage, prefix: &str) -> Result<ModelConfig> {
    let manifest = stage.manifest().await?;
    let path = match prefix.trim_end_matches('/') {
        "" => CONFIG_FILE.to_owned(),
        prefix => format!("{prefix}/{CONFIG_FILE}"),
    };
    let folder = stage.store().url_of(&stage.path(prefix));
    let object = required(manifest.object(&path), &folder, CONFIG_FILE)?;
    ModelConfig::from_json(&stage.read(object).await?)
}

/// Opens the model that a stage holds, in its folder itself (`prefix` is `""`, as in `models/…`)
/// or in one below it (`"fused"` in `done/…`).
///
/// In a local store the weights are mapped where they lie; from others they are downloaded into memory.
///
/// # Errors
/// [`Error::Store`] if the store fails or an object is not what the manifest says;
/// [`Error::MissingFile`] if the stage holds no model there; those of [`ModelConfig::from_json`]
/// and [`Weights::from_files`].
pub async fn load_model_files(stage: &FinishedStage, prefix: &str) -> Result<ModelFiles> {
    let manifest = stage.manifest().await?;
    let folder = if prefix.is_empty() {
        String::new()
    } else {
        format!("{}/", prefix.trim_end_matches('/'))
    };
    let own: Vec<_> = manifest
        .objects
        .iter()
        .filter_map(|object| Some((object.path.strip_prefix(&folder)?, object)))
        .filter(|(name, _)| !name.contains('/'))
        .collect();
    let mut files = BTreeMap::new();
    for (name, object) in own
        .iter()
        .filter(|(name, _)| is_small_file(name) || *name == INDEX_FILE)
    {
        files.insert((*name).to_owned(), stage.read(object).await?);
    }
    let mut weights: Vec<_> = files
        .remove(INDEX_FILE)
        .map(|index| (INDEX_FILE.to_owned(), index))
        .into_iter()
        .collect();
    let shards = match weights.first() {
        Some((_, index)) => Index::parse(index)?.files(),
        None => BTreeSet::from([SINGLE_FILE.to_owned()]),
    };
    for (name, object) in own.iter().filter(|(name, _)| shards.contains(*name)) {
        let bytes = match stage.store().local_path(&stage.path(&object.path)) {
            Some(path) => map_file(&path)?,
            None => stage.read(object).await?,
        };
        if bytes.len() as u64 != object.bytes {
            let reason = format!(
                "{} bytes where the manifest says {}",
                bytes.len(),
                object.bytes
            );
            return Err(Error::Corrupt {
                file: (*name).to_owned(),
                reason,
            });
        }
        weights.push(((*name).to_owned(), bytes));
    }
    let folder = stage.store().url_of(&stage.path(prefix));
    ModelFiles::new(&folder, files, |_| Weights::from_files(weights))
}

/// A file that must be there.
pub(crate) fn required<T>(found: Option<T>, folder: &str, file: &'static str) -> Result<T> {
    let next = match file {
        TOKENIZER_FILE => {
            "save the tokenizer beside the model in its fast form (tokenizer.save_pretrained)"
        }
        _ => "give a model folder as transformers writes it, or a Hub id such as Qwen/Qwen2.5-0.5B",
    };
    found.ok_or_else(|| Error::MissingFile {
        folder: folder.to_owned(),
        file,
        next,
    })
}
