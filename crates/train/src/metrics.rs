//! What a run tells: sinks that record its figures while it runs, and pure functions that make its
//! log and its curve of what remains.
//!
//! | sink | writes | feature |
//! | --- | --- | --- |
//! | [`JsonLines`] | one line of JSON for each step to a file | |
//! | [`TensorBoard`] | TensorBoard's event files | |
//! | [`TextLines`] | a line for every so many-th step to a terminal | |
//! | `RemoteLog::mlflow` | to an MLflow tracking server | `mlflow` |
//! | `RemoteLog::wandb` | to Weights & Biases | `wandb` |
//!
//! [`Sink`] names one of them, for settings.
//!
//! A sink never stops or slows a run, whatever happens to its disk or server.

mod jsonl;
mod run_info;
mod sink;
mod sparkline;
mod svg;

mod append;
mod entry;
mod json_lines;
mod tensorboard;
mod text;

#[cfg(any(feature = "mlflow", feature = "wandb"))]
mod remote;

pub use json_lines::JsonLines;
pub use jsonl::{parse_log, write_log};
#[cfg(feature = "mlflow")]
pub use remote::MlflowConfig;
#[cfg(feature = "wandb")]
pub use remote::WandbConfig;
#[cfg(any(feature = "mlflow", feature = "wandb"))]
pub use remote::{RemoteLog, Secret};
pub use run_info::RunInfo;
pub use sink::Sink;
pub use sparkline::sparkline;
pub use svg::loss_curve_svg;
pub use tensorboard::TensorBoard;
pub use text::TextLines;
