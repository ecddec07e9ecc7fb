//! Random models, adapters and documents, the same on every run.

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use updraft_model::{
    Adapter, Architecture, Decoder, LoraConfig, ModelConfig, Part, Role, TargetModules, Threads,
    Weights, tiny,
};

/// A tiny model with its files.
pub(crate) struct World {
    pub(crate) config: ModelConfig,
    pub(crate) weights: Weights,
}

impl World {
    pub(crate) fn new(architecture: Architecture) -> Self {
        let config = tiny::config(architecture);
        Self {
            weights: tiny::weights(&config, 7),
            config,
        }
    }

    /// The same model as most are published.
    pub(crate) fn new_bf16(architecture: Architecture) -> Self {
        let config = tiny::config(architecture);
        Self {
            weights: tiny::weights_bf16(&config, 7),
            config,
        }
    }

    pub(crate) fn decoder(&self, dtype: DType, num_threads: usize) -> Decoder {
        let threads = Threads::new(num_threads).expect("threads start");
        Decoder::load(&self.config, &self.weights, dtype, &Device::Cpu, &threads)
            .expect("the tiny model loads")
    }

    /// An adapter in mid-training: `B` is no longer zero.
    pub(crate) fn adapter(&self, lora: &LoraConfig, seed: u64) -> Adapter {
        let mut adapter = Adapter::init_over(lora, &self.config, &self.weights, seed, &Device::Cpu)
            .expect("a sound configuration");
        let mut numbers = Numbers(seed);
        let b: Vec<_> = adapter
            .parameters()
            .iter()
            .filter(|p| matches!(p.role, Role::B(..)))
            .map(|p| p.range.clone())
            .collect();
        adapter
            .update(|values| {
                b.into_iter()
                    .for_each(|b| values[b].fill_with(|| numbers.between(-0.2, 0.2) as f32));
            })
            .expect("f32 on the CPU");
        adapter
    }
}

/// Settings with a bit of everything: some maps only, ranks and alphas of their own, rsLoRA.
pub(crate) fn uneven_lora() -> LoraConfig {
    LoraConfig {
        r: 4,
        lora_alpha: 6.0,
        target_modules: TargetModules::Names(
            [
                "q_proj",
                "v_proj",
                "o_proj",
                "layers.1.mlp.up_proj",
                "down_proj",
            ]
            .map(str::to_owned)
            .to_vec(),
        ),
        use_rslora: true,
        rank_pattern: BTreeMap::from([("layers.0.self_attn.v_proj".to_owned(), 3)]),
        alpha_pattern: BTreeMap::from([("down_proj".to_owned(), 2.0)]),
        ..LoraConfig::default()
    }
}

/// Token ids, and which of them are to be learned.
pub(crate) type Document = (Vec<u32>, std::ops::Range<usize>);

/// Documents of these lengths, about half of whose tokens are to be learned.
pub(crate) fn documents(lengths: &[usize], seed: u64) -> Vec<Document> {
    let mut numbers = Numbers(seed);
    lengths
        .iter()
        .map(|&len| {
            let ids = (0..len).map(|_| numbers.below(96) as u32).collect();
            let start = 1 + numbers.below(len.div_ceil(2) as u64) as usize;
            (ids, start.min(len)..(start + len.div_ceil(2)).min(len))
        })
        .collect()
}

pub(crate) fn one_part(documents: &[Document]) -> Part {
    let mut part = Part::default();
    documents
        .iter()
        .for_each(|(ids, span)| part.push(ids, std::slice::from_ref(span)));
    part
}

/// A linear congruential generator, enough for test data.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    pub(crate) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.below(1 << 24) as f64 / f64::from(1 << 24)
    }
}
