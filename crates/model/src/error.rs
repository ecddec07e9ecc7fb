//! Why something about a model failed, by what the caller can do next.

use std::path::PathBuf;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something about a model failed, by what the caller can do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A `config.json` or `adapter_config.json` does not say what it must.
    #[error("{file}: {field}: {reason}; fix the file or fetch it again")]
    Config {
        /// The file's name.
        file: &'static str,
        /// The field at fault, or where in the file.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model or adapter asks for something this crate does not do.
    #[error("{what} is not supported; {instead}")]
    Unsupported {
        /// The feature, with the value that asked for it.
        what: String,
        /// What to do instead.
        instead: &'static str,
    },
    /// A tensor the model needs is in none of the weight files.
    #[error(
        "tensor {name} is in none of the {files} weight file(s); check that the folder is complete"
    )]
    MissingTensor {
        /// The tensor's name.
        name: String,
        /// How many weight files were searched.
        files: usize,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "tensor {name} has shape {actual:?} where the model needs {expected:?}; check that weights and config.json belong together"
    )]
    Shape {
        /// The tensor's name.
        name: String,
        /// What the configuration asks for.
        expected: Vec<usize>,
        /// What the file holds.
        actual: Vec<usize>,
    },
    /// A tensor has a number type that cannot be read as a weight.
    #[error("tensor {name} is stored as {dtype}; convert the model to f32, f16 or bf16")]
    DType {
        /// The tensor's name.
        name: String,
        /// The stored type.
        dtype: String,
    },
    /// A weight file is truncated, hostile or not safetensors at all.
    #[error("{file} is not a sound safetensors file: {reason}; fetch it again")]
    Corrupt {
        /// The file's name.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file the model needs is not there.
    #[error("{folder} has no {file}; {next}")]
    MissingFile {
        /// The folder, store stage or repository that was searched.
        folder: String,
        /// The file that is missing.
        file: &'static str,
        /// What to do next.
        next: &'static str,
    },
    /// What was given as a model's source is none.
    #[error(
        "{model} is neither a folder nor a Hub id; give a path that exists, or an id such as Qwen/Qwen2.5-0.5B"
    )]
    NoModel {
        /// What was given.
        model: String,
    },
    /// A file could not be read or written.
    #[error("cannot read or write {}; check that it exists and that you may", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// An adapter does not fit the model it is used with.
    #[error("the adapter does not fit: {reason}; use it with the base model it was trained on")]
    Adapter {
        /// What does not fit.
        reason: String,
    },
    /// A batch contradicts itself or the model.
    #[error("batch: {reason}")]
    Batch {
        /// What is wrong, and with which value.
        reason: String,
    },
    /// No kernels for the device the tensors lie on.
    #[error("no kernels for device {device} in this build; load the model on the CPU")]
    Device {
        /// The device asked for.
        device: String,
    },
    /// A GPU, its driver or its memory failed.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    #[error(transparent)]
    Gpu(#[from] updraft_kernels::cuda::Error),
    /// The caller asked to stop.
    #[error("cancelled; run again to continue")]
    Cancelled,
    /// A tensor operation failed.
    #[error("tensor operation failed")]
    Candle(#[from] candle_core::Error),
    /// The store failed.
    #[error(transparent)]
    Store(updraft_store::Error),
}

impl From<updraft_store::Error> for Error {
    fn from(error: updraft_store::Error) -> Self {
        match error {
            updraft_store::Error::Cancelled => Self::Cancelled,
            error => Self::Store(error),
        }
    }
}

impl Error {
    /// Whether the same call may succeed later: what the store calls so.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Store(source) => source.is_retryable(),
            _ => false,
        }
    }

    /// The bytes that were asked for when a GPU's memory was out, if that is what this is.
    pub fn out_of_gpu_memory(&self) -> Option<usize> {
        match self {
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(updraft_kernels::cuda::Error::OutOfMemory { bytes }) => Some(*bytes),
            _ => None,
        }
    }

    pub(crate) fn batch(reason: impl Into<String>) -> Self {
        Self::Batch {
            reason: reason.into(),
        }
    }

    pub(crate) fn adapter(reason: impl Into<String>) -> Self {
        Self::Adapter {
            reason: reason.into(),
        }
    }
}
