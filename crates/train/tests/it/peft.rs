//! Parity with PEFT and transformers: every folder `peft-*` is a whole run of an
//! adapter, every folder `full-*` one of all weights, to be repeated step by step.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use updraft_chat::Example;
use updraft_kernels::clip;
use updraft_model::{
    Activations, Adapter, Batch, Decoder, Gradients, LoraConfig, ModelConfig, ModelFiles, Threads,
    Weights, merge, peft,
};
use updraft_train::{MemorySource, TrainConfig, Trainer, parts};

const LOSS: f64 = 1e-4;
const GRADIENT: f64 = 1e-3;
const ADAPTER: f64 = 1e-4;
const LOGITS: f64 = 1e-4;

/// One folder.
struct Golden {
    name: String,
    base: Weights,
    model: ModelConfig,
    run: Weights,
    settings: serde_json::Value,
    folder: PathBuf,
}

fn goldens() -> Vec<Golden> {
    let mut parents = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")];
    match std::env::var_os("UPDRAFT_FIXTURES") {
        Some(fixtures) => parents.push(Path::new(&fixtures).join("golden")),
        None => eprintln!("UPDRAFT_FIXTURES is not set: only the committed PEFT runs are checked"),
    }
    let mut folders: Vec<PathBuf> = parents
        .iter()
        .flat_map(|parent| std::fs::read_dir(parent).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| path.join("run.safetensors").exists())
        .filter(|path| {
            path.file_name()
                .map(|name| name.to_string_lossy())
                .is_some_and(|name| name.starts_with("peft-") || name.starts_with("full-"))
        })
        .collect();
    folders.sort();
    if folders.is_empty() {
        eprintln!("skipped: no PEFT run in {parents:?}");
    }
    folders.into_iter().map(Golden::open).collect()
}

impl Golden {
    fn open(folder: PathBuf) -> Self {
        let read = |name: &str| std::fs::read(folder.join(name)).expect(name);
        let run = vec![(
            "model.safetensors".to_owned(),
            read("run.safetensors").into(),
        )];
        Self {
            name: folder
                .file_name()
                .expect("a folder")
                .to_string_lossy()
                .into_owned(),
            base: Weights::from_dir(&folder.join("base")).expect("base weights"),
            model: ModelConfig::from_json(&read("base/config.json")).expect("base config"),
            run: Weights::from_files(run).expect("run.safetensors"),
            settings: serde_json::from_slice(&read("run.json")).expect("run.json"),
            folder,
        }
    }

    fn decoder(&self, weights: &Weights) -> Decoder {
        self.decoder_of(&self.model, weights)
    }

    fn decoder_of(&self, model: &ModelConfig, weights: &Weights) -> Decoder {
        let threads = Threads::new(2).expect("threads");
        Decoder::load(model, weights, DType::F32, &Device::Cpu, &threads).expect("decoder")
    }

    /// `adapter_init` or `adapter_final`; where every weight was trained, the base or the merged
    /// model.
    fn adapter(&self, name: &str) -> Adapter {
        if !self.folder.join("adapter_init").exists() {
            let folder = match name {
                "adapter_init" => "base",
                _ => "merged",
            };
            let weights = Weights::from_dir(&self.folder.join(folder)).expect("weights");
            let lora = LoraConfig::full_fine_tuning();
            return Adapter::init_over(&lora, &self.model, &weights, 0, &Device::Cpu)
                .expect("every weight is there");
        }
        let read = |file: &str| std::fs::read(self.folder.join(name).join(file)).expect(file);
        peft::read_adapter(
            &read(peft::CONFIG_FILE),
            &read(peft::WEIGHTS_FILE),
            &self.model,
        )
        .expect("adapter")
    }

