//! The adapter: pairs of low-rank matrices, all in one flat buffer.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::config::LoraConfig;
use crate::bridge::edit_slice;
use crate::config::{ModelConfig, Projection};
use crate::error::{Error, Result};
use crate::layers::Group;
use crate::random::Random;

/// A LoRA adapter: for each adapted linear map `y = x·Wᵀ` the pair that adds `s·(x·Aᵀ)·Bᵀ`.
///
/// All parameters lie in one buffer, so an optimizer step, a checkpoint or a reduction over
/// workers is one pass over one slice; [`parameters`](Self::parameters) says which range is what.
/// A fresh adapter has `B = 0` and changes nothing.
///
/// # Source
/// Hu et al. 2021, §4.1, <https://arxiv.org/abs/2106.09685>
#[derive(Debug)]
pub struct Adapter {
    config: LoraConfig,
    plan: Plan,
    values: Tensor,
    layers: Vec<LayerAdapter>,
}

/// Where one parameter lies in the flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// PEFT's key, `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// `A: [R, D_in]` or `B: [D_out, R]`.
    pub shape: [usize; 2],
    /// Its elements.
    pub range: Range<usize>,
    /// The block it belongs to.
    pub layer: usize,
    /// The linear map it belongs to.
    pub projection: Projection,
}

/// The adapters of a block's four groups of linear maps, as views of a flat buffer.
pub(crate) type LayerAdapter = [Option<GroupAdapter>; 4];

/// The adapters of linear maps that share their input: one stacked `A`, so that `x·Aᵀ` is one product.
#[derive(Debug)]
pub(crate) struct GroupAdapter {
    /// `[ΣR, D_in]`
    pub(crate) a: Tensor,
    pub(crate) pairs: Vec<PairAdapter>,
}

#[derive(Debug)]
pub(crate) struct PairAdapter {
    pub(crate) projection: Projection,
    /// The rows of the stacked `A` that are this pair's.
    pub(crate) ranks: Range<usize>,
    /// `[D_out, R]`
    pub(crate) b: Tensor,
    pub(crate) scaling: f64,
}

/// Which parameters there are: in each block, group by group, the `A`s and then the `B`s.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) parameters: Vec<Parameter>,
    groups: Vec<[Option<GroupPlan>; 4]>,
    len: usize,
}

#[derive(Debug, Clone)]
struct GroupPlan {
    /// Elements of the stacked `A`, and its rows.
    a: (Range<usize>, usize),
    pairs: Vec<PairPlan>,
}

#[derive(Debug, Clone)]
struct PairPlan {
    projection: Projection,
    ranks: Range<usize>,
    b: Range<usize>,
    scaling: f64,
}

impl Adapter {
    /// A fresh adapter: `A ~ U(±1/√D_in)`, `B = 0`, as PEFT starts. The numbers depend on the seed
    /// and the parameter's name alone.
    ///
    /// # Errors
    /// As [`LoraConfig::validate`]; [`Error::Config`] if no linear map of the model is targeted.
    pub fn init(
        config: &LoraConfig,
        model: &ModelConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        config.validate()?;
        let plan = Plan::new(config, model, |projection, layer| {
            config.targets(projection, layer)
        });
        if plan.parameters.is_empty() {
            return Err(Error::Config {
                file: "adapter_config.json",
                field: "target_modules".to_owned(),
                reason: "no linear map of the model is named".to_owned(),
            });
        }
        let mut values = vec![0.0_f32; plan.len];
        for parameter in plan.parameters.iter().filter(|parameter| parameter.is_a()) {
            let bound = 1.0 / (parameter.shape[1] as f64).sqrt();
            let mut random = Random::new(seed, &parameter.name);
            values[parameter.range.clone()].fill_with(|| random.uniform(-bound, bound) as f32);
        }
        let values = Tensor::from_vec(values, plan.len, device)?;
        Self::from_values(config.clone(), plan, values)
    }

    /// An adapter of given values; `fill` is called with each parameter and its place.
    pub(crate) fn from_parameters(
        config: LoraConfig,
        model: &ModelConfig,
        targets: impl Fn(Projection, usize) -> bool,
        mut fill: impl FnMut(&Parameter, &mut [f32]) -> Result<()>,
    ) -> Result<Self> {
        let plan = Plan::new(&config, model, targets);
        let mut values = vec![0.0_f32; plan.len];
        for parameter in &plan.parameters {
            fill(parameter, &mut values[parameter.range.clone()])?;
        }
        let values = Tensor::from_vec(values, plan.len, &Device::Cpu)?;
        Self::from_values(config, plan, values)
    }

    fn from_values(config: LoraConfig, plan: Plan, values: Tensor) -> Result<Self> {
        let layers = plan.views(&values)?;
        Ok(Self {
            config,
            plan,
            values,
            layers,
        })
    }

    /// The settings it was made from.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Its parameters in the order of the flat buffer.
    pub fn parameters(&self) -> &[Parameter] {
        &self.plan.parameters
    }

    /// How many numbers it holds.
    pub fn num_parameters(&self) -> usize {
        self.plan.len
    }

    /// Its number type: F32 unless converted.
    pub fn dtype(&self) -> DType {
        self.values.dtype()
    }

