//! Merging an adapter into its base model's files.

use std::borrow::Cow;
use std::collections::HashMap;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, View};
use serde_json::{Value, json};

use super::adapter::Adapter;
use crate::bridge::read;
use crate::config::{ModelConfig, Projection};
use crate::error::{Error, Result};
use crate::weights::{INDEX_FILE, Shard, Weights, decode};

const HEAD: &str = "lm_head.weight";

/// Merges an adapter into its base model: `round(W + s·B·A)` for each adapted weight, computed in
/// f32 and rounded once to the base's number type; every other tensor as it is.
///
/// Files, their names and their number types are the base's. A tied head is left out, because it
/// is the embedding. Files come one at a time, so no more than one shard is in memory.
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
    for parameter in adapter
        .parameters()
        .iter()
        .filter(|parameter| parameter.is_a())
    {
        let (projection, layer) = (parameter.projection, parameter.layer);
        let (d_in, d_out) = model.projection_dims(projection);
        let name = format!("{}.weight", projection.path(layer));
        let actual = weights.shape(&name)?.to_vec();
        if actual != [d_out, d_in] {
            return Err(Error::Shape {
                name,
                expected: vec![d_out, d_in],
                actual,
            });
        }
        adapted.insert(name, (projection, layer));
    }
    let left_out = model.tie_word_embeddings.then_some(HEAD);
    Ok(Merged {
        weights,
        adapter,
        adapted,
        left_out,
        next: 0,
    })
}

/// The files of a merged model, one after the other; made by [`merge`].
#[derive(Debug)]
pub struct Merged<'a> {
    weights: &'a Weights,
    adapter: &'a Adapter,
    /// Base weights the adapter changes.
    adapted: HashMap<String, (Projection, usize)>,
    left_out: Option<&'static str>,
    next: usize,
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
        let tensors = self
            .kept(shard)
            .map(|name| Ok((name, self.merge_tensor(name)?)))
            .collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(tensors, Some(metadata)).map_err(|error| Error::Corrupt {
            file: shard.name.clone(),
            reason: error.to_string(),
        })
    }

    fn merge_tensor(&self, name: &str) -> Result<Stored<'_>> {
        let (dtype, shape, base) = (
            self.weights.dtype(name)?,
            self.weights.shape(name)?,
            self.weights.bytes(name)?,
        );
        let bytes = match self.adapted.get(name) {
            None => base,
            Some(&(projection, layer)) => {
                let sum = self.add_update(name, dtype, &base, projection, layer)?;
                encode(name, dtype, &sum)?.into()
            }
        };
        Ok(Stored {
            dtype,
            shape,
            bytes,
        })
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
            .flat_map(|shard| self.kept(shard))
        {
            total += self.weights.bytes(name)?.len();
        }
        index["metadata"] = json!({ "total_size": total });
        if let (Some(head), Some(map)) = (self.left_out, index["weight_map"].as_object_mut()) {
            map.shift_remove(head);
        }
        let mut bytes = serde_json::to_vec_pretty(&index).map_err(corrupt)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    fn kept<'a>(&'a self, shard: &'a Shard) -> impl Iterator<Item = &'a str> {
        shard
            .tensors
            .iter()
            .map(String::as_str)
            .filter(|&name| Some(name) != self.left_out)
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

/// A tensor on its way to a file.
struct Stored<'a> {
    dtype: Dtype,
    shape: &'a [usize],
    bytes: bytes::Bytes,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests;
