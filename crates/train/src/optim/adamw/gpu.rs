//! AdamW's moments on a GPU, and steps of all parameters at once.

use std::collections::BTreeMap;

use updraft_kernels::adamw::AdamW as Rule;
use updraft_kernels::cuda::adamw::{Flat, Tensors, Trained};
use updraft_kernels::cuda::{Buffer, Gpu, View, ViewMut};
use updraft_model::{Error as ModelError, Parameter};

use super::super::{GpuOptimizer, same_len};
use super::{AdamW, Moments};
use crate::Result;

/// The moments of some parameters, in two buffers laid out as those are.
#[derive(Debug)]
pub(super) struct There {
    gpu: Gpu,
    parameters: Vec<Parameter>,
    tensors: Tensors,
    /// By how much the learning rates of a group differ, and its weight decay.
    groups: Vec<(f64, f64)>,
    exp_avg: Buffer<f32>,
    exp_avg_sq: Buffer<f32>,
}

impl There {
    /// The moments of each parameter, for the host.
    pub(super) fn download(&self) -> Result<BTreeMap<String, Moments>> {
        let host = |buffer: &Buffer<f32>| self.gpu.download(buffer.view());
        let exp_avg = host(&self.exp_avg).map_err(ModelError::from)?;
        let exp_avg_sq = host(&self.exp_avg_sq).map_err(ModelError::from)?;
        let of = |parameter: &Parameter| {
            let moments = Moments {
                exp_avg: exp_avg[parameter.range.clone()].to_vec(),
                exp_avg_sq: exp_avg_sq[parameter.range.clone()].to_vec(),
            };
            (parameter.name.clone(), moments)
        };
        Ok(self.parameters.iter().map(of).collect())
    }
}

impl AdamW {
    /// Moves the moments of these parameters to a GPU, unless they are there.
    fn place(&mut self, gpu: &Gpu, parameters: &[Parameter]) -> Result<()> {
        let is_there = |there: &There| there.gpu == *gpu && there.parameters == parameters;
        if self.there.as_ref().is_some_and(is_there) {
            return Ok(());
        }
        self.settle()?;
        let len = parameters.iter().map(|parameter| parameter.range.end).max();
        let len = len.unwrap_or(0);
        let (mut groups, mut trained) = (Vec::new(), Vec::new());
        for Parameter { name, range, .. } in parameters {
            let own = self.group_of(name);
            let known = groups.iter().position(|group| *group == own);
            let group = known.unwrap_or(groups.len());
            if known.is_none() {
                groups.push(own);
            }
            trained.push(Trained {
                range: range.clone(),
                group,
            });
            if let Some(moments) = self.moments.get(name) {
                same_len(name, moments.exp_avg.len(), range.len())?;
            }
        }
        let tensors = Tensors::new(gpu, &trained, len).map_err(ModelError::from)?;
        let moved = |of: fn(&Moments) -> &[f32]| {
            let mut flat: Option<Vec<f32>> = None;
            for Parameter { name, range, .. } in parameters {
                if let Some(moments) = self.moments.get(name) {
                    let flat = flat.get_or_insert_with(|| vec![0.0; len]);
                    flat[range.clone()].copy_from_slice(of(moments));
                }
            }
            match flat {
                Some(flat) => gpu.upload(&flat),
                None => gpu.zeros(len),
            }
        };
        let exp_avg = moved(|moments| &moments.exp_avg).map_err(ModelError::from)?;
        let exp_avg_sq = moved(|moments| &moments.exp_avg_sq).map_err(ModelError::from)?;
        for parameter in parameters {
            self.moments.remove(&parameter.name);
        }
        self.there = Some(There {
            gpu: gpu.clone(),
            parameters: parameters.to_vec(),
            tensors,
            groups,
            exp_avg,
            exp_avg_sq,
        });
        Ok(())
    }
}

impl GpuOptimizer for AdamW {
    fn clip(
        &mut self,
        gpu: &Gpu,
        parameters: &[Parameter],
        gradients: View<'_, f32>,
        unscale: f64,
        max_grad_norm: f64,
    ) -> Result<f64> {
        self.place(gpu, parameters)?;
        let there = self.there.as_mut().expect("just placed");
        let tensors = &mut there.tensors;
        let found = tensors
            .clip(gpu, gradients, unscale, max_grad_norm)
            .and_then(|()| tensors.norm(gpu));
        Ok(found.map_err(ModelError::from)?.norm)
    }

    fn update_all(&mut self, values: ViewMut<'_, f32>, gradients: View<'_, f32>) -> Result<()> {
        let there = self.there.as_mut().expect("clipped before");
        let rule = |&(ratio, weight_decay): &(f64, f64)| Rule {
            learning_rate: self.rule.learning_rate * ratio,
            weight_decay,
            ..self.rule
        };
        let rules: Vec<Rule> = there.groups.iter().map(rule).collect();
        let flat = Flat {
            param: values,
            grad: gradients,
            exp_avg: there.exp_avg.view_mut(),
            exp_avg_sq: there.exp_avg_sq.view_mut(),
        };
        let stepped = there.tensors.step(&there.gpu, &rules, self.step, &flat);
        Ok(stepped.map_err(ModelError::from)?)
    }
}
