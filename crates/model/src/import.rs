//! The import stage: a model folder or Hub repository into the store, checked before it is believed.

mod copy;
mod source;

use std::collections::{BTreeMap, BTreeSet};

use safetensors::tensor::Metadata;
use serde_json::{Value, json};
use updraft_store::{
    CancelToken, FinishedStage, ManifestDraft, Opened, ProgressSink, StageId, Store, open_stage,
};

use self::copy::{Copy, SEGMENT_BYTES};
use self::source::{Source, SourceFile};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model_files::{CONFIG_FILE, TOKENIZER_FILE, is_small_file, required};
use crate::weights::{INDEX_FILE, Index, SINGLE_FILE, header_len, missing_weights, parse_header};

/// Goes up when the same source would give other objects.
const STAGE_VERSION: u32 = 1;

/// Copies a model into the store as `models/<name>/<key16>/`: configuration, safetensors weights,
/// tokenizer, template. `source` is a folder, or a Hub id with an optional revision
/// (`Qwen/Qwen2.5-0.5B@main`).
///
/// Before anything is copied, the configuration must be of a family the decoder runs, a
/// `tokenizer.json` must be there, and the weight files' headers must hold exactly what the
/// configuration needs. Pickled weights are never read. A second call with the same source writes nothing;
/// one after a kill goes on in the file it was at, with the segments of it that have come.
///
/// # Errors
/// [`Error::MissingFile`] names what the source lacks; those of [`ModelConfig::from_json`];
/// [`Error::Corrupt`], [`Error::MissingTensor`], [`Error::Shape`] for unsound weights;
/// [`Error::Cancelled`]; [`Error::Store`] if the store or the Hub fails.
pub async fn import_model(
    store: &Store,
    name: &str,
    source: &str,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<FinishedStage> {
    let id = StageId::models(name)?;
    let source = Source::open(source).await?;
    import(store, &id, &source, SEGMENT_BYTES, progress, cancel).await
}

async fn import(
    store: &Store,
    id: &StageId,
    source: &Source,
    segment_bytes: u64,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<FinishedStage> {
    let model = Model::examine(source).await?;
    let files = source.identify(model.files, cancel).await?;
    let inputs = json!({ "files": ids(&files), "version": STAGE_VERSION });
    let writer = match open_stage(store, id, "import", &inputs).await? {
        Opened::Finished(stage) => return Ok(stage),
        Opened::Open(writer) => writer,
    };
    let copy = Copy {
        source,
        writer: &writer,
        segment_bytes,
        progress,
        cancel,
    };
    let objects = copy.all(&files).await?;
    let counts = BTreeMap::from([
        (
            "bytes".to_owned(),
            objects.iter().map(|object| object.bytes).sum(),
        ),
        ("parameters".to_owned(), model.config.num_parameters()),
    ]);
    let attributes = BTreeMap::from([(
        "model_type".to_owned(),
        json!(model.config.architecture.model_type()),
    )]);
    Ok(writer
        .commit(ManifestDraft {
            objects,
            counts,
            attributes,
            ..ManifestDraft::default()
        })
        .await?)
}

/// What a source turned out to hold.
struct Model {
    config: ModelConfig,
    /// The files to copy, sorted by name.
    files: Vec<SourceFile>,
}

impl Model {
    async fn examine(source: &Source) -> Result<Self> {
        let all = source.files()?;
        let find = |name: &str| all.iter().find(|file| file.name == name);
        let file = required(find(CONFIG_FILE), &source.name(), CONFIG_FILE)?;
        let config = ModelConfig::from_json(&source.read(file, 0..file.bytes).await?)?;
        required(find(TOKENIZER_FILE), &source.name(), TOKENIZER_FILE)?;
        let index = match find(INDEX_FILE) {
            Some(file) => Some(Index::parse(&source.read(file, 0..file.bytes).await?)?),
            None => None,
        };
        let shards = match &index {
            Some(index) => index.files(),
            None => BTreeSet::from([SINGLE_FILE.to_owned()]),
        };
        let mut headers = Vec::new();
        for shard in &shards {
            let file = find(shard).ok_or_else(|| missing_weights(source.name()))?;
            headers.push(read_header(source, file).await?);
        }
        check_tensors(&config, index.as_ref(), &headers)?;
        let mut files: Vec<_> = all
            .iter()
            .filter(|file| {
                is_small_file(&file.name) || file.name == INDEX_FILE || shards.contains(&file.name)
            })
            .cloned()
            .collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { config, files })
    }
}

async fn read_header(source: &Source, file: &SourceFile) -> Result<Metadata> {
    let start = source.read(file, 0..file.bytes.min(8)).await?;
    let len = header_len(&file.name, file.bytes, &start)?;
    parse_header(
        &file.name,
        file.bytes,
        &source.read(file, 0..len as u64).await?,
    )
}

/// Every tensor the decoder will ask for is there with its shape, and all that the index promises.
fn check_tensors(config: &ModelConfig, index: Option<&Index>, headers: &[Metadata]) -> Result<()> {
    let find = |name: &String| {
        let found = headers.iter().find_map(|header| header.info(name));
        found.ok_or_else(|| Error::MissingTensor {
            name: name.clone(),
            files: headers.len(),
        })
    };
    for (name, expected) in config.tensors() {
        let actual = &find(&name)?.shape;
        if *actual != expected {
            return Err(Error::Shape {
                name,
                expected,
                actual: actual.clone(),
            });
        }
    }
    index.map_or(Ok(()), |index| {
        index.tensors().try_for_each(|name| find(name).map(drop))
    })
}

/// What decides the stage's key: each file by its content.
fn ids(files: &[SourceFile]) -> Vec<Value> {
    files
        .iter()
        .map(|file| json!({ "path": file.name, "bytes": file.bytes, "id": file.id }))
        .collect()
}

#[cfg(test)]
mod tests;
