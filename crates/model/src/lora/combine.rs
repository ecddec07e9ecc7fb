//! One adapter out of several, each with its weight.

use std::collections::BTreeSet;

use super::adapter::Adapter;
use super::config::LoraConfig;
use super::peft::name_modules;
use super::plan::Parameter;
use super::saved::SavedModules;
use crate::config::{ModelConfig, Projection};
use crate::error::{Error, Result};

/// How [`combine`] puts adapters together; the names are those of PEFT's `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// `A = Σ ±√|wᵢ·sᵢ|·Aᵢ` and `B = Σ √|wᵢ·sᵢ|·Bᵢ`: as small as one of them, and only roughly
    /// their sum, because it also multiplies each `B` with every other's `A`.
    Linear,
    /// `A` holds all `wᵢ·sᵢ·Aᵢ` one below the other and `B` all `Bᵢ` side by side: exactly the
    /// weighted sum `Σ wᵢ·sᵢ·Bᵢ·Aᵢ`, of the rank of all together.
    Cat,
}

/// Combines adapters of one model with their weights, which may be negative, as PEFT's
/// `add_weighted_adapter` does.
///
/// A module that only some of them adapt gets what those have. The result has `scaling` 1
/// (`lora_alpha = r`) and no patterns; modules of a lower rank are filled up with zeros.
///
/// Unlike PEFT's, the result of rank-stabilised adapters is not rank-stabilised: PEFT keeps
/// `use_rslora`, which multiplies the combination by `√r` once more.
///
/// # Errors
/// [`Error::Adapter`] if there is none, one is for another model, a weight is not a number, or
/// [`Combination::Linear`] meets adapters of different ranks.
///
/// # Source
/// peft 0.21, `LoraModel.add_weighted_adapter`.
pub fn combine(
    adapters: &[(&Adapter, f64)],
    combination: Combination,
    model: &ModelConfig,
) -> Result<Adapter> {
    let Some((first, _)) = adapters.first() else {
        return Err(Error::adapter("there is none to combine"));
    };
    let mut parts = Vec::with_capacity(adapters.len());
    for &(adapter, weight) in adapters {
        adapter.check(model)?;
        if let Some(name) = adapter.config().modules_to_save.first() {
            return Err(Error::adapter(format!(
                "it holds {name} whole, of which there is no sum; merge it into its base first"
            )));
        }
        if !weight.is_finite() {
            return Err(Error::adapter(format!("a weight of {weight}")));
        }
        parts.push(Part {
            adapter,
            values: adapter.values()?,
            weight,
            rank: greatest_rank(adapter),
        });
    }
    let rank = match combination {
        Combination::Cat => parts.iter().map(|part| part.rank).sum(),
        Combination::Linear => {
            if let Some(other) = parts.iter().find(|part| part.rank != parts[0].rank) {
                return Err(Error::adapter(format!(
                    "linear combination of ranks {} and {}: combine them with cat",
                    parts[0].rank, other.rank
                )));
            }
            parts[0].rank
        }
    };
    let modules: BTreeSet<(usize, Projection)> = parts
        .iter()
        .flat_map(|part| part.adapter.parameters())
        .filter_map(|parameter| {
            parameter
                .pair()
                .map(|(projection, layer)| (layer, projection))
        })
        .collect();
    let config = LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        use_rslora: false,
        rank_pattern: Default::default(),
        alpha_pattern: Default::default(),
        target_modules: name_modules(&modules, model),
        ..first.config().clone()
    };
    let targets = |projection, layer| modules.contains(&(layer, projection));
    let nothing_whole = SavedModules::default();
    Adapter::from_parameters(
        config,
        model,
        targets,
        nothing_whole,
        |parameter, values| {
            let mut first_rank = 0;
            for part in &parts {
                part.add(parameter, combination, first_rank, values);
                if combination == Combination::Cat {
                    first_rank += part.rank_of(parameter);
                }
            }
            Ok(())
        },
    )
}

/// One adapter with its weight.
struct Part<'a> {
    adapter: &'a Adapter,
    values: Vec<f32>,
    weight: f64,
    rank: usize,
}

impl Part<'_> {
    /// Adds this adapter's share of a matrix, its ranks from `first_rank` on.
    fn add(&self, into: &Parameter, how: Combination, first_rank: usize, values: &mut [f32]) {
        let Some((own, (projection, layer))) = self
            .find(&into.name)
            .and_then(|own| Some((own, own.pair()?)))
        else {
            return;
        };
        let scaling = self.adapter.config().scaling(projection, layer);
        let strength = self.weight * scaling;
        let root = strength.abs().sqrt();
        let factor = match (how, own.is_a()) {
            (Combination::Cat, true) => strength,
            (Combination::Cat, false) => 1.0,
            (Combination::Linear, true) => root.copysign(strength),
            (Combination::Linear, false) => root,
        } as f32;
        // A: [R, D_in] takes its rows further down, B: [D_out, R] its columns further right.
        let (down, right) = if own.is_a() {
            (first_rank, 0)
        } else {
            (0, first_rank)
        };
        let source = &self.values[own.range.clone()];
        for (row, source) in source.chunks(own.shape[1]).enumerate() {
            let start = (row + down) * into.shape[1] + right;
            for (value, source) in values[start..].iter_mut().zip(source) {
                *value += factor * source;
            }
        }
    }

    fn find(&self, name: &str) -> Option<&Parameter> {
        let parameters = self.adapter.parameters().iter();
        parameters.clone().find(|parameter| parameter.name == name)
    }

    fn rank_of(&self, parameter: &Parameter) -> usize {
        let rank = |own: &Parameter| own.shape[usize::from(!own.is_a())];
        self.find(&parameter.name).map_or(0, rank)
    }
}

