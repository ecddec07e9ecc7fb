//! LoRA settings, by the names PEFT's `LoraConfig` gives them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::pattern;
use crate::config::Projection;
use crate::error::{Error, Result};

/// What PEFT calls all seven maps.
const ALL_LINEAR: &str = "all-linear";

/// Layers whose paths an expression is tried on before a model is known.
const LAYERS_TRIED: usize = 256;

/// What to adapt and how strongly; the fields are those of PEFT's `adapter_config.json`.
///
/// ```
/// let config = updraft_model::LoraConfig { r: 8, lora_alpha: 16.0, ..Default::default() };
/// config.validate()?;
/// # Ok::<(), updraft_model::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank: more capacity, more memory and more to learn from the same data.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`.
    #[serde(serialize_with = "whole_if_whole")]
    pub lora_alpha: f64,
    /// Share of each adapted map's inputs that its adapter does not see while training; more keeps
    /// a high rank from learning small data by heart. Nothing is dropped when the adapter runs.
    pub lora_dropout: f64,
    /// Which linear maps are adapted.
    pub target_modules: TargetModules,
    /// Scale by `lora_alpha / √r` instead, which keeps high ranks from learning too slowly.
    pub use_rslora: bool,
    /// Another rank for modules whose name ends with the key, `"layers.0.self_attn.q_proj"`.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Another alpha, likewise.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Modules that are trained whole, as copies of the base's: those whose path ends with one of
    /// these names, such as `lm_head` and `embed_tokens` where a vocabulary is to be learned. Each
    /// takes the memory of its weight, gradients and moments.
    #[serde(
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "none_is_empty"
    )]
    pub modules_to_save: Vec<String>,
    /// Where head and embedding are one weight, train that one and keep them one. Without it each
    /// module that is saved becomes a weight of its own.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ensure_weight_tying: bool,
    /// The base model, for whoever loads the adapter elsewhere.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
}

/// Which linear maps an adapter changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Modules whose name is, or ends with, one of these: `"q_proj"`, `"layers.0.mlp.up_proj"`.
    Names(Vec<String>),
    /// One string: `"all-linear"` for all seven, or a regular expression that matches whole paths
    /// such as `model.layers.0.self_attn.q_proj`.
    Pattern(String),
}

impl Default for LoraConfig {
    /// Rank 16, alpha 16, all seven maps: what the QLoRA paper found to match full fine-tuning,
    /// and what most recipes use.
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::Names(
                Projection::ALL.map(|p| p.name().to_owned()).to_vec(),
            ),
            use_rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            modules_to_save: Vec::new(),
            ensure_weight_tying: false,
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

impl LoraConfig {
    /// Nothing low-rank at all: every weight is trained whole, a tied head stays tied.
    pub fn full_fine_tuning() -> Self {
        let projections = Projection::ALL.map(Projection::name);
        let others = ["embed_tokens", "norm", "lm_head"]; // "norm" ends the names of all norms
        let all = projections.into_iter().chain(others);
        Self {
            target_modules: TargetModules::Names(Vec::new()),
            modules_to_save: all.map(str::to_owned).collect(),
            ensure_weight_tying: true,
            ..Self::default()
        }
    }

    /// Checks that a new adapter can be made and trained from these settings.
    ///
    /// # Errors
    /// [`Error::Config`] for a number out of range, [`Error::Unsupported`] for a setting that would
    /// change training but is not done here.
    pub fn validate(&self) -> Result<()> {
        self.validate_numbers()?;
        match &self.target_modules {
            TargetModules::Pattern(pattern) if pattern != ALL_LINEAR => check_pattern(pattern),
            TargetModules::Names(names) if names.is_empty() && self.modules_to_save.is_empty() => {
                Err(config_error("target_modules", "empty"))
            }
            TargetModules::Names(names) => names.iter().try_for_each(|name| known_module(name)),
            TargetModules::Pattern(_) => Ok(()),
        }
    }

    /// Whether no linear map gets a low-rank update: whole weights are all there is.
    pub fn adapts_nothing(&self) -> bool {
        matches!(&self.target_modules, TargetModules::Names(names) if names.is_empty())
    }

