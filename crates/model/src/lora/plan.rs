//! Where each parameter of an adapter lies in its flat buffer.

use std::ops::Range;

use super::config::LoraConfig;
use super::saved::{Saved, SavedModules};
use crate::config::{ModelConfig, Projection};
use crate::error::{Error, Result};
use crate::layers::Group;
use crate::tensor::Tensor;

/// Where one parameter lies in the flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// PEFT's key, `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// `A: [R, D_in]`, `B: [D_out, R]`, or that of a weight of the base model.
    pub shape: Vec<usize>,
    /// Its elements.
    pub range: Range<usize>,
    /// What it is.
    pub role: Role,
}

/// What a [`Parameter`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The `A` of a linear map in a block of this number.
    A(Projection, usize),
    /// The `B` of a linear map in a block of this number.
    B(Projection, usize),
    /// A weight trained whole, by its name in the base model's files.
    Saved(String),
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

/// A flat buffer by what lies where.
#[derive(Debug)]
pub(crate) struct Views {
    pub(crate) layers: Vec<LayerAdapter>,
    pub(crate) saved: Saved,
}

/// Which parameters there are: in each block, group by group, the `A`s and then the `B`s; after all
/// blocks the weights that are trained whole.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) parameters: Vec<Parameter>,
    groups: Vec<[Option<GroupPlan>; 4]>,
    saved: Vec<SavedPlan>,
    tied_head: bool,
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

/// Weights that a layer holds as one tensor.
#[derive(Debug, Clone)]
struct SavedPlan {
    /// The first one's name.
    name: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Parameter {
    /// Whether it is an `A` (and neither a `B` nor a whole weight).
    pub fn is_a(&self) -> bool {
        matches!(self.role, Role::A(..))
    }

    /// The linear map whose `A` or `B` it is, with its block.
    pub fn pair(&self) -> Option<(Projection, usize)> {
        match self.role {
            Role::A(projection, layer) | Role::B(projection, layer) => Some((projection, layer)),
            Role::Saved(_) => None,
        }
    }

    /// Checks that it fits a model.
    pub(super) fn check(
        &self,
        model: &ModelConfig,
        weights: &[(String, Vec<usize>)],
    ) -> Result<()> {
        let (name, shape) = (&self.name, &self.shape);
        let Some((projection, layer)) = self.pair() else {
            let known = |(own, expected): &(String, Vec<usize>)| {
                name.strip_prefix(PREFIX) == Some(own) && shape == expected
            };
            return match weights.iter().any(known) {
                true => Ok(()),
                false => Err(Error::adapter(format!(
                    "{name} of shape {shape:?} is no weight of the model"
                ))),
            };
        };
        if layer >= model.num_hidden_layers {
            let layers = model.num_hidden_layers;
            return Err(Error::adapter(format!(
                "it adapts layer {layer}, the model has {layers}"
            )));
        }
        let (d_in, d_out) = model.projection_dims(projection);
        let fits = match self.is_a() {
            true => shape[1] == d_in,
            false => shape[0] == d_out,
        };
        match fits {
            true => Ok(()),
            false => Err(Error::adapter(format!(
                "{name} has shape {shape:?}, the map is {d_in} to {d_out}"
            ))),
        }
    }
}

/// What PEFT writes before every module's path.
pub(super) const PREFIX: &str = "base_model.model.";

impl Views {
    /// The adapters of one block; none beyond the last adapted one.
    pub(crate) fn layer(&self, layer: usize) -> Option<&LayerAdapter> {
        self.layers.get(layer)
    }
}

impl Plan {
    pub(super) fn new(
        config: &LoraConfig,
        model: &ModelConfig,
        targets: impl Fn(Projection, usize) -> bool,
        saved: SavedModules,
    ) -> Self {
        let mut plan = Self {
            parameters: Vec::new(),
            groups: Vec::new(),
            saved: Vec::new(),
            tied_head: saved.tied_head,
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
        for stack in saved.stacks {
            plan.add_stack(stack);
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
            self.add_matrix(
                "A",
                [rank, d_in],
                Role::A(projection, layer),
                &projection.path(layer),
            );
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
            let projection = pair.projection;
            let (_, d_out) = model.projection_dims(projection);
            let shape = [d_out, pair.ranks.len()];
            pair.b = self.add_matrix(
                "B",
                shape,
                Role::B(projection, layer),
                &projection.path(layer),
            );
        }
        GroupPlan { a, pairs }
    }

    fn add_matrix(
        &mut self,
        matrix: &str,
        shape: [usize; 2],
        role: Role,
        path: &str,
    ) -> Range<usize> {
        self.add(
            format!("{PREFIX}{path}.lora_{matrix}.weight"),
            shape.to_vec(),
            role,
        )
    }

    fn add_stack(&mut self, stack: Vec<(String, Vec<usize>)>) {
        let start = self.len;
        let (name, mut shape) = stack[0].clone();
        shape[0] = stack.iter().map(|(_, shape)| shape[0]).sum();
        for (name, shape) in stack {
            self.add(format!("{PREFIX}{name}"), shape, Role::Saved(name));
        }
        self.saved.push(SavedPlan {
            name,
            shape,
            range: start..self.len,
        });
    }

    fn add(&mut self, name: String, shape: Vec<usize>, role: Role) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        self.parameters.push(Parameter {
            name,
            shape,
            range: range.clone(),
            role,
        });
        range
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether one weight is trained as embedding and head alike.
    pub(crate) fn tied_head(&self) -> bool {
        self.tied_head
    }

    /// Views of a flat buffer laid out by this plan.
    pub(crate) fn views(&self, values: &Tensor) -> Result<Views> {
        let matrix = |range: &Range<usize>, rows: usize| -> Result<Tensor> {
            let part = values.narrow(0, range.start, range.len())?;
            part.reshape(&[rows, range.len() / rows])
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
        let layers = self.groups.iter().map(|[qkv, o, gate_up, down]| {
            let view = |plan: &Option<GroupPlan>| plan.as_ref().map(group).transpose();
            Ok([view(qkv)?, view(o)?, view(gate_up)?, view(down)?])
        });
        let saved = self.saved.iter().map(|plan| {
            let flat = values.narrow(0, plan.range.start, plan.range.len())?;
            Ok((plan.name.clone(), flat.reshape(&plan.shape)?))
        });
        Ok(Views {
            layers: layers.collect::<Result<_>>()?,
            saved: Saved::new(saved.collect::<Result<_>>()?, self.tied_head),
        })
    }
}
