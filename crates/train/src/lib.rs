//! LoRA fine-tuning with Hugging Face's numbers, packed and resumable to the bit.
//!
//! A [`Trainer`] takes a frozen [`Decoder`](updraft_model::Decoder), an adapter, an
//! [`ExampleSource`] and a [`TrainConfig`] whose names are those of
//! `transformers.TrainingArguments`, and runs from the first optimizer step to the last. A run
//! killed at any point continues from its newest [`Checkpoint`] with the same examples in the
//! same order, bit for bit on the same kind of machine. What is trained is an adapter, with whole
//! modules beside its pairs if asked, or every weight
//! ([`LoraConfig::full_fine_tuning`](updraft_model::LoraConfig::full_fine_tuning)). [`train_stage`] is the same as a stage of
//! a store: base model and data in, PEFT adapter, merged model and loss curve out.
//!
//! What it is not: it neither reads data sets nor tokenizes (that is `updraft-dataset`'s work, behind
//! [`ExampleSource`]) nor holds model code.
//!
//! ```
//! use updraft_train::{MemorySource, RunPlan, TrainConfig};
//! use updraft_chat::Example;
//!
//! let example = |tokens: u32| Example { input_ids: (0..tokens).collect(), loss_spans: vec![1..tokens] };
//! let source = MemorySource::new("doc", [30, 90, 60, 40, 20].map(example).to_vec()).shuffled(7);
//! let config = TrainConfig {
//!     packing: true,
//!     max_seq_len: 128,
//!     per_device_train_batch_size: 1,
//!     num_train_epochs: 2.0,
//!     ..Default::default()
//! };
//! let plan = RunPlan::new(&source, &config)?;
//! assert_eq!(plan.epoch(0).rows, 2); // 240 tokens in two rows of 128
//! assert_eq!(plan.total_steps(), 4);
//! assert_eq!(config.schedule(4).learning_rate(2), config.learning_rate / 2.0);
//! # Ok::<(), updraft_train::Error>(())
//! ```
//!
//! # Seams
//! | trait | promise | implementations |
//! | --- | --- | --- |
//! | [`ExampleSource`] | plan and open a resumable stream of examples | [`MemorySource`], the data set reader |
//! | [`Optimizer`] | apply one step | [`optim::AdamW`], [`optim::Sgd`] |
//! | [`Collective`] | tell and add up among workers, in the order of ranks | [`Alone`], [`LocalCollective`], [`TcpCollective`] |
//! | [`Observer`] | be told of each step | [`ProgressObserver`], [`metrics::JsonLines`], [`metrics::TensorBoard`], MLflow, Weights & Biases |
//!
//! # Features
//! | feature | default | adds |
//! | --- | --- | --- |
//! | `conformance` | no | the suites every [`ExampleSource`] and [`Optimizer`] passes |
//! | `cuda` | no | training on NVIDIA GPUs |
//! | `cuda-emulator` | no | the same on kernels compiled for the CPU, to test it |
//! | `nccl` | no | `NcclCollective`: several GPUs' gradients through NCCL |
//! | `mlflow` | no | [`metrics`] to an MLflow tracking server |
//! | `wandb` | no | [`metrics`] to Weights & Biases |

mod config;
mod error;

mod packing;
mod place;
mod plan;
mod random;
mod source;

mod batch;
mod loader;

pub mod optim;
mod schedule;

mod checkpoint;
mod checkpoints;
mod collective;
mod evaluation;
mod flops;
mod identity;
mod loss_scale;
mod memory;
mod observer;
mod trainer;

mod export;
mod merged;
pub mod metrics;
mod stage;
mod stop;
mod swap;
mod verify;

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
#[cfg(test)]
mod testing;

pub use batch::parts;
pub use checkpoint::{Checkpoint, Machine, RunState};
pub use checkpoints::Checkpoints;
#[cfg(feature = "nccl")]
pub use collective::NcclCollective;
pub use collective::{
    Alone, Collective, Launch, LocalCollective, MAX_MESSAGE, TcpCollective, local_group,
};
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub use collective::{DeviceCollective, DeviceGroup, GpuCollective};
#[cfg(unix)]
pub use collective::{Ended, Processes};
pub use config::{OptimizerKind, TrainConfig};
pub use error::{BoxError, Error, Result};
pub use evaluation::{EvalRecord, best, evaluate};
pub use export::{FUSED, LORA_MODEL, export, model_card};
pub use flops::{Work, gemm_ceiling};
pub use identity::RunIdentity;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub use memory::check_gpu_memory;
pub use memory::{
    LargestMicroBatch, check_memory, estimate_gpu_memory, estimate_memory, free_memory, peak_memory,
};
pub use observer::{Observer, ProgressObserver, StepRecord, StepStats};
pub use optim::Optimizer;
pub use packing::{best_fit_decreasing, fill_rate};
pub use plan::{Batching, Cursor, EpochShape, RunPlan};
pub use schedule::{Schedule, SchedulerType};
pub use source::{ExamplePlan, ExampleSource, ExampleStream, MemorySource};
pub use stage::{Sources, TrainStage, Trained, train_stage};
pub use trainer::{TrainReport, Trainer};
