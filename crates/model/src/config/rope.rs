//! Rotary position settings: base, scaling, and the frequencies they give.

use super::config_error;
use crate::error::Result;

/// Rotary position settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// The base; higher turns more slowly with position.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched for contexts longer than the model first saw.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The stretch.
        factor: f64,
    },
    /// Llama 3.1: slow frequencies divided, fast ones kept, a ramp between.
    Llama3 {
        /// The stretch of the slow frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched whole.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length before stretching.
        original_max_position_embeddings: f64,
    },
}

impl RopeConfig {
    /// The `D / 2` inverse frequencies, rounded to f32 as transformers holds them.
    ///
    /// # Source
    /// Su et al. 2021, §3.2, <https://arxiv.org/abs/2104.09864>; the Llama 3 ramp as in
    /// transformers' `_compute_llama3_parameters`.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| {
                let frequency = self.theta.powf(-2.0 * i as f64 / head_dim as f64);
                self.scale(frequency) as f32
            })
            .collect()
    }

    fn scale(&self, frequency: f64) -> f64 {
        match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength > original / low_freq_factor {
                    frequency / factor
                } else if wavelength < original / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        let positive = |field: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(config_error(
                    field,
                    format!("{value} is not a positive number"),
                ))
            }
        };
        positive("rope_theta", self.theta)?;
        match self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("rope factor", factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                positive("rope factor", factor)?;
                positive("rope low_freq_factor", low_freq_factor)?;
                positive(
                    "rope original_max_position_embeddings",
                    original_max_position_embeddings,
                )?;
                positive(
                    "rope high_freq_factor - low_freq_factor",
                    high_freq_factor - low_freq_factor,
                )
            }
        }
    }
}