    /// Whether an adapter of these settings says that it was trained over a base of another name.
    ///
    /// One model lies under many paths, so only the last part of the names is compared, without case;
    /// who says nothing contradicts nothing.
    pub fn is_for_another_base(&self, base: &str) -> bool {
        let last = |name: &str| {
            let name = name.trim_end_matches('/');
            name.rsplit('/').next().unwrap_or(name).to_lowercase()
        };
        let own = self.base_model_name_or_path.as_deref();
        own.is_some_and(|own| last(own) != last(base))
    }

    /// The part of [`validate`](Self::validate) that also holds for adapters trained elsewhere.
    pub(crate) fn validate_numbers(&self) -> Result<()> {
        for (field, &rank) in std::iter::once(("r", &self.r))
            .chain(self.rank_pattern.iter().map(|(k, v)| (k.as_str(), v)))
        {
            if rank == 0 || rank > 1 << 16 {
                return Err(config_error(
                    field,
                    format!("{rank} is not a plausible rank"),
                ));
            }
        }
        let alphas = self
            .alpha_pattern
            .iter()
            .map(|(key, alpha)| (key.as_str(), alpha));
        for (field, alpha) in std::iter::once(("lora_alpha", &self.lora_alpha)).chain(alphas) {
            if !alpha.is_finite() {
                return Err(config_error(field, format!("{alpha} is not a number")));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(config_error(
                "lora_dropout",
                format!("{} is not between 0 and 1", self.lora_dropout),
            ));
        }
        let ranks = self.rank_pattern.keys().map(|key| ("rank_pattern", key));
        let alphas = self.alpha_pattern.keys().map(|key| ("alpha_pattern", key));
        ranks
            .chain(alphas)
            .try_for_each(|(field, key)| pattern::check(field, key))
    }

    /// Whether a module is adapted.
    pub fn targets(&self, projection: Projection, layer: usize) -> bool {
        match &self.target_modules {
            TargetModules::Names(names) => names
                .iter()
                .any(|name| ends_with_module(&projection.path(layer), name)),
            TargetModules::Pattern(all) if all == ALL_LINEAR => true,
            TargetModules::Pattern(pattern) => {
                pattern::matches_path(pattern, &projection.path(layer))
            }
        }
    }

    /// A module's rank.
    pub fn rank(&self, projection: Projection, layer: usize) -> usize {
        look_up(&self.rank_pattern, &projection.path(layer))
            .copied()
            .unwrap_or(self.r)
    }

    /// What a module's update is multiplied with: `alpha / rank`, or `alpha / √rank`.
    pub fn scaling(&self, projection: Projection, layer: usize) -> f64 {
        let alpha = look_up(&self.alpha_pattern, &projection.path(layer))
            .copied()
            .unwrap_or(self.lora_alpha);
        let rank = self.rank(projection, layer) as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// PEFT takes the first key that matches, in the order of the file, and the file is sorted.
fn look_up<'a, V>(pattern: &'a BTreeMap<String, V>, path: &str) -> Option<&'a V> {
    pattern
        .iter()
        .find(|(key, _)| pattern::matches_end(key, path))
        .map(|(_, value)| value)
}

fn ends_with_module(path: &str, name: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// An expression must be one, and match a module of some layer.
fn check_pattern(pattern: &str) -> Result<()> {
    pattern::check("target_modules", pattern)?;
    let paths = (0..LAYERS_TRIED)
        .flat_map(|layer| Projection::ALL.map(|projection| projection.path(layer)));
    let mut matched = paths.filter(|path| pattern::matches_path(pattern, path));
    match matched.next() {
        Some(_) => Ok(()),
        None => Err(config_error(
            "target_modules",
            format!("{pattern:?} matches no module such as model.layers.0.self_attn.q_proj"),
        )),
    }
}

fn known_module(name: &str) -> Result<()> {
    let last = name.rsplit('.').next().unwrap_or(name);
    if Projection::ALL
        .iter()
        .any(|projection| projection.name() == last)
    {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("target module {name:?}"),
        instead: "adapt q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj",
    })
}

fn config_error(field: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Config {
        file: "adapter_config.json",
        field: field.into(),
        reason: reason.into(),
    }
}

/// PEFT writes null where there are none.
fn none_is_empty<'de, D: serde::Deserializer<'de>>(names: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(names)?.unwrap_or_default())
}

/// PEFT declares alpha an integer, so a whole one is written as such.
pub(crate) fn whole_if_whole<S: serde::Serializer>(
    value: &f64,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        serializer.serialize_i64(*value as i64)
    } else {
        serializer.serialize_f64(*value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_peft_matches_them() {
        let config = LoraConfig {
            rank_pattern: BTreeMap::from([
                ("layers.1.self_attn.q_proj".to_owned(), 4),
                ("down_proj".to_owned(), 2),
            ]),
            alpha_pattern: BTreeMap::from([("mlp.down_proj".to_owned(), 8.0)]),
            ..LoraConfig::default()
        };
        config.validate().expect("names are fine");
        assert_eq!(config.rank(Projection::Q, 1), 4);
        assert_eq!(config.rank(Projection::Q, 11), 16); // `layers.1.` is not the end of `layers.11.`
        assert_eq!(config.scaling(Projection::Down, 0), 4.0);
        assert_eq!(config.scaling(Projection::Up, 0), 1.0);
        let stabilized = LoraConfig {
            use_rslora: true,
            ..config
        };
        assert_eq!(stabilized.scaling(Projection::Up, 0), 4.0);
    }

    #[test]
    fn targets_are_names_or_their_ends() {
        let target = |names: &[&str]| LoraConfig {
            target_modules: TargetModules::Names(
                names.iter().map(|&name| name.to_owned()).collect(),
            ),
            ..LoraConfig::default()
        };
        assert!(target(&["q_proj"]).targets(Projection::Q, 7));
        assert!(target(&["layers.1.mlp.up_proj"]).targets(Projection::Up, 1));
        assert!(!target(&["layers.1.mlp.up_proj"]).targets(Projection::Up, 11));
        assert!(!target(&["proj"]).targets(Projection::Q, 0));
    }

    #[test]
    fn one_expression_chooses_modules_of_some_layers() {
        let config = LoraConfig {
            target_modules: TargetModules::Pattern(r".*layers\.[0-3]\..*(q|v)_proj".to_owned()),
            rank_pattern: BTreeMap::from([(r"layers\.(0|1)\..*".to_owned(), 4)]),
            ..LoraConfig::default()
        };
        config.validate().expect("sound expressions");
        assert!(config.targets(Projection::Q, 3) && config.targets(Projection::V, 0));
        assert!(!config.targets(Projection::Q, 4) && !config.targets(Projection::K, 0));
        assert_eq!(
            (config.rank(Projection::Q, 1), config.rank(Projection::Q, 2)),
            (4, 16)
        );
    }

    #[test]
    fn what_cannot_be_trained_is_refused_by_name() {
        let refused = |edit: fn(&mut LoraConfig), expected: &str| {
            let mut config = LoraConfig::default();
            edit(&mut config);
            let message = config.validate().expect_err("must be refused").to_string();
            assert!(message.contains(expected), "{message}");
        };
        refused(|c| c.r = 0, "r: 0 is not a plausible rank");
        refused(
            |c| c.lora_dropout = 1.0,
            "lora_dropout: 1 is not between 0 and 1",
        );
        refused(
            |c| c.target_modules = TargetModules::Names(vec!["lm_head".to_owned()]),
            "target module \"lm_head\"",
        );
        refused(
            |c| c.target_modules = TargetModules::Pattern("q_proj".to_owned()),
            "matches no module",
        );
        refused(
            |c| c.target_modules = TargetModules::Pattern("(".to_owned()),
            "no regular expression",
        );
        refused(
            |c| c.rank_pattern = BTreeMap::from([("(?<=q)_proj".to_owned(), 4)]),
            "rank_pattern: \"(?<=q)_proj\" is no regular expression",
        );
        refused(|c| c.lora_alpha = f64::NAN, "lora_alpha: NaN");
    }

    #[test]
    fn a_base_is_known_by_the_last_part_of_its_name() {
        let over = |base: Option<&str>| LoraConfig {
            base_model_name_or_path: base.map(str::to_owned),
            ..LoraConfig::default()
        };
        let hub = over(Some("Qwen/Qwen2.5-0.5B"));
        assert!(!hub.is_for_another_base("models/qwen2.5-0.5b/"));
        assert!(hub.is_for_another_base("models/qwen2.5-1.5b"));
        assert!(!over(None).is_for_another_base("models/qwen2.5-1.5b"));
    }
}