fn greatest_rank(adapter: &Adapter) -> usize {
    let config = adapter.config();
    let patterns = config.rank_pattern.values().copied();
    patterns.fold(config.r, usize::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::TargetModules;
    use crate::tiny;
    use candle_core::Device;

    fn adapter(rank: usize, seed: u64, names: &[&str]) -> Adapter {
        let config = LoraConfig {
            r: rank,
            lora_alpha: 3.0 * rank as f64,
            target_modules: TargetModules::Names(names.iter().map(|&name| name.into()).collect()),
            ..LoraConfig::default()
        };
        let model = tiny::config(crate::Architecture::Llama);
        let mut adapter = Adapter::init(&config, &model, seed, &Device::Cpu).expect("valid");
        let fill = |values: &mut [f32]| {
            for (value, index) in values.iter_mut().zip(0u32..) {
                *value += ((index.wrapping_mul(2_654_435_761) >> 20) as f32 - 2048.0) / 8192.0;
            }
        };
        adapter.update(fill).expect("on the CPU");
        adapter
    }

    /// `s·B·A` of one module, in f64.
    fn update(adapter: &Adapter, projection: Projection, layer: usize) -> Vec<f64> {
        let values = adapter.values().expect("f32");
        let find = |is_a: bool| {
            adapter.parameters().iter().find(|parameter| {
                parameter.is_a() == is_a && parameter.pair() == Some((projection, layer))
            })
        };
        let (Some(a), Some(b)) = (find(true), find(false)) else {
            return Vec::new();
        };
        let (rank, d_in) = (a.shape[0], a.shape[1]);
        let (a, b) = (&values[a.range.clone()], &values[b.range.clone()]);
        let scaling = adapter.config().scaling(projection, layer);
        let sum = |row: usize, col: usize| {
            let product = |r| f64::from(b[row * rank + r]) * f64::from(a[r * d_in + col]);
            scaling * (0..rank).map(product).sum::<f64>()
        };
        (0..b.len() / rank)
            .flat_map(|row| (0..d_in).map(move |col| (row, col)))
            .map(|(row, col)| sum(row, col))
            .collect()
    }

    #[test]
    fn cat_is_the_weighted_sum_of_the_updates() {
        let model = tiny::config(crate::Architecture::Llama);
        let (one, two) = (
            adapter(2, 1, &["q_proj", "down_proj"]),
            adapter(3, 2, &["q_proj", "v_proj"]),
        );
        let weighted = [(&one, 0.75), (&two, -1.5)];
        let combined = combine(&weighted, Combination::Cat, &model).expect("fits");
        assert_eq!(combined.config().r, 5);
        for projection in Projection::ALL {
            let mut expected = vec![0.0; update(&combined, projection, 1).len()];
            for (adapter, weight) in weighted {
                for (sum, value) in expected.iter_mut().zip(update(adapter, projection, 1)) {
                    *sum += weight * value;
                }
            }
            for (value, expected) in update(&combined, projection, 1).iter().zip(expected) {
                assert!(
                    (value - expected).abs() < 1e-6,
                    "{value} against {expected}"
                );
            }
        }
    }

    #[test]
    fn linear_of_one_adapter_is_its_weighted_update() {
        let model = tiny::config(crate::Architecture::Llama);
        let one = adapter(2, 1, &["q_proj"]);
        let combined = combine(&[(&one, -0.5)], Combination::Linear, &model).expect("fits");
        let expected = update(&one, Projection::Q, 0);
        for (value, expected) in update(&combined, Projection::Q, 0).iter().zip(expected) {
            assert!((value + 0.5 * expected).abs() < 1e-6);
        }
    }

    #[test]
    fn what_cannot_be_combined_is_said() {
        let model = tiny::config(crate::Architecture::Llama);
        let (one, two) = (adapter(2, 1, &["q_proj"]), adapter(3, 2, &["q_proj"]));
        let refused = |adapters: &[(&Adapter, f64)], expected: &str| {
            let error = combine(adapters, Combination::Linear, &model).expect_err("refused");
            assert!(error.to_string().contains(expected), "{error}");
        };
        refused(&[], "none to combine");
        refused(
            &[(&one, 1.0), (&two, 1.0)],
            "ranks 2 and 3: combine them with cat",
        );
        refused(&[(&one, f64::NAN)], "a weight of NaN");
    }
}
