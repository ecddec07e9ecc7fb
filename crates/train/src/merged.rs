//! Proof of a merge: each written weight is `round(W + s·B·A)`, worked out anew and compared.

use std::collections::BTreeMap;
use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;
use updraft_model::{Adapter, ModelConfig, ModelFiles, Projection, Role, Weights};

use crate::stop::Stop;
use crate::{Error, Result};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Checks that the files of a merged model hold just the tensors they must, each to the byte, and
/// that its configuration is the base's, but for a head that is tied no more. One row of a weight
/// exists at a time.
///
/// # Errors
/// [`Error::WrongMerge`] names the first that is wrong; [`Error::Cancelled`].
pub(crate) fn check_merged(
    base: &ModelFiles,
    adapter: &Adapter,
    config: &ModelConfig,
    merged: &Weights,
    stop: &Stop,
) -> Result<()> {
    let wrong = |name: &str| Error::WrongMerge {
        name: name.to_owned(),
    };
    let unties = adapter.unties_head(&base.config);
    let tied = base.config.tie_word_embeddings;
    let expected = ModelConfig {
        tie_word_embeddings: tied && !unties,
        ..base.config.clone()
    };
    if *config != expected {
        return Err(wrong("config.json"));
    }
    // Which tensors there must be, and where in the base each comes from.
    let own = base.weights.names().filter(|&name| name != HEAD || !tied);
    let mut sources: BTreeMap<&str, &str> = own.map(|name| (name, name)).collect();
    if unties {
        sources.insert(HEAD, EMBEDDING);
    }
    let surplus = merged.names().find(|name| !sources.contains_key(name));
    if let Some(name) = surplus {
        return Err(wrong(name));
    }
    let changes = changes(adapter);
    for (name, source) in sources {
        stop.check()?;
        if !merged.contains(name)
            || merged.dtype(name)? != base.weights.dtype(source)?
            || merged.shape(name)? != base.weights.shape(source)?
        {
            return Err(wrong(name));
        }
        let (before, after) = (base.weights.bytes(source)?, merged.bytes(name)?);
        let right = match changes.get(name) {
            None => before == after,
            Some(change) => {
                let dtype = merged.dtype(name)?;
                adapter.with(|values| change.gives(values, dtype, &before, &after))?
            }
        };
        if !right {
            return Err(wrong(name));
        }
    }
    Ok(())
}

/// What an adapter does to one weight, by its elements.
#[derive(Debug)]
enum Change {
    Update {
        a: Range<usize>,
        b: Range<usize>,
        rank: usize,
        scaling: f32,
    },
    Replace(Range<usize>),
}

/// What an adapter does to a model, by the names of the weights.
fn changes(adapter: &Adapter) -> BTreeMap<String, Change> {
    let a_of = |pair: (Projection, usize)| {
        let is_a = |role: &Role| *role == Role::A(pair.0, pair.1);
        adapter.parameters().iter().find(|other| is_a(&other.role))
    };
    let change = |parameter: &updraft_model::Parameter| match &parameter.role {
        Role::A(..) => None,
        &Role::B(projection, layer) => {
            let name = format!("{}.weight", projection.path(layer));
            let change = Change::Update {
                a: a_of((projection, layer))?.range.clone(),
                b: parameter.range.clone(),
                rank: parameter.shape[1],
                scaling: adapter.config().scaling(projection, layer) as f32,
            };
            Some((name, change))
        }
        Role::Saved(name) => Some((name.clone(), Change::Replace(parameter.range.clone()))),
    };
    adapter.parameters().iter().filter_map(change).collect()
}

impl Change {
    /// Whether it leads from one weight to the other.
    fn gives(&self, values: &[f32], dtype: Dtype, before: &[u8], after: &[u8]) -> bool {
        let width = match dtype {
            Dtype::F32 => 4,
            _ => 2,
        };
        match self {
            Self::Replace(range) => {
                let values = values[range.clone()].iter();
                values.len() * width == after.len()
                    && values
                        .zip(after.chunks_exact(width))
                        .all(|(&value, bytes)| is_rounded(value, dtype, bytes))
            }
            Self::Update {
                a,
                b,
                rank,
                scaling,
            } => {
                let (a, b) = (&values[a.clone()], &values[b.clone()]);
                let columns = a.len() / rank;
                let rows = before.chunks_exact(columns * width);
                let rows = rows.zip(after.chunks_exact(columns * width));
                if rows.len() * rank != b.len() {
                    return false;
                }
                let mut update = vec![0.0f32; columns];
                rows.zip(b.chunks_exact(*rank)).all(|((before, after), b)| {
                    update.fill(0.0);
                    for (&b, a) in b.iter().zip(a.chunks_exact(columns)) {
                        for (sum, &a) in update.iter_mut().zip(a) {
                            *sum += b * a;
                        }
                    }
                    let numbers = before.chunks_exact(width).zip(after.chunks_exact(width));
                    numbers.zip(&update).all(|((before, after), update)| {
                        is_rounded(number(before, dtype) + scaling * update, dtype, after)
                    })
                })
            }
        }
    }
}

