//! How much of its arithmetic a run needs, and how much the processor could do.

use std::hint::black_box;
use std::time::Instant;

use candle_core::DType;
use half::bf16;
use updraft_chat::Example;
use updraft_kernels::{Mat, MatMut, Threads, Weight, linear};
use updraft_model::{ModelConfig, Parameter, Projection, Role};

/// The names of the two tables in a model's files.
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// What a run has read, as far as it decides how much there is to compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens.
    pub tokens: u64,
    /// Tokens that count towards the loss.
    pub trained_tokens: u64,
    /// Sum over examples of the square of their tokens.
    pub squared_tokens: u64,
}

impl Work {
    /// Counts one more example.
    pub fn add(&mut self, example: &Example) {
        let tokens = example.len() as u64;
        self.tokens += tokens;
        self.trained_tokens += u64::from(example.trained_tokens());
        self.squared_tokens += tokens * tokens;
    }

    /// The useful floating-point operations of training these parameters on it, whatever the engine
    /// does besides, such as recomputing.
    ///
    /// ```text
    /// tokens · (4·linears + 6·pairs + 2·whole)   forward and by input; what is trained by itself too
    /// + trained_tokens · (4·V·C, or 6·V·C)       the head, trained or not, sees supervised rows only
    /// + Σ tokens² · 7·layers·H·D                 causal attention, backward 2.5 times forward
    /// ```
    pub fn flops(&self, model: &ModelConfig, parameters: &[Parameter]) -> f64 {
        let numbers = |projection| {
            let (d_in, d_out) = model.projection_dims(projection);
            (d_in * d_out) as u64
        };
        let layers = model.num_hidden_layers as u64;
        let linears = layers * Projection::ALL.map(numbers).iter().sum::<u64>();
        let head = (model.vocab_size * model.hidden_size) as u64;
        let (mut own, mut own_head) = (0, 0);
        for parameter in parameters {
            let numbers = parameter.range.len() as u64;
            match &parameter.role {
                Role::A(..) | Role::B(..) => own += 6 * numbers,
                // A table that is only looked up costs next to nothing.
                Role::Saved(name) if name == EMBEDDING && !model.tie_word_embeddings => {}
                Role::Saved(name) if name == EMBEDDING || name == HEAD => own_head = 2 * head,
                Role::Saved(_) => own += 2 * numbers,
            }
        }
        let attention = 7 * layers * model.q_dim() as u64;
        self.tokens as f64 * (4 * linears + own) as f64
            + self.trained_tokens as f64 * (4 * head + own_head) as f64
            + self.squared_tokens as f64 * attention as f64
    }
}

/// Floating-point operations per second of the product that training is made of, at a size that
/// suits the processor, in the number type of the weights: the best of a few, in about a tenth of
/// a second.
pub fn gemm_ceiling(threads: &Threads, weights: DType) -> f64 {
    if weights == DType::BF16 {
        best_product(threads, bf16::from_f32(0.5))
    } else {
        best_product(threads, 0.5f32)
    }
}

fn best_product<W: Weight<f32> + Copy>(threads: &Threads, weight: W) -> f64 {
    const ROWS: usize = 512;
    const INNER: usize = 1024;
    const COLS: usize = 1024;
    const TRIES: usize = 6;
    let (x, w) = (vec![0.5f32; ROWS * INNER], vec![weight; COLS * INNER]);
    let mut y = vec![0.0f32; ROWS * COLS];
    let mut product = || {
        let began = Instant::now();
        let (x, w) = (Mat::new(&x, ROWS, INNER), Mat::new(&w, COLS, INNER));
        let out = MatMut::new(&mut y, ROWS, COLS);
        threads.install(|| linear::forward(threads, 1.0, x, w, 0.0, out));
        black_box(&mut y);
        began.elapsed().as_secs_f64()
    };
    product(); // The first one warms up.
    let best = (0..TRIES).map(|_| product()).fold(f64::INFINITY, f64::min);
    (2 * ROWS * INNER * COLS) as f64 / best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Qwen2.5-0.5B: 357.8 M numbers in linear maps, 136.1 M in the head, 8.8 M in a rank-16
    /// adapter, 150,528 operations for each token and token before it.
    #[test]
    fn a_real_model_needs_what_its_arithmetic_says() {
        let model = ModelConfig::from_json(
            br#"{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "vocab_size": 151936, "tie_word_embeddings": true}"#,
        )
        .expect("a configuration");
        let work = Work {
            tokens: 1000,
            trained_tokens: 1000,
            squared_tokens: 1_000_000,
        };
        let parameter = |role, numbers| Parameter {
            name: String::new(),
            shape: vec![numbers],
            range: 0..numbers,
            role,
        };
        let pairs = [parameter(Role::A(Projection::Q, 0), 8_798_208)];
        let per_token = work.flops(&model, &pairs) / 1000.0;
        let expected = 4.0 * 357_826_560.0 + 6.0 * 8_798_208.0 + 4.0 * 136_134_656.0 + 150_528e3;
        assert_eq!(per_token, expected);
        assert!((per_token / 2.18e9 - 1.0).abs() < 0.01);

        // Every weight: half as much again for maps and head, attention as before.
        let whole = [
            parameter(Role::Saved("maps".to_owned()), 357_826_560),
            parameter(Role::Saved(EMBEDDING.to_owned()), 136_134_656),
        ];
        let per_token = work.flops(&model, &whole) / 1000.0;
        let expected = 6.0 * (357_826_560.0 + 136_134_656.0) + 150_528e3;
        assert_eq!(per_token, expected);
    }

    #[test]
    fn the_ceiling_is_a_rate_in_both_number_types() {
        for dtype in [DType::F32, DType::BF16] {
            let ceiling = gemm_ceiling(&Threads::single(), dtype);
            assert!(ceiling.is_finite() && ceiling > 1e6, "{ceiling}");
        }
    }
}
