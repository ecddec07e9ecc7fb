//! Frozen matrices kept in fewer bits, for serving.
//!
//! A quantized matrix `[N, K]` is a tensor of bytes, `[N, K / 32 · 36]`: the blocks of [`q8_0`] side by side.

use std::str::FromStr;

use candle_core::{Device, Tensor};
use safetensors::tensor::Dtype;
use updraft_kernels::{Mat, q8_0};

use crate::bridge::View;
use crate::error::{Error, Result};
use crate::huge_pages;
use crate::weights::{Weights, decode_into};

/// Bytes of a block.
const BYTES: usize = size_of::<q8_0::Block>();

/// How matrices are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// Blocks of 32 integers of 8 bits with a scale: about half the memory of bf16.
    Q8_0,
}

impl FromStr for Quantization {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "q8_0" => Ok(Self::Q8_0),
            _ => Err(Error::Unsupported {
                what: format!("quantization {name}"),
                instead: "use q8_0",
            }),
        }
    }
}

/// Whether rows can be cut into whole blocks.
pub(crate) fn fits(tensors: &[(String, Vec<usize>)]) -> bool {
    let fits = |shape: &[usize]| matches!(shape, [_, cols] if cols.is_multiple_of(q8_0::NUMBERS));
    tensors.iter().all(|(_, shape)| fits(shape))
}

/// A quantized matrix, `[N, K / 32]` blocks.
pub(crate) fn blocks<'a>(bytes: &'a View<'_, u8>) -> Result<Mat<'a, q8_0::Block>> {
    let (rows, cols) = (bytes.mat().num_rows(), bytes.mat().num_cols());
    let (blocks, rest) = bytes.slice().as_chunks();
    if !rest.is_empty() || !cols.is_multiple_of(BYTES) {
        let rest = format!("rows of {cols} bytes are not blocks of {BYTES}");
        return Err(candle_core::Error::Msg(rest).into());
    }
    Ok(Mat::new(blocks, rows, cols / BYTES))
}

impl Weights {
    /// Reads matrices that [fit](fits) one below the other, and quantizes each block as it is read.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub(crate) fn load_q8_0(
        &self,
        tensors: &[(String, Vec<usize>)],
        device: &Device,
    ) -> Result<Tensor> {
        let numbers: usize = tensors
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let mut bytes = huge_pages::vec(numbers / q8_0::NUMBERS * BYTES);
        let mut rows = 0;
        for (name, shape) in tensors {
            let (dtype, stored) = self.stored(name, shape)?;
            quantize(name, dtype, stored, &mut bytes)?;
            rows += shape[0];
        }
        let cols = bytes.len().checked_div(rows).unwrap_or(0);
        Ok(Tensor::from_vec(bytes, (rows, cols), device)?)
    }
}