    fn setting(&self, name: &str) -> f64 {
        self.settings[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{}: run.json has no {name}", self.name))
    }

    fn config(&self) -> TrainConfig {
        TrainConfig {
            learning_rate: self.setting("lr"),
            max_steps: Some(self.setting("steps") as u64),
            per_device_train_batch_size: self.setting("batch") as u32,
            gradient_accumulation_steps: self.setting("grad_accum") as u32,
            warmup_steps: self.setting("warmup") as u64,
            weight_decay: self.setting("weight_decay"),
            max_grad_norm: self.setting("max_grad_norm"),
            loraplus_lr_ratio: self.settings["loraplus_lr_ratio"].as_f64(),
            ..Default::default()
        }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self
            .run
            .bytes(name)
            .unwrap_or_else(|_| panic!("{}: no {name}", self.name));
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&value| f32::from_le_bytes(value))
            .collect()
    }

    fn integers(&self, name: &str) -> Vec<i64> {
        let bytes = self.run.bytes(name).expect(name);
        bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&value| i64::from_le_bytes(value))
            .collect()
    }

    /// The rows of the run in order, labels as spans.
    fn examples(&self) -> Vec<Example> {
        let seq = self.setting("seq") as usize;
        let (ids, labels) = (self.integers("input_ids"), self.integers("labels"));
        ids.chunks(seq)
            .zip(labels.chunks(seq))
            .map(|(ids, labels)| {
                let trained = (0..seq as u32).filter(|&t| labels[t as usize] != -100);
                Example {
                    input_ids: ids.iter().map(|&id| id as u32).collect(),
                    loss_spans: trained.map(|t| t..t + 1).collect(),
                }
            })
            .collect()
    }

    fn source(&self) -> MemorySource {
        MemorySource::new(self.name.clone(), self.examples())
    }

    /// The logits of the run's first row.
    fn logits(&self, decoder: &Decoder, adapter: Option<&Adapter>) -> Vec<f32> {
        let batch_size = self.setting("batch") as usize;
        let examples = self.examples();
        let documents = examples[..batch_size]
            .iter()
            .map(|example| &example.input_ids[..]);
        let mut batch = Batch::packed(documents);
        batch.logit_rows = (0..batch.num_tokens() as u32).collect();
        batch.adapters = vec![adapter.map(|_| 0); batch_size];
        let own = adapter.map(|adapter| decoder.with_saved_modules(adapter).expect("it fits"));
        let decoder = own.as_ref().unwrap_or(decoder);
        let hidden = decoder
            .forward(&batch, adapter.as_slice(), None)
            .expect("forward");
        let logits = decoder.logits(&hidden).expect("logits");
        logits.to_vec().expect("f32")
    }

    fn check_adapter(&self, actual: &Adapter, expected: impl Fn(&str) -> Vec<f32>, when: &str) {
        let values = actual.values().expect("f32");
        for parameter in actual.parameters() {
            let what = format!("{when}, {}", parameter.name);
            self.check_absolute(
                &expected(&parameter.name),
                &values[parameter.range.clone()],
                ADAPTER,
                &what,
            );
        }
    }

    fn check_absolute(&self, expected: &[f32], actual: &[f32], tolerance: f64, what: &str) {
        assert_eq!(expected.len(), actual.len(), "{}: {what}", self.name);
        let worst = expected
            .iter()
            .zip(actual)
            .map(|(&expected, &actual)| (f64::from(expected) - f64::from(actual)).abs())
            .fold(0.0, f64::max);
        assert!(
            worst <= tolerance,
            "{}: {what} differs by {worst:e}",
            self.name
        );
    }
}

fn norm(values: &[f32]) -> f64 {
    clip::sum_of_squares(values).sqrt()
}