fn number(bytes: &[u8], dtype: Dtype) -> f32 {
    match (dtype, bytes) {
        (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => f32::NAN, // No weight of a model that loads; it equals nothing.
    }
}

/// Whether these are the bytes of a number, rounded to nearest even.
fn is_rounded(value: f32, dtype: Dtype, bytes: &[u8]) -> bool {
    match dtype {
        Dtype::BF16 => bytes == bf16::from_f32(value).to_le_bytes(),
        Dtype::F16 => bytes == f16::from_f32(value).to_le_bytes(),
        Dtype::F32 => bytes == value.to_le_bytes(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use updraft_model::{Architecture, LoraConfig, SINGLE_FILE, merge, tiny};

    /// A base in 16 bits with an adapter that has learned something.
    fn world(lora: &LoraConfig) -> (ModelFiles, Adapter) {
        let config = tiny::config(Architecture::Qwen2);
        let weights = tiny::weights_bf16(&config, 1);
        let adapter = Adapter::init_over(lora, &config, &weights, 7, &Device::Cpu);
        let mut adapter = adapter.expect("an adapter");
        let learn = |values: &mut [f32]| {
            for (i, value) in values.iter_mut().enumerate() {
                *value += 0.05 * (i as f32).sin();
            }
        };
        adapter.update(learn).expect("f32");
        let files = [(
            "config.json".to_owned(),
            tiny::config_json(Architecture::Qwen2).into(),
        )];
        let base = ModelFiles {
            config,
            weights,
            files: files.into(),
        };
        (base, adapter)
    }

    fn merged(base: &ModelFiles, adapter: &Adapter) -> (ModelConfig, Vec<u8>) {
        let mut files = merge::merge(&base.weights, &base.config, adapter).expect("they fit");
        let (name, bytes) = files.next().expect("one").expect("merged");
        assert_eq!(name, SINGLE_FILE);
        let config = merge::config_json(&base.files["config.json"], &base.config, adapter);
        let config = ModelConfig::from_json(&config.expect("JSON")).expect("a configuration");
        (config, bytes)
    }

    fn check(
        base: &ModelFiles,
        adapter: &Adapter,
        config: &ModelConfig,
        file: &[u8],
    ) -> Result<()> {
        let file = (SINGLE_FILE.to_owned(), file.to_vec().into());
        let weights = Weights::from_files(vec![file]).expect("a sound file");
        check_merged(base, adapter, config, &weights, &Stop::new(&[], 0))
    }

    fn wrong(outcome: Result<()>) -> String {
        match outcome.expect_err("it is wrong") {
            Error::WrongMerge { name } => name,
            error => panic!("{error}"),
        }
    }

    fn settings() -> [LoraConfig; 3] {
        let whole = ["lm_head", "model.norm"].map(str::to_owned);
        [
            LoraConfig::default(),
            LoraConfig {
                modules_to_save: whole.to_vec(),
                use_rslora: true,
                ..LoraConfig::default()
            },
            LoraConfig::full_fine_tuning(),
        ]
    }

    #[test]
    fn a_merge_passes_and_every_bit_of_it_counts() {
        for lora in settings() {
            let (base, adapter) = world(&lora);
            let (config, file) = merged(&base, &adapter);
            check(&base, &adapter, &config, &file).expect("it is right");
            let header = 8 + u64::from_le_bytes(file[..8].try_into().expect("eight")) as usize;
            for place in (header..file.len()).step_by(997) {
                let mut other = file.clone();
                other[place] ^= 1;
                wrong(check(&base, &adapter, &config, &other));
            }
        }
    }

    #[test]
    fn cancelled_it_looks_no_further() {
        let (base, adapter) = world(&LoraConfig::default());
        let (config, _) = merged(&base, &adapter);
        let cancel = updraft_store::CancelToken::new();
        cancel.cancel();
        let stop = Stop::new(&[cancel], 3);
        // It would be wrong.
        let outcome = check_merged(&base, &adapter, &config, &base.weights, &stop);
        let error = outcome.expect_err("cancelled");
        assert!(matches!(error, Error::Cancelled { step: 3 }), "{error}");
    }

    #[test]
    fn a_merge_that_did_nothing_or_something_else_does_not() {
        let (base, adapter) = world(&LoraConfig::default());
        let (config, _) = merged(&base, &adapter);
        // Nothing: the base's file as it is.
        let outcome = check_merged(&base, &adapter, &config, &base.weights, &Stop::new(&[], 0));
        assert_eq!(wrong(outcome), "model.layers.0.mlp.down_proj.weight");
        // Half of it.
        let half = LoraConfig {
            lora_alpha: LoraConfig::default().lora_alpha / 2.0,
            ..LoraConfig::default()
        };
        let (_, other) = world(&half);
        let (_, file) = merged(&base, &other);
        wrong(check(&base, &adapter, &config, &file));
        // A head of its own that the configuration says nothing of.
        let (base, adapter) = world(&settings()[1]);
        let (_, file) = merged(&base, &adapter);
        assert_eq!(
            wrong(check(&base, &adapter, &base.config, &file)),
            "config.json"
        );
    }
}
