//! Which sinks a run reports to, as plain settings.

use std::path::{Path, PathBuf};

#[cfg(feature = "mlflow")]
use super::MlflowConfig;
#[cfg(any(feature = "mlflow", feature = "wandb"))]
use super::RemoteLog;
#[cfg(feature = "wandb")]
use super::WandbConfig;
use super::{JsonLines, RunInfo, TensorBoard};
use crate::observer::Observer;
use crate::{Error, Result};

/// Where the figures of a run go while it runs: nothing but a setting until it is
/// [opened](Self::open).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Sink {
    /// JSON lines in this file.
    JsonLines(PathBuf),
    /// TensorBoard's event files in this folder.
    TensorBoard(PathBuf),
    /// An MLflow server, and the file in which figures wait for it.
    #[cfg(feature = "mlflow")]
    Mlflow(MlflowConfig, PathBuf),
    /// Weights & Biases, and the file in which figures wait for it.
    #[cfg(feature = "wandb")]
    Wandb(WandbConfig, PathBuf),
}

impl Sink {
    /// A sink by its name in `TrainingArguments.report_to`, its files below a folder:
    /// `tensorboard`, `mlflow`, `wandb`; and `jsonl`. Servers are those that the environment names
    /// (`MLFLOW_TRACKING_URI`, `WANDB_API_KEY` and their kind).
    ///
    /// # Errors
    /// [`Error::Config`] for another name, a server that the environment does not name, and what
    /// this build leaves out.
    pub fn named(name: &str, folder: &Path) -> Result<Self> {
        let refused = |expected| {
            Err(Error::Config {
                field: "report_to",
                value: name.to_owned(),
                expected,
            })
        };
        match name {
            "jsonl" => Ok(Self::JsonLines(folder.join("metrics.jsonl"))),
            "tensorboard" => Ok(Self::TensorBoard(folder.join("runs"))),
            #[cfg(feature = "mlflow")]
            "mlflow" => match MlflowConfig::from_env() {
                Some(config) => Ok(Self::Mlflow(config, folder.join("mlflow.jsonl"))),
                None => refused("MLFLOW_TRACKING_URI must say where"),
            },
            #[cfg(feature = "wandb")]
            "wandb" => match WandbConfig::from_env() {
                Some(config) => Ok(Self::Wandb(config, folder.join("wandb.jsonl"))),
                None => refused("WANDB_API_KEY must say who asks"),
            },
            #[cfg(not(feature = "mlflow"))]
            "mlflow" => refused("this build leaves it out: build with the feature of its name"),
            #[cfg(not(feature = "wandb"))]
            "wandb" => refused("this build leaves it out: build with the feature of its name"),
            _ => refused("sinks are jsonl, tensorboard, mlflow and wandb"),
        }
    }

    /// Opens it for a run, which goes on where an earlier process of the same run stopped.
    ///
    /// # Errors
    /// [`Error::MetricsFile`] if its files cannot be used, and those of the servers' settings.
    #[cfg_attr(
        not(any(feature = "mlflow", feature = "wandb")),
        expect(unused_variables, reason = "only a server is told of the run")
    )]
    pub fn open(&self, run: &RunInfo) -> Result<Box<dyn Observer>> {
        Ok(match self {
            Self::JsonLines(path) => {
                make_parent(path)?;
                Box::new(JsonLines::open(path)?)
            }
            Self::TensorBoard(folder) => Box::new(TensorBoard::open(folder)?),
            #[cfg(feature = "mlflow")]
            Self::Mlflow(config, path) => {
                make_parent(path)?;
                Box::new(RemoteLog::mlflow(config, run.clone(), path)?)
            }
            #[cfg(feature = "wandb")]
            Self::Wandb(config, path) => {
                make_parent(path)?;
                Box::new(RemoteLog::wandb(config, run.clone(), path)?)
            }
        })
    }
}

fn make_parent(path: &Path) -> Result<()> {
    let Some(folder) = path.parent() else {
        return Ok(());
    };
    std::fs::create_dir_all(folder).map_err(|source| Error::MetricsFile {
        path: folder.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::StepStats;
    use crate::testing::records;

    #[test]
    fn sinks_are_found_by_name_and_write_where_they_are_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let below = folder.path().join("not there yet");
        let run = RunInfo::new("run");
        for (name, written) in [("jsonl", "metrics.jsonl"), ("tensorboard", "runs")] {
            let sink = Sink::named(name, &below).expect(name);
            let mut observer = sink.open(&run).expect(name);
            observer.on_step(&StepStats {
                record: &records(1)[0],
                total_steps: 1,
                tokens_per_second: 1.0,
            });
            drop(observer);
            assert!(below.join(written).exists(), "{name}");
        }
        let error = Sink::named("comet", &below).expect_err("not one of ours");
        assert!(
            error
                .to_string()
                .contains("jsonl, tensorboard, mlflow and wandb"),
            "{error}"
        );
    }
}
