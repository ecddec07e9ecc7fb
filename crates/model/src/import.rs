//! The import stage: a model folder or Hub repository into the store, checked before it is believed.

mod source;

use std::collections::BTreeMap;

use bytes::Bytes;
use safetensors::tensor::Metadata;
use serde_json::{Value, json};
use updraft_store::{
    CancelToken, FinishedStage, JournalEntry, ManifestDraft, ObjectEntry, Opened, Progress,
    ProgressSink, StageId, StageWriter, Store, open_stage,
};

use self::source::{Source, SourceFile};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model_files::{CONFIG_FILE, TOKENIZER_FILE, is_small_file, required};
use crate::weights::{
    INDEX_FILE, SINGLE_FILE, header_len, missing_weights, parse_header, shard_names,
};

/// Goes up when the same source would give other objects.
const STAGE_VERSION: u32 = 1;

/// Copies a model into the store as `models/<name>/<key16>/`: configuration, safetensors weights,
/// tokenizer, template. `source` is a folder, or a Hub id with an optional revision
/// (`Qwen/Qwen2.5-0.5B@main`).
///
/// Before anything is copied, the configuration must be of a family the decoder runs, a
/// `tokenizer.json` must be there, and the weight files' headers must hold exactly what the
/// configuration needs. Pickled weights are never read. A second call with the same source writes nothing;
/// one after a kill goes on with the file it was at.
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
    let model = Model::examine(&source).await?;
    let files = source.identify(model.files, cancel).await?;
    let inputs = json!({ "source": source.id(), "files": ids(&files), "version": STAGE_VERSION });
    let writer = match open_stage(store, &id, "import", &inputs).await? {
        Opened::Finished(stage) => return Ok(stage),
        Opened::Open(writer) => writer,
    };
    let objects = copy(&source, &files, &writer, progress, cancel).await?;
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
        let all = source.files().await?;
        let find = |name: &str| all.iter().find(|file| file.name == name);
        let mut small = BTreeMap::new();
        for file in all
            .iter()
            .filter(|file| [CONFIG_FILE, INDEX_FILE, TOKENIZER_FILE].contains(&file.name.as_str()))
        {
            // The tokenizer's bytes are not looked at here; that it is there is what counts.
            let len = if file.name == TOKENIZER_FILE {
                0
            } else {
                file.bytes
            };
            small.insert(file.name.clone(), source.read(file, 0..len).await?);
        }
        let config = ModelConfig::from_json(required(&small, source.name(), CONFIG_FILE)?)?;
        required(&small, source.name(), TOKENIZER_FILE)?;
        let shards = match small.get(INDEX_FILE) {
            Some(index) => shard_names(index)?,
            None => vec![SINGLE_FILE.to_owned()],
        };
        let mut headers = Vec::new();
        for shard in &shards {
            let file = find(shard).ok_or_else(|| missing_weights(source.name().to_owned()))?;
            headers.push(read_header(source, file).await?);
        }
        check_tensors(&config, &headers)?;
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

/// Every tensor the decoder will ask for is there once, with its shape.
fn check_tensors(config: &ModelConfig, headers: &[Metadata]) -> Result<()> {
    for (name, expected) in config.tensors() {
        let found = headers.iter().find_map(|header| header.info(&name));
        let Some(info) = found else {
            return Err(Error::MissingTensor {
                name,
                files: headers.len(),
            });
        };
        if info.shape != expected {
            return Err(Error::Shape {
                name,
                expected,
                actual: info.shape.clone(),
            });
        }
    }
    Ok(())
}

/// What decides the stage's key: each file by its content.
fn ids(files: &[SourceFile]) -> Vec<Value> {
    files
        .iter()
        .map(|file| json!({ "path": file.name, "bytes": file.bytes, "id": file.id }))
        .collect()
}

async fn copy(
    source: &Source,
    files: &[SourceFile],
    writer: &StageWriter,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<Vec<ObjectEntry>> {
    let mut journal = writer.journal().await?;
    let total = files.iter().map(|file| file.bytes).sum();
    let (mut done, mut objects) = (0, Vec::new());
    let report = |done| progress.report(&Progress::new("import", done, Some(total), "bytes"));
    for (index, file) in (0..).zip(files) {
        if let Some(entry) = journal.remove(&index) {
            objects.extend(entry.objects);
        } else {
            let object =
                copy_file(source, file, writer, |bytes| report(done + bytes), cancel).await?;
            let entry = JournalEntry {
                objects: vec![object],
                ..JournalEntry::default()
            };
            objects.extend(writer.put_journal(index, &entry).await?.objects);
        }
        done += file.bytes;
        report(done);
    }
    Ok(objects)
}

/// Copies one file piece by piece and checks that what arrived is what was identified.
async fn copy_file(
    source: &Source,
    file: &SourceFile,
    writer: &StageWriter,
    report: impl Fn(u64),
    cancel: &CancelToken,
) -> Result<ObjectEntry> {
    const PIECE: u64 = 8 << 20;
    let mut object = writer.object_writer(&file.name)?;
    while object.written() < file.bytes {
        if cancel.is_cancelled() {
            object.abort().await;
            return Err(Error::Cancelled);
        }
        let start = object.written();
        let piece: Bytes = source
            .read(file, start..file.bytes.min(start + PIECE))
            .await?;
        if piece.is_empty() {
            return Err(changed(file));
        }
        object.write(piece).await?;
        report(object.written());
    }
    let entry = object.finish().await?;
    match &file.sha256 {
        Some(sha256) if *sha256 != entry.sha256 => Err(changed(file)),
        _ => Ok(entry),
    }
}

fn changed(file: &SourceFile) -> Error {
    Error::Corrupt {
        file: file.name.clone(),
        reason: "it changed while it was copied".to_owned(),
    }
}

#[cfg(test)]
mod tests;