fn quantize(name: &str, dtype: Dtype, stored: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let mut numbers: Vec<f32> = Vec::new();
    // A few blocks at a time: they stay in the nearest cache between the two loops.
    for piece in stored.chunks(64 * q8_0::NUMBERS * dtype.bitsize() / 8) {
        numbers.clear();
        decode_into(name, dtype, piece, &mut numbers)?;
        for block in numbers.as_chunks().0 {
            out.extend(q8_0::quantize(block));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::config::Architecture;
    use crate::{Batch, BlockTables, Decoder, Threads, tiny};

    #[test]
    fn the_name_is_read_and_others_are_refused() {
        assert_eq!(
            "q8_0".parse::<Quantization>().expect("known"),
            Quantization::Q8_0
        );
        let error = "q4_0".parse::<Quantization>().expect_err("unknown");
        assert_eq!(
            error.to_string(),
            "quantization q4_0 is not supported; use q8_0"
        );
    }

    /// The logits of a prompt with pages.
    fn logits(decoder: &Decoder) -> Vec<f32> {
        let mut batch = Batch::packed([&[5, 6, 7, 8, 9][..]]);
        batch.logit_rows = (0..5).collect();
        batch.kv = Some(BlockTables {
            block_size: 8,
            tables: vec![vec![0]],
        });
        let mut pages = decoder.new_pages(1, 8).expect("pages");
        let hidden = decoder
            .forward(&batch, &[], Some(&mut pages))
            .expect("a sound batch");
        let logits = decoder.logits(&hidden).expect("hidden states");
        logits.to_vec().expect("f32")
    }

    /// The same model with every matrix that is quantized replaced by what it then stands for.
    fn dequantized(weights: &Weights) -> Weights {
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = weights
            .names()
            .map(|name| {
                let shape = weights.shape(name).expect("named").to_vec();
                let numbers = weights
                    .tensor(name)
                    .and_then(|t| Ok(t.flatten_all()?.to_vec1::<f32>()?));
                let mut numbers = numbers.expect("f32");
                if fits(&[(name.to_owned(), shape.clone())]) {
                    for block in numbers.as_chunks_mut().0 {
                        *block = q8_0::widen(&q8_0::quantize(block));
                    }
                }
                let bytes = numbers
                    .iter()
                    .flat_map(|number| number.to_le_bytes())
                    .collect();
                (name.to_owned(), shape, bytes)
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytes);
            (name, view.expect("its own bytes"))
        });
        let file = safetensors::serialize(views, None).expect("sound views");
        let files = vec![("model.safetensors".to_owned(), file.into())];
        Weights::from_files(files).expect("its own file")
    }

    #[test]
    fn a_quantized_decoder_is_the_decoder_of_the_widened_weights_to_the_bit() {
        for architecture in [
            Architecture::Qwen2,
            Architecture::Qwen3,
            Architecture::Llama,
        ] {
            // An intermediate width of 96 is whole blocks; 80 is not, and stays bf16.
            let mut config = tiny::config(architecture);
            config.intermediate_size = 96;
            let weights = tiny::weights(&config, 1);
            let threads = Threads::single();
            let q8_0 = Quantization::Q8_0;
            let quantized =
                Decoder::load_quantized(&config, &weights, q8_0, &Device::Cpu, &threads);
            let widened = dequantized(&weights);
            let widened = Decoder::load(&config, &widened, DType::F32, &Device::Cpu, &threads);
            let (quantized, widened) = (quantized.expect("sound"), widened.expect("sound"));
            assert_eq!(logits(&quantized), logits(&widened));

            let whole = Decoder::load(&config, &weights, DType::F32, &Device::Cpu, &threads);
            let (near, exact) = (logits(&quantized), logits(&whole.expect("sound")));
            let error = near
                .iter()
                .zip(&exact)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(error > 0.0 && error < 0.1, "{error}");
        }
    }

    #[test]
    fn rows_that_are_not_whole_blocks_stay_in_bf16() {
        let config = tiny::config(Architecture::Qwen2); // an intermediate width of 80
        let weights = tiny::weights(&config, 1);
        let threads = Threads::single();
        let quantized = Decoder::load_quantized(
            &config,
            &weights,
            Quantization::Q8_0,
            &Device::Cpu,
            &threads,
        );
        let logits = logits(&quantized.expect("sound"));
        assert!(logits.iter().all(|logit| logit.is_finite()));
    }

    #[test]
    fn a_quantized_decoder_is_not_trained_on() {
        let config = tiny::config(Architecture::Qwen2);
        let weights = tiny::weights(&config, 1);
        let threads = Threads::single();
        let decoder = Decoder::load_quantized(
            &config,
            &weights,
            Quantization::Q8_0,
            &Device::Cpu,
            &threads,
        )
        .expect("sound");
        let w = &decoder.head;
        let dy = Tensor::zeros((1, config.vocab_size), DType::F32, &Device::Cpu)
            .expect("zeros")
            .into();
        let ops = crate::ops::Ops {
            threads,
            rows: crate::ops::Rows::Together,
        };
        assert!(ops.linear_backward(&dy, w).is_err());
    }
}
