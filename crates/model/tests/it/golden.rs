//! Against complete runs of transformers and PEFT.
//!
//! Every folder `peft-*` or `full-*` in `$UPDRAFT_FIXTURES/golden` and among `updraft-train`'s fixtures is one
//! run: base, adapters, batches, first gradients, logits before and after, merged model. The
//! training loop's own numbers are checked in `updraft-train`.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use safetensors::SafeTensors;
use serde_json::Value;
use updraft_model::{
    Activations, Adapter, Batch, Decoder, Gradients, LoraConfig, ModelConfig, Part, Threads,
    Weights, merge, peft,
};

struct Run {
    folder: PathBuf,
    config: ModelConfig,
    weights: Weights,
    numbers: Vec<u8>,
}

#[expect(clippy::print_stderr, reason = "a test that skips says why")]
fn runs() -> Vec<Run> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/tests/fixtures");
    let given =
        std::env::var_os("UPDRAFT_FIXTURES").map(|folder| Path::new(&folder).join("golden"));
    if given.is_none() {
        eprintln!("UPDRAFT_FIXTURES is not set: only the project's own PEFT runs are checked");
    }
    let mut folders: Vec<PathBuf> = std::iter::once(own)
        .chain(given)
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.is_dir()
                && path
                    .file_name()
                    .is_some_and(|name| is_run(&name.to_string_lossy()))
        })
        .collect();
    folders.sort();
    if folders.is_empty() {
        eprintln!("no recorded run found: nothing is checked here");
    }
    folders.into_iter().map(Run::open).collect()
}

/// `peft-*` of an adapter, `full-*` of every weight.
fn is_run(name: &str) -> bool {
    name.starts_with("peft-") || name.starts_with("full-")
}

impl Run {
    fn is_full(&self) -> bool {
        !self.folder.join("adapter_init").exists()
    }

    fn open(folder: PathBuf) -> Self {
        let file = |name: &str| {
            std::fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{folder:?}/{name}: {e}"))
        };
        let config =
            ModelConfig::from_json(&file("base/config.json")).expect("transformers' config");
        let weights = Weights::from_dir(&folder.join("base")).expect("transformers' weights");
        Self {
            numbers: file("run.safetensors"),
            config,
            weights,
            folder,
        }
    }

    /// `adapter_init` or `adapter_final`; of a full run the base or the merged model.
    fn adapter(&self, name: &str) -> Adapter {
        if self.is_full() {
            let folder = match name {
                "adapter_init" => "base",
                _ => "merged",
            };
            let weights = Weights::from_dir(&self.folder.join(folder)).expect("weights");
            let lora = LoraConfig::full_fine_tuning();
            return Adapter::init_over(&lora, &self.config, &weights, 0, &Device::Cpu)
                .expect("every weight is there");
        }
        let file = |file: &str| {
            std::fs::read(self.folder.join(name).join(file)).expect("an adapter's file")
        };
        peft::read_adapter(
            &file(peft::CONFIG_FILE),
            &file(peft::WEIGHTS_FILE),
            &self.config,
        )
        .expect("PEFT's adapter")
    }

    fn decoder(&self) -> Decoder {
        Decoder::load(
            &self.config,
            &self.weights,
            DType::F32,
            &Device::Cpu,
            &Threads::single(),
        )
        .expect("loads")
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.numbers).expect("a sound file");
        let tensor = file.tensor(name).ok()?;
        Some(
            tensor
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect(),
        )
    }

    /// `[steps, micro-batches, batch, T]`, and its elements.
    fn integers(&self, name: &str) -> (Vec<usize>, Vec<i64>) {
        let file = SafeTensors::deserialize(&self.numbers).expect("a sound file");
        let tensor = file.tensor(name).expect("a run has it");
        let values = tensor
            .data()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&bytes| i64::from_le_bytes(bytes))
            .collect();
        (tensor.shape().to_vec(), values)
    }

    /// The documents of the first optimizer step, one part per micro-batch.
    fn first_step(&self) -> Vec<Part> {
        let ((shape, ids), (_, labels)) = (self.integers("input_ids"), self.integers("labels"));
        let len = shape[3];
        let micro_batches = ids
            .chunks(shape[2] * len)
            .zip(labels.chunks(shape[2] * len))
            .take(shape[1]);
        micro_batches
            .map(|(ids, labels)| {
                let mut part = Part::default();
                for (ids, labels) in ids.chunks(len).zip(labels.chunks(len)) {
                    let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
                    let spans: Vec<_> = (0..len)
                        .filter(|&i| labels[i] != -100)
                        .map(|i| i..i + 1)
                        .collect();
                    part.push(&ids, &spans);
                }
                part
            })
            .collect()
    }

    /// Logits of the first micro-batch, flat.
    fn logits(&self, decoder: &Decoder, adapter: Option<&Adapter>) -> Vec<f32> {
        let mut batch = self.first_step().remove(0).batch;
        batch.logit_rows = (0..batch.num_tokens() as u32).collect();
        batch.adapters = vec![adapter.map(|_| 0); batch.num_sequences()];
        logits(decoder, &batch, adapter.as_slice())
    }
}

fn logits(decoder: &Decoder, batch: &Batch, adapters: &[&Adapter]) -> Vec<f32> {
    let own = adapters.first();
    let own = own.map(|adapter| decoder.with_saved_modules(adapter).expect("it fits"));
    let decoder = own.as_ref().unwrap_or(decoder);
    let hidden = decoder
        .forward(batch, adapters, None)
        .expect("a sound batch");
    decoder
        .logits(&hidden)
        .and_then(|logits| logits.to_vec())
        .expect("logits")
}

