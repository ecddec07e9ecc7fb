//! Merging an adapter into its base model's files.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, View};
use serde_json::{Map, Value, json};
use updraft_store::CancelToken;

use super::adapter::Adapter;
use super::plan::Role;
use crate::bridge::read;
use crate::config::{EMBEDDING, HEAD, ModelConfig, Projection};
use crate::error::{Error, Result};
use crate::weights::{INDEX_FILE, Shard, Weights, decode};

/// Merges an adapter into its base model: `round(W + s·B·A)` for each adapted weight, computed in
/// f32 and rounded once to the base's number type; every other tensor as it is.
///
/// Weights that the adapter holds whole take the base's place, rounded likewise. Files, their names
/// and their number types are the base's. A tied head is left out, because it is the embedding;
/// where the adapter [unties it](Adapter::unties_head), it is written beside the embedding, and
/// [`config_json`] is the configuration that says so. Files come one at a time, so no more than one
/// shard is in memory.
///
/// # Errors
/// [`Error::Adapter`] if the adapter is for another model. From the iterator: [`Error::DType`] for
/// a base weight that is not f32, f16 or bf16, and [`Error::Adapter`] where the sum overflows it.
///
/// # Source
/// Hu et al. 2021, §4.1, <https://arxiv.org/abs/2106.09685>
pub fn merge<'a>(
    weights: &'a Weights,
    model: &ModelConfig,
    adapter: &'a Adapter,
) -> Result<Merged<'a>> {
    adapter.check(model)?;
    let mut adapted = HashMap::new();
    for parameter in adapter.parameters() {
        let (name, expected, change) = match &parameter.role {
            Role::B(..) => continue,
            &Role::A(projection, layer) => {
                let (d_in, d_out) = model.projection_dims(projection);
                let name = format!("{}.weight", projection.path(layer));
                (name, vec![d_out, d_in], Change::Update(projection, layer))
            }
            Role::Saved(name) => {
                let change = Change::Replace(parameter.range.clone());
                (name.clone(), parameter.shape.clone(), change)
            }
        };
        if name != HEAD || !model.tie_word_embeddings {
            let actual = weights.shape(&name)?.to_vec();
            if actual != expected {
                return Err(Error::Shape {
                    name,
                    expected,
                    actual,
                });
            }
        }
        adapted.insert(name, change);
    }
    Ok(Merged {
        weights,
        adapter,
        adapted,
        tied: model.tie_word_embeddings,
        unties: adapter.unties_head(model),
        cancels: Vec::new(),
        next: 0,
    })
}

/// The `config.json` of the merged model: the base's, but for a head that is tied no more.
///
/// # Errors
/// [`Error::Config`] if it is no JSON object.
pub fn config_json(base: &[u8], model: &ModelConfig, adapter: &Adapter) -> Result<Vec<u8>> {
    if !adapter.unties_head(model) {
        return Ok(base.to_vec());
    }
    let wrong = |reason: String| Error::Config {
        file: "config.json",
        field: "tie_word_embeddings".to_owned(),
        reason,
    };
    let mut config: Map<String, Value> =
        serde_json::from_slice(base).map_err(|error| wrong(error.to_string()))?;
    config.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
    serde_json::to_vec_pretty(&config).map_err(|error| wrong(error.to_string()))
}

/// What becomes of a base weight.
#[derive(Debug, Clone)]
enum Change {
    /// A low-rank update is added.
    Update(Projection, usize),
    /// The adapter's own weight, at these elements, takes its place.
    Replace(Range<usize>),
}

/// The files of a merged model, one after the other; made by [`merge`].
#[derive(Debug)]
pub struct Merged<'a> {
    weights: &'a Weights,
    adapter: &'a Adapter,
    /// Base weights the adapter changes.
    adapted: HashMap<String, Change>,
    /// Whether the base's head is its embedding.
    tied: bool,
    /// Whether the merged model's head is one of its own, though the base's is not.
    unties: bool,
    cancels: Vec<CancelToken>,
    next: usize,
}

impl Merged<'_> {
    /// Stops when one of these tokens is cancelled, within a tensor's work: the file under way is
    /// [`Error::Cancelled`].
    #[must_use]
    pub fn with_cancels(mut self, cancels: &[CancelToken]) -> Self {
        self.cancels.extend_from_slice(cancels);
        self
    }
}

impl Iterator for Merged<'_> {
    /// A file's name and bytes.
    type Item = Result<(String, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let shards = self.weights.shards();
        let next = self.next;
        self.next += 1;
        match shards.get(next) {
            Some(shard) => Some(
                self.merge_shard(shard)
                    .map(|bytes| (shard.name.clone(), bytes)),
            ),
            None if next == shards.len() => self.weights.index().map(|index| {
                self.merge_index(index)
                    .map(|bytes| (INDEX_FILE.to_owned(), bytes))
            }),
            None => None,
        }
    }
}

