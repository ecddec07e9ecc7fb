//! The same model over naive differentiable operations: candle's autograd finds the gradients by
//! itself. Slow, and written from the papers and transformers, not from the crate.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use updraft_model::{Adapter, ModelConfig, Part, Projection, Weights};

/// A model whose adapter parameters are variables; all in f64.
pub(crate) struct Oracle<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    /// By PEFT's names.
    pub(crate) variables: BTreeMap<String, Var>,
    scalings: BTreeMap<(usize, Projection), f64>,
    stays_tied: bool,
}

impl<'a> Oracle<'a> {
    pub(crate) fn new(config: &'a ModelConfig, weights: &'a Weights, adapter: &Adapter) -> Self {
        let values = adapter.values().expect("readable");
        let (mut variables, mut scalings) = (BTreeMap::new(), BTreeMap::new());
        for parameter in adapter.parameters() {
            let numbers: Vec<f64> = values[parameter.range.clone()]
                .iter()
                .copied()
                .map(f64::from)
                .collect();
            let tensor = Tensor::from_vec(numbers, &parameter.shape[..], &Device::Cpu)
                .expect("its own shape");
            variables.insert(
                parameter.name.clone(),
                Var::from_tensor(&tensor).expect("a tensor"),
            );
            if let Some((projection, layer)) = parameter.pair() {
                let scaling = adapter.config().scaling(projection, layer);
                scalings.insert((layer, projection), scaling);
            }
        }
        Self {
            config,
            weights,
            variables,
            scalings,
            stays_tied: adapter.config().ensure_weight_tying,
        }
    }

    /// The summed cross-entropy of a part.
    pub(crate) fn loss(&self, part: &Part) -> Result<Tensor> {
        let rows = Tensor::from_slice(&part.batch.logit_rows, part.num_labels(), &Device::Cpu)?;
        let labels = Tensor::from_slice(&part.labels, (part.num_labels(), 1), &Device::Cpu)?;
        let documents: Vec<_> = (0..part.batch.num_sequences())
            .map(|s| self.logits(&part.batch.ids[part.batch.rows(s)]))
            .collect::<Result<_>>()?;
        let logits = Tensor::cat(&documents, 0)?.index_select(&rows, 0)?;
        let max = logits.max_keepdim(D::Minus1)?.detach();
        let log_sum = (logits
            .broadcast_sub(&max)?
            .exp()?
            .sum_keepdim(D::Minus1)?
            .log()?
            + max)?;
        (log_sum - logits.gather(&labels, 1)?)?.sum_all()
    }

    /// One document's logits, `[T, V]`.
    pub(crate) fn logits(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::from_slice(ids, ids.len(), &Device::Cpu)?;
        let embedding = self.weight("model.embed_tokens.weight")?;
        let mut x = embedding.index_select(&ids, 0)?;
        for layer in 0..self.config.num_hidden_layers {
            let normed = self.norm(&x, &format!("model.layers.{layer}.input_layernorm.weight"))?;
            x = (x + self.attention(&normed, layer)?)?;
            let normed = self.norm(
                &x,
                &format!("model.layers.{layer}.post_attention_layernorm.weight"),
            )?;
            let gate = self.linear(&normed, Projection::Gate, layer)?;
            let silu = (&gate / (gate.neg()?.exp()? + 1.0)?)?;
            let inner = (silu * self.linear(&normed, Projection::Up, layer)?)?;
            x = (x + self.linear(&inner, Projection::Down, layer)?)?;
        }
        let x = self.norm(&x, "model.norm.weight")?;
        let tied = self.config.tie_word_embeddings;
        let own_head = self.variable("lm_head.weight").is_some();
        let head = match (tied && !own_head, self.stays_tied) {
            (false, _) => self.weight("lm_head.weight")?,
            (true, true) => embedding,
            (true, false) => self.base("model.embed_tokens.weight")?,
        };
        x.matmul(&head.t()?)
    }

    fn attention(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let (tokens, d) = (x.dim(0)?, self.config.head_dim);
        let heads = |projection, count: usize| -> Result<Tensor> {
            self.linear(x, projection, layer)?
                .reshape((tokens, count, d))?
                .transpose(0, 1)?
                .contiguous() // [H, T, D]
        };
        let (h, h_kv) = (
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
        );
        let (mut q, mut k, v) = (
            heads(Projection::Q, h)?,
            heads(Projection::K, h_kv)?,
            heads(Projection::V, h_kv)?,
        );
        if self.config.qk_norm {
            q = self.norm(&q, &format!("model.layers.{layer}.self_attn.q_norm.weight"))?;
            k = self.norm(&k, &format!("model.layers.{layer}.self_attn.k_norm.weight"))?;
        }
        let repeat = |x: Tensor| -> Result<Tensor> {
            x.unsqueeze(1)?
                .broadcast_as((h_kv, h / h_kv, tokens, d))?
                .contiguous()?
                .reshape((h, tokens, d))
        };
        let (q, k, v) = (self.rotate(&q)?, repeat(self.rotate(&k)?)?, repeat(v)?);
        let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (d as f64).sqrt())?; // [H, T, T]
        let mask: Vec<f64> = (0..tokens * tokens)
            .map(|i| if i % tokens > i / tokens { -1e300 } else { 0.0 })
            .collect();
        let scores =
            scores.broadcast_add(&Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu)?)?;
        let exp = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
            .exp()?;
        let probabilities = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
        let out = probabilities
            .matmul(&v)?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((tokens, h * d))?;
        self.linear(&out, Projection::O, layer)
    }

    /// `x: [.., T, D]`
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, half) = (x.dim(D::Minus2)?, self.config.head_dim / 2);
        let frequencies = self.config.rope.inverse_frequencies(self.config.head_dim);
        let angles: Vec<f64> = (0..tokens)
            .flat_map(|position| {
                frequencies
                    .iter()
                    .map(move |&f| position as f64 * f64::from(f))
            })
            .collect();
        let angles = Tensor::from_vec(angles, (tokens, half), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let (a, b) = (
            x.narrow(D::Minus1, 0, half)?,
            x.narrow(D::Minus1, half, half)?,
        );
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], D::Minus1)
    }

    fn linear(&self, x: &Tensor, projection: Projection, layer: usize) -> Result<Tensor> {
        let path = projection.path(layer);
        let mut y = x.matmul(&self.weight(&format!("{path}.weight"))?.t()?)?;
        if self.config.projection_bias(projection) {
            y = y.broadcast_add(&self.weight(&format!("{path}.bias"))?)?;
        }
        let variable = |matrix: &str| {
            self.variables
                .get(&format!("base_model.model.{path}.lora_{matrix}.weight"))
        };
        match (variable("A"), variable("B")) {
            (Some(a), Some(b)) => {
                let scaling = self.scalings[&(layer, projection)];
                y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scaling)?
            }
            _ => Ok(y),
        }
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(mean + self.config.rms_norm_eps)?.sqrt()?)?
            .broadcast_mul(&self.weight(name)?)
    }

    /// What is trained in place of a weight of the base's.
    fn variable(&self, name: &str) -> Option<&Var> {
        self.variables.get(&format!("base_model.model.{name}"))
    }

    fn weight(&self, name: &str) -> Result<Tensor> {
        match self.variable(name) {
            Some(variable) => Ok(variable.as_tensor().clone()),
            None => self.base(name),
        }
    }

    fn base(&self, name: &str) -> Result<Tensor> {
        self.weights
            .tensor(name)
            .map_err(candle_core::Error::wrap)?
            .to_dtype(DType::F64)
    }
}
