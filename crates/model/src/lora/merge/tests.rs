use bytes::Bytes;
use candle_core::Device;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::*;
use crate::config::Architecture;
use crate::lora::LoraConfig;
use crate::tiny;

/// The tiny model in two shards of another number type, an extra tied head among them.
fn base(config: &ModelConfig, dtype: Dtype) -> Weights {
    let tiny = tiny::weights(config, 5);
    let mut tensors: Vec<_> = tiny
        .names()
        .map(|name| {
            let values =
                decode::<f32>(name, Dtype::F32, &tiny.bytes(name).expect("there")).expect("f32");
            (
                name.to_owned(),
                tiny.shape(name).expect("there").to_vec(),
                encode(name, dtype, &values).expect("finite"),
            )
        })
        .collect();
    let embedding = tensors
        .iter()
        .find(|(name, ..)| name == "model.embed_tokens.weight")
        .expect("there");
    tensors.push((HEAD.to_owned(), embedding.1.clone(), embedding.2.clone()));
    let file = |half: usize| format!("model-0000{}-of-00002.safetensors", half + 1);
    let (mut files, mut map) = (Vec::new(), serde_json::Map::new());
    for half in 0..2 {
        let own = tensors.iter().skip(half).step_by(2);
        map.extend(
            own.clone()
                .map(|(name, ..)| (name.clone(), json!(file(half)))),
        );
        let views = own.map(|(name, shape, bytes)| {
            (
                name,
                TensorView::new(dtype, shape.clone(), bytes).expect("a shape's own bytes"),
            )
        });
        let bytes = safetensors::serialize(views, None::<HashMap<String, String>>).expect("sound");
        files.push((file(half), Bytes::from(bytes)));
    }
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    files.push((
        INDEX_FILE.to_owned(),
        serde_json::to_vec(&index).expect("JSON").into(),
    ));
    Weights::from_files(files).expect("sound files")
}

fn adapter(config: &ModelConfig) -> Adapter {
    let lora = LoraConfig {
        r: 3,
        lora_alpha: 5.0,
        ..LoraConfig::default()
    };
    let mut adapter = Adapter::init(&lora, config, 2, &Device::Cpu).expect("a sound configuration");
    let change = |values: &mut [f32]| {
        values
            .iter_mut()
            .enumerate()
            .for_each(|(i, v)| *v += (i % 13) as f32 * 0.01);
    };
    adapter.update(change).expect("f32");
    adapter
}

#[test]
fn a_merged_weight_is_the_rounded_sum_and_everything_else_is_untouched() {
    let config = tiny::config(Architecture::Qwen2); // tied
    let adapter = adapter(&config);
    let values = adapter.values().expect("readable");
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let base = base(&config, dtype);
        let files: Vec<_> = merge(&base, &config, &adapter)
            .expect("fits")
            .map(|file| file.expect("merges"))
            .collect();
        let names: Vec<_> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                INDEX_FILE
            ]
        );
        for (shard, (_, bytes)) in base.shards().iter().zip(&files) {
            let merged = SafeTensors::deserialize(bytes).expect("sound");
            assert_eq!(
                merged.len(),
                shard.tensors.iter().filter(|&name| name != HEAD).count()
            );
            for (name, tensor) in merged.iter() {
                let own = base.bytes(name).expect("there");
                let Some(module) = name
                    .strip_suffix(".weight")
                    .filter(|module| module.ends_with("_proj"))
                else {
                    assert_eq!(tensor.data(), own, "{name}");
                    continue;
                };
                let matrix = |kind: &str| {
                    let name = format!("base_model.model.{module}.lora_{kind}.weight");
                    let parameter = adapter
                        .parameters()
                        .iter()
                        .find(|p| p.name == name)
                        .expect("adapted");
                    &values[parameter.range.clone()]
                };
                let (a, b, d_in) = (matrix("A"), matrix("B"), tensor.shape()[1]);
                let base = decode::<f32>(name, dtype, &own).expect("a float");
                let expected: Vec<f32> = base
                    .iter()
                    .enumerate()
                    .map(|(i, base)| {
                        let product = (0..3).fold(0.0, |sum, r| {
                            sum + b[i / d_in * 3 + r] * a[r * d_in + i % d_in]
                        });
                        base + 5.0 / 3.0_f64 as f32 * product
                    })
                    .collect();
                assert_eq!(
                    (tensor.dtype(), tensor.data()),
                    (dtype, &encode(name, dtype, &expected).expect("finite")[..]),
                    "{name}"
                );
            }
        }
        let files = files
            .into_iter()
            .map(|(name, bytes)| (name, bytes.into()))
            .collect();
        let merged = Weights::from_files(files).expect("the index names what is there");
        assert!(!merged.contains(HEAD));
        let index: Value = serde_json::from_slice(merged.index().expect("sharded")).expect("JSON");
        let total: usize = merged
            .names()
            .map(|name| merged.bytes(name).expect("there").len())
            .sum();
        assert_eq!(index["metadata"]["total_size"], total);
    }
}

#[test]
fn a_sum_that_overflows_is_an_error_that_names_the_tensor() {
    let config = tiny::config(Architecture::Qwen2);
    let mut adapter = adapter(&config);
    adapter.update(|values| values.fill(300.0)).expect("f32");
    let base = base(&config, Dtype::F16);
    let error = merge(&base, &config, &adapter)
        .expect("fits")
        .find_map(Result::err)
        .expect("too large")
        .to_string();
    assert!(
        error.contains("_proj.weight becomes") && error.contains("f16 cannot hold"),
        "{error}"
    );
}

#[test]
fn another_base_is_refused() {
    let config = tiny::config(Architecture::Llama);
    let (weights, adapter) = (tiny::weights(&config, 1), adapter(&config));
    let mut narrow = config;
    narrow.hidden_size = 16;
    assert!(
        merge(&weights, &narrow, &adapter)
            .expect_err("narrower")
            .to_string()
            .contains("the adapter does not fit")
    );
}

#[test]
fn cancelled_it_ends_within_a_file() {
    let config = tiny::config(Architecture::Qwen2);
    let (base, adapter) = (base(&config, Dtype::F32), adapter(&config));
    let (first, cancel) = (CancelToken::new(), CancelToken::new());
    let merged = merge(&base, &config, &adapter).expect("they fit");
    let mut files = merged.with_cancels(&[first, cancel.clone()]);
    files.next().expect("the first").expect("nobody asked");
    cancel.cancel();
    let error = files.next().expect("the second").expect_err("cancelled");
    assert!(matches!(error, Error::Cancelled), "{error}");
}