fn furthest(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (a - e).abs())
        .fold(0.0, f32::max)
}

#[test]
fn peft_logits_before_and_after() {
    for run in runs() {
        let decoder = run.decoder();
        for (name, adapter) in [
            ("logits0", "adapter_init"),
            ("logits_final", "adapter_final"),
        ] {
            let Some(expected) = run.floats(name) else {
                continue;
            };
            let error = furthest(
                &run.logits(&decoder, Some(&run.adapter(adapter))),
                &expected,
            );
            assert!(error < 1e-4, "{:?} {name}: {error:e}", run.folder);
        }
    }
}

#[test]
fn peft_first_loss_and_gradients() {
    for run in runs() {
        let (decoder, adapter, parts) =
            (run.decoder(), run.adapter("adapter_init"), run.first_step());
        let mut gradients = Gradients::zeros(&adapter).expect("zeros");
        let denom = parts.iter().map(Part::num_labels).sum::<usize>() as f64;
        let loss = decoder
            .loss_and_backward(&parts, &adapter, denom, &mut gradients, Activations::Stored)
            .expect("PEFT's batches");
        let expected = f64::from(run.floats("loss").expect("a run has losses")[0]);
        assert!(
            (loss / denom - expected).abs() < 1e-4,
            "{:?}: loss {} against {expected}",
            run.folder,
            loss / denom
        );
        let gradients = gradients.to_vec().expect("readable");
        for parameter in adapter.parameters() {
            let Some(expected) = run.floats(&format!("grad0.{}", parameter.name)) else {
                continue;
            };
            let actual = &gradients[parameter.range.clone()];
            let norm: f64 = expected.iter().map(|&e| f64::from(e).powi(2)).sum();
            let pairs = actual.iter().zip(&expected);
            let difference: f64 = pairs.map(|(a, &e)| (a - f64::from(e)).powi(2)).sum();
            // B is zero at first, so A's gradients are zero on both sides.
            assert!(
                difference <= 1e-6 * norm,
                "{:?} {}: {difference:e} of {norm:e}",
                run.folder,
                parameter.name
            );
        }
    }
}

#[test]
fn peft_merged_model() {
    for run in runs() {
        if !run.folder.join("merged").exists() {
            continue; // Not every run needs one.
        }
        let adapter = run.adapter("adapter_final");
        let files: Vec<_> = merge::merge(&run.weights, &run.config, &adapter)
            .expect("they fit")
            .map(|file| {
                file.map(|(name, bytes)| (name, bytes.into()))
                    .expect("a merged file")
            })
            .collect();
        let (ours, theirs) = (
            Weights::from_files(files),
            Weights::from_dir(&run.folder.join("merged")),
        );
        let (ours, theirs) = (
            ours.expect("sound files"),
            theirs.expect("transformers' weights"),
        );
        assert!(
            ours.names().eq(theirs.names()),
            "{:?}: other tensors",
            run.folder
        );
        for name in ours.names() {
            let flat = |weights: &Weights| {
                weights
                    .tensor(name)
                    .and_then(|t| Ok(t.flatten_all()?.to_vec1::<f32>()?))
            };
            let error = furthest(
                &flat(&ours).expect("readable"),
                &flat(&theirs).expect("readable"),
            );
            assert!(error < 1e-6, "{:?} {name}: {error:e}", run.folder);
        }
        let json = |folder: &str| {
            std::fs::read(run.folder.join(folder).join("config.json")).expect("a configuration")
        };
        let ours_json = merge::config_json(&json("base"), &run.config, &adapter).expect("JSON");
        let config = ModelConfig::from_json(&ours_json).expect("ours");
        let theirs = ModelConfig::from_json(&json("merged")).expect("transformers'");
        assert_eq!(config, theirs, "{:?}", run.folder);
        let merged = Decoder::load(&config, &ours, DType::F32, &Device::Cpu, &Threads::single())
            .expect("loads");
        let expected = run.logits(&run.decoder(), Some(&adapter));
        let error = furthest(&run.logits(&merged, None), &expected);
        assert!(error < 1e-4, "{:?}: {error:e}", run.folder);
    }
}

#[test]
fn peft_files_survive_reading_and_writing() {
    for run in runs() {
        if run.is_full() {
            continue; // PEFT had no part in it.
        }
        let adapter = run.adapter("adapter_final");
        let written = peft::write_adapter(&adapter).expect("writes");
        let original = std::fs::read(run.folder.join("adapter_final").join(peft::WEIGHTS_FILE))
            .expect("a file");
        let (ours, theirs) = (
            SafeTensors::deserialize(&written.safetensors),
            SafeTensors::deserialize(&original),
        );
        let (ours, theirs) = (ours.expect("sound"), theirs.expect("sound"));
        assert_eq!(ours.len(), theirs.len());
        for (name, tensor) in theirs.iter() {
            let own = ours.tensor(name).expect("the same names");
            assert_eq!(
                (own.dtype(), own.shape(), own.data()),
                (tensor.dtype(), tensor.shape(), tensor.data())
            );
        }
        let json = |bytes: &[u8]| {
            serde_json::from_slice::<serde_json::Map<String, Value>>(bytes).expect("an object")
        };
        let theirs = std::fs::read(run.folder.join("adapter_final").join(peft::CONFIG_FILE))
            .expect("a file");
        let (ours, theirs) = (json(&written.config_json), json(&theirs));
        for (key, value) in &ours {
            let expected = theirs.get(key);
            assert!(
                expected.is_none_or(|expected| expected == value),
                "{key}: {value} against {expected:?}"
            );
        }
        assert!(ours.keys().is_sorted());
    }
}