impl Merged<'_> {
    fn merge_shard(&self, shard: &Shard) -> Result<Vec<u8>> {
        let failed = RefCell::new(None);
        let tensors = self
            .written(shard)
            .map(|name| {
                let source = self.source(name);
                let tensor = Stored {
                    merged: self,
                    name,
                    dtype: self.weights.dtype(source)?,
                    shape: self.weights.shape(source)?,
                    base: self.weights.bytes(source)?,
                    failed: &failed,
                };
                Ok((name, tensor))
            })
            .collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let bytes = safetensors::serialize(tensors, Some(metadata));
        match failed.into_inner() {
            Some(error) => Err(error),
            None => bytes.map_err(|error| Error::Corrupt {
                file: shard.name.clone(),
                reason: error.to_string(),
            }),
        }
    }

    /// A tensor's new bytes, if it changes.
    fn merge_tensor(&self, name: &str, dtype: Dtype, base: &[u8]) -> Result<Option<Vec<u8>>> {
        if self.cancels.iter().any(CancelToken::is_cancelled) {
            return Err(Error::Cancelled);
        }
        let values = match self.adapted.get(name) {
            None => return Ok(None),
            Some(&Change::Update(projection, layer)) => {
                self.add_update(name, dtype, base, projection, layer)?
            }
            Some(Change::Replace(range)) => self.adapter.part(range)?,
        };
        encode(name, dtype, &values).map(Some)
    }

    /// `W + s·(B·A)`: the product is summed over ranks in order, then scaled, then added.
    fn add_update(
        &self,
        name: &str,
        dtype: Dtype,
        base: &[u8],
        projection: Projection,
        layer: usize,
    ) -> Result<Vec<f32>> {
        let mut sum = decode::<f32>(name, dtype, base)?;
        let Some((a, pair)) = self.adapter.pair(projection, layer)? else {
            return Ok(sum);
        };
        let (a, b, scaling) = (read::<f32>(&a)?, read::<f32>(&pair.b)?, pair.scaling as f32);
        let (a, b) = (a.mat(), b.mat());
        let mut update = vec![0.0_f32; a.num_cols()];
        for (row, sum) in sum.chunks_exact_mut(a.num_cols()).enumerate() {
            update.fill(0.0);
            for (rank, &b) in b.row(row).iter().enumerate() {
                for (update, &a) in update.iter_mut().zip(a.row(rank)) {
                    *update += b * a;
                }
            }
            for (sum, update) in sum.iter_mut().zip(&update) {
                *sum += scaling * update;
            }
        }
        Ok(sum)
    }

    fn merge_index(&self, index: &[u8]) -> Result<Vec<u8>> {
        let corrupt = |error: serde_json::Error| Error::Corrupt {
            file: INDEX_FILE.to_owned(),
            reason: error.to_string(),
        };
        let mut index: Value = serde_json::from_slice(index).map_err(corrupt)?;
        let mut total = 0;
        for name in self
            .weights
            .shards()
            .iter()
            .flat_map(|shard| self.written(shard))
        {
            total += self.weights.bytes(self.source(name))?.len();
        }
        index["metadata"] = json!({ "total_size": total });
        if let Some(map) = index["weight_map"].as_object_mut().filter(|_| self.tied) {
            map.shift_remove(HEAD);
            if let Some(shard) = map.get(EMBEDDING).cloned().filter(|_| self.unties) {
                map.insert(HEAD.to_owned(), shard);
            }
        }
        let mut bytes = serde_json::to_vec_pretty(&index).map_err(corrupt)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The tensors of a merged shard: the base's, but for a tied head, which is left out or lies
    /// beside the embedding.
    fn written<'a>(&'a self, shard: &'a Shard) -> impl Iterator<Item = &'a str> {
        let names = shard.tensors.iter().map(String::as_str);
        names
            .filter(|&name| name != HEAD || !self.tied)
            .flat_map(|name| {
                let head = (name == EMBEDDING && self.unties).then_some(HEAD);
                std::iter::once(name).chain(head)
            })
    }

    /// Where in the base a merged tensor comes from.
    fn source<'a>(&self, name: &'a str) -> &'a str {
        if name == HEAD && self.tied {
            EMBEDDING
        } else {
            name
        }
    }
}

/// Rounds to the stored type, to nearest even.
fn encode(name: &str, dtype: Dtype, values: &[f32]) -> Result<Vec<u8>> {
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(Error::adapter(format!(
            "{name} becomes {value} when merged"
        )));
    }
    let bytes: Vec<u8> = match dtype {
        Dtype::F32 => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
        Dtype::BF16 => values
            .iter()
            .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
            .collect(),
        Dtype::F16 => {
            if let Some(value) = values
                .iter()
                .find(|value| f16::from_f32(**value).is_infinite())
            {
                return Err(Error::adapter(format!(
                    "{name} becomes {value} when merged, which f16 cannot hold"
                )));
            }
            values
                .iter()
                .flat_map(|&value| f16::from_f32(value).to_le_bytes())
                .collect()
        }
        other => {
            return Err(Error::DType {
                name: name.to_owned(),
                dtype: format!("{other:?}"),
            });
        }
    };
    Ok(bytes)
}

/// A tensor on its way to a file, merged when it is written, so that one exists at a time.
struct Stored<'a> {
    merged: &'a Merged<'a>,
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    base: bytes::Bytes,
    /// The first failure; a view cannot return it.
    failed: &'a RefCell<Option<Error>>,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.merged.merge_tensor(self.name, self.dtype, &self.base) {
            Ok(None) => Cow::Borrowed(&self.base),
            Ok(Some(bytes)) => Cow::Owned(bytes),
            Err(error) => {
                self.failed.borrow_mut().get_or_insert(error);
                Cow::Borrowed(&[]) // The file is thrown away.
            }
        }
    }

    fn data_len(&self) -> usize {
        self.base.len()
    }
}

#[cfg(test)]
mod tests;
