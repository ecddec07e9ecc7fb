#![doc = include_str!("../README.md")]
//!
//! # Features
//!
//! Each but the last is on by default and brings the crates it needs.
//!
//! | feature | re-exports |
//! | --- | --- |
//! | `provision` | [`provision`] |
//! | `dataset` | [`dataset`], [`chat`], [`store`] |
//! | `train` | [`train`], [`model`], [`chat`], [`store`] |
//! | `serve` | [`serve`], [`model`], [`chat`], [`store`] |
//! | `mlflow`, `wandb` | `train`'s metrics at an MLflow tracking server, at Weights & Biases |
//!
//! With `dataset` and `train` together there is [`DatasetSource`], which hands a dataset's examples to
//! the trainer.

#[cfg(feature = "dataset")]
pub use updraft_dataset as dataset;
#[cfg(feature = "provision")]
pub use updraft_provision as provision;
#[cfg(feature = "serve")]
pub use updraft_serve as serve;
#[cfg(feature = "train")]
pub use updraft_train as train;

#[cfg(any(feature = "dataset", feature = "train", feature = "serve"))]
pub use updraft_chat as chat;
#[cfg(any(feature = "train", feature = "serve"))]
pub use updraft_model as model;
#[cfg(any(feature = "dataset", feature = "train", feature = "serve"))]
pub use updraft_store as store;

#[cfg(all(feature = "dataset", feature = "train"))]
mod source;
#[cfg(all(feature = "dataset", feature = "train"))]
pub use source::DatasetSource;