#[test]
fn peft_run_is_repeated_step_by_step() {
    for golden in goldens() {
        let decoder = golden.decoder(&golden.base);
        let source = golden.source();
        let mut trainer = Trainer::new(
            &decoder,
            golden.adapter("adapter_init"),
            &source,
            golden.config(),
        )
        .expect("a run");
        for step in [2, 4] {
            trainer.run_until(step).expect("steps");
            let prefix = format!("adapter_step{step}.");
            let expected = |name: &str| golden.floats(&format!("{prefix}{name}"));
            golden.check_adapter(trainer.adapter(), expected, &format!("after step {step}"));
        }
        trainer.run().expect("the rest");

        let (losses, rates, norms) = (
            golden.floats("loss"),
            golden.floats("lr"),
            golden.floats("grad_norm"),
        );
        assert_eq!(trainer.log().len(), losses.len());
        for (index, record) in trainer.log().iter().enumerate() {
            let what = format!("{} step {}", golden.name, record.step);
            let loss = (record.loss - f64::from(losses[index])).abs();
            assert!(loss <= LOSS, "{what}: loss differs by {loss:e}");
            assert_eq!(
                record.learning_rate as f32, rates[index],
                "{what}: learning rate"
            );
            let norm = (record.grad_norm / f64::from(norms[index]) - 1.0).abs();
            assert!(
                norm <= GRADIENT,
                "{what}: gradient norm differs by {norm:e}"
            );
        }
        let last = golden.adapter("adapter_final");
        let values = last.values().expect("f32");
        let expected = |name: &str| {
            let parameter = last
                .parameters()
                .iter()
                .find(|parameter| parameter.name == name)
                .expect(name);
            values[parameter.range.clone()].to_vec()
        };
        golden.check_adapter(trainer.adapter(), expected, "at the end");

        let logits = golden.logits(&decoder, Some(trainer.adapter()));
        golden.check_absolute(
            &golden.floats("logits_final"),
            &logits,
            LOGITS,
            "final logits",
        );
        println!("{}: {} steps agree with PEFT", golden.name, losses.len());
    }
}

#[test]
fn peft_first_gradients_agree_tensor_by_tensor() {
    for golden in goldens() {
        let decoder = golden.decoder(&golden.base);
        let adapter = golden.adapter("adapter_init");
        let per_step = (golden.setting("batch") * golden.setting("grad_accum")) as usize;
        let examples = &golden.examples()[..per_step];
        let denom: u32 = examples.iter().map(Example::trained_tokens).sum();
        let parts = parts(examples, 2, golden.model.vocab_size).expect("parts");
        let mut gradients = Gradients::zeros(&adapter).expect("zeros");
        decoder
            .loss_and_backward(
                &parts,
                &adapter,
                f64::from(denom),
                &mut gradients,
                Activations::Stored,
            )
            .expect("a backward pass");
        let actual: Vec<f32> = gradients.with(<[f32]>::to_vec).expect("f32");
        for parameter in adapter.parameters() {
            let expected = golden.floats(&format!("grad0.{}", parameter.name));
            let actual = &actual[parameter.range.clone()];
            let distance: Vec<f32> = expected.iter().zip(actual).map(|(e, a)| e - a).collect();
            let relative = norm(&distance) / norm(&expected).max(f64::MIN_POSITIVE);
            assert!(
                relative <= GRADIENT,
                "{}: {} differs by {relative:e}",
                golden.name,
                parameter.name
            );
        }
    }
}

#[test]
fn peft_logits_agree_before_and_merged() {
    for golden in goldens() {
        let decoder = golden.decoder(&golden.base);
        let before = golden.logits(&decoder, Some(&golden.adapter("adapter_init")));
        golden.check_absolute(&golden.floats("logits0"), &before, LOGITS, "first logits");

        if !golden.folder.join("merged").exists() {
            continue; // Not every run needs one.
        }
        let theirs = ModelFiles::from_dir(&golden.folder.join("merged")).expect("merged weights");
        let (merged_model, theirs) = (theirs.config, theirs.weights);
        let adapter = golden.adapter("adapter_final");
        let ours = merge::merge(&golden.base, &golden.model, &adapter)
            .expect("a merge")
            .map(|file| file.map(|(name, bytes)| (name, bytes.into())))
            .collect::<Result<Vec<_>, _>>()
            .expect("merged files");
        let ours = Weights::from_files(ours).expect("our merged weights");
        assert!(
            ours.names().eq(theirs.names()),
            "{}: the same tensors",
            golden.name
        );
        for (whose, weights) in [("PEFT's", &theirs), ("our", &ours)] {
            let merged = golden.logits(&golden.decoder_of(&merged_model, weights), None);
            golden.check_absolute(
                &golden.floats("logits_final"),
                &merged,
                LOGITS,
                &format!("{whose} merged logits"),
            );
        }
    }
}