    /// A copy of the flat buffer, as f32.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device fails.
    pub fn values(&self) -> Result<Vec<f32>> {
        Ok(self.values.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// Changes the flat buffer in place: an optimizer step, or a checkpoint coming back.
    ///
    /// # Errors
    /// [`Error::Device`] off the CPU, [`Error::Candle`] if the adapter is not F32.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        edit_slice(&self.values, change)
    }

    /// The same adapter in another number type, or with its own memory in the same one.
    ///
    /// # Errors
    /// [`Error::Candle`] if candle cannot convert.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let values = if dtype == self.dtype() {
            self.values.copy()?
        } else {
            self.values.to_dtype(dtype)?
        };
        Self::from_values(self.config.clone(), self.plan.clone(), values)
    }

    /// Checks that it fits a model.
    ///
    /// # Errors
    /// [`Error::Adapter`] with the first shape that differs.
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        for parameter in &self.plan.parameters {
            if parameter.layer >= model.num_hidden_layers {
                let (layer, layers) = (parameter.layer, model.num_hidden_layers);
                return Err(Error::adapter(format!(
                    "it adapts layer {layer}, the model has {layers}"
                )));
            }
            let (d_in, d_out) = model.projection_dims(parameter.projection);
            let fits = if parameter.is_a() {
                parameter.shape[1] == d_in
            } else {
                parameter.shape[0] == d_out
            };
            if !fits {
                let (name, shape) = (&parameter.name, parameter.shape);
                return Err(Error::adapter(format!(
                    "{name} has shape {shape:?}, the map is {d_in} to {d_out}"
                )));
            }
        }
        Ok(())
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The adapters of one block; none beyond the last adapted one.
    pub(crate) fn layer(&self, layer: usize) -> Option<&LayerAdapter> {
        self.layers.get(layer)
    }

    /// The pair of one linear map, `A` as its own view.
    pub(crate) fn pair(
        &self,
        projection: Projection,
        layer: usize,
    ) -> Result<Option<(Tensor, &PairAdapter)>> {
        let group = self
            .layer(layer)
            .and_then(|groups| groups[Group::of(projection) as usize].as_ref());
        let pair = group.and_then(|group| {
            let pair = group
                .pairs
                .iter()
                .find(|pair| pair.projection == projection)?;
            Some((group, pair))
        });
        match pair {
            Some((group, pair)) => Ok(Some((
                group.a.narrow(0, pair.ranks.start, pair.ranks.len())?,
                pair,
            ))),
            None => Ok(None),
        }
    }
}

impl Parameter {
    /// Whether it is an `A` (and not a `B`).
    pub fn is_a(&self) -> bool {
        self.name.ends_with(".lora_A.weight")
    }
}

impl Plan {
    fn new(
        config: &LoraConfig,
        model: &ModelConfig,
        targets: impl Fn(Projection, usize) -> bool,
    ) -> Self {
        let mut plan = Self {
            parameters: Vec::new(),
            groups: Vec::new(),
            len: 0,
        };
        for layer in 0..model.num_hidden_layers {
            let groups = Group::ALL.map(|group| {
                let adapted: Vec<_> = group
                    .projections()
                    .iter()
                    .copied()
                    .filter(|&projection| targets(projection, layer))
                    .collect();
                (!adapted.is_empty()).then(|| plan.add_group(config, model, &adapted, layer))
            });
            plan.groups.push(groups);
        }
        plan
    }

    fn add_group(
        &mut self,
        config: &LoraConfig,
        model: &ModelConfig,
        adapted: &[Projection],
        layer: usize,
    ) -> GroupPlan {
        let (start, mut rank_end) = (self.len, 0);
        let mut pairs = Vec::new();
        for &projection in adapted {
            let rank = config.rank(projection, layer);
            let (d_in, _) = model.projection_dims(projection);
            self.add(projection, layer, "A", [rank, d_in]);
            let ranks = rank_end..rank_end + rank;
            rank_end = ranks.end;
            pairs.push(PairPlan {
                projection,
                ranks,
                b: 0..0,
                scaling: config.scaling(projection, layer),
            });
        }
        let a = (start..self.len, rank_end);
        for pair in &mut pairs {
            let (_, d_out) = model.projection_dims(pair.projection);
            pair.b = self.add(pair.projection, layer, "B", [d_out, pair.ranks.len()]);
        }
        GroupPlan { a, pairs }
    }

    fn add(
        &mut self,
        projection: Projection,
        layer: usize,
        matrix: &str,
        shape: [usize; 2],
    ) -> Range<usize> {
        let range = self.len..self.len + shape[0] * shape[1];
        self.len = range.end;
        let name = format!(
            "base_model.model.{}.lora_{matrix}.weight",
            projection.path(layer)
        );
        self.parameters.push(Parameter {
            name,
            shape,
            range: range.clone(),
            layer,
            projection,
        });
        range
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Views of a flat buffer laid out by this plan.
    pub(crate) fn views(&self, values: &Tensor) -> Result<Vec<LayerAdapter>> {
        let matrix = |range: &Range<usize>, rows: usize| -> Result<Tensor> {
            Ok(values
                .narrow(0, range.start, range.len())?
                .reshape((rows, ()))?)
        };
        let group = |plan: &GroupPlan| -> Result<GroupAdapter> {
            let pairs = plan.pairs.iter().map(|pair| {
                Ok(PairAdapter {
                    projection: pair.projection,
                    ranks: pair.ranks.clone(),
                    b: matrix(&pair.b, pair.b.len() / pair.ranks.len())?,
                    scaling: pair.scaling,
                })
            });
            Ok(GroupAdapter {
                a: matrix(&plan.a.0, plan.a.1)?,
                pairs: pairs.collect::<Result<_>>()?,
            })
        };
        self.groups
            .iter()
            .map(|[qkv, o, gate_up, down]| {
                let view = |plan: &Option<GroupPlan>| plan.as_ref().map(group).transpose();
                Ok([view(qkv)?, view(o)?, view(gate_up)?, view(down)?])
            })
            .collect()
    }
}
