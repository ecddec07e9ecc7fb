//! What the pipeline is asked to do: flags, defaults, and the training recipe.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use candle_core::DType;
use lexopt::{Arg, Parser, ValueExt};
use updraft::dataset::SourceOptions;
use updraft::dataset::source::default_name;
use updraft::model::{Compute, LoraConfig};
use updraft::train::TrainConfig;
use updraft::train::metrics::Sink;

pub const HELP: &str = "\
Fine-tunes a model on conversations and serves it behind an OpenAI-compatible URL.

usage: pipeline [train | serve] [flags]

  without a command: launch examples/assets/train.yaml on this machine, then
  examples/assets/serve.yaml, ask base and tuned model, and print the accuracy

flags:
  --store URL       where everything goes: a folder, file://, s3://bucket/prefix  [updraft-store]
  --model MODEL     a folder, a Hub id, or `tiny`, which ships with the example   [tiny]
  --dataset DATA    a file, a folder, a Hub id, or `letters`, which is generated  [letters]
  --epochs N        passes over the data                                         [1]
  --max-steps N     stop after N optimizer steps, whatever the epochs
  --device DEVICE   cpu, cuda or cuda:1, to train and serve on; a GPU needs a build
                    with --features cuda                                       [cpu]
  --workers N       processes that train together   [one for each GPU, up to 8, or one]
  --save-steps N    optimizer steps between checkpoints                           [50]
  --report-to NAMES where training's figures go, of jsonl, tensorboard, mlflow, wandb;
                    the last two with the features of their names, and the servers that
                    the environment names
  --logging-dir DIR the folder of their files                                [updraft-logs]
  --date DATE       today, for templates that write it into every conversation, such as
                    Llama 3's; fixed, so that tomorrow's run finds today's work    [2026-01-01]
  --port PORT       where to serve                              [the first free from 30001]
  --host HOST       the address to listen on                                     [127.0.0.1]
  --keep-serving    go on serving until Ctrl-C
  --help

examples:
  cargo run --release --example pipeline
  cargo run --release --example pipeline -- --keep-serving --port 8000
  cargo run --release --example pipeline -- --dataset my-chats.jsonl --epochs 3
  cargo run --release --example pipeline -- --model Qwen/Qwen2.5-0.5B \\
      --dataset mlabonne/FineTome-100k --store s3://bucket/updraft
";

/// Of the adapter, of the order of the data, and of the questions.
pub const SEED: u64 = 3407;

/// Conversations of a step, each of which one worker takes.
const MAX_WORKERS: usize = 8;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Launch both tasks and judge the result.
    Pipeline,
    /// Inside the first task: import, pretokenize, train, merge.
    Train,
    /// Inside the second task: serve.
    Serve,
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub command: Command,
    pub store: String,
    pub model: String,
    pub dataset: String,
    pub epochs: f64,
    pub max_steps: Option<u64>,
    pub device: Compute,
    pub workers: usize,
    pub save_steps: u64,
    pub report_to: String,
    pub logging_dir: String,
    pub date: String,
    pub host: String,
    pub port: Option<u16>,
    pub keep_serving: bool,
}

impl Settings {
    /// Reads the command line; `None` if it asked for help.
    pub fn from_args() -> Result<Option<Settings>> {
        let mut settings = Settings {
            command: Command::Pipeline,
            store: "updraft-store".to_owned(),
            model: "tiny".to_owned(),
            dataset: "letters".to_owned(),
            epochs: 1.0,
            max_steps: None,
            device: Compute::Cpu,
            workers: 0,
            save_steps: 50,
            report_to: String::new(),
            logging_dir: "updraft-logs".to_owned(),
            date: "2026-01-01".to_owned(),
            host: "127.0.0.1".to_owned(),
            port: None,
            keep_serving: false,
        };
        let mut parser = Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                Arg::Value(command) => settings.command = parse_command(&command.string()?)?,
                Arg::Long("store") => settings.store = parser.value()?.string()?,
                Arg::Long("model") => settings.model = parser.value()?.string()?,
                Arg::Long("dataset") => settings.dataset = parser.value()?.string()?,
                Arg::Long("epochs") => settings.epochs = parser.value()?.parse()?,
                Arg::Long("max-steps") => settings.max_steps = Some(parser.value()?.parse()?),
                Arg::Long("device") => settings.device = parser.value()?.parse()?,
                Arg::Long("workers") => settings.workers = parser.value()?.parse()?,
                Arg::Long("save-steps") => settings.save_steps = parser.value()?.parse()?,
                Arg::Long("report-to") => settings.report_to = parser.value()?.string()?,
                Arg::Long("logging-dir") => settings.logging_dir = parser.value()?.string()?,
                Arg::Long("date") => settings.date = parser.value()?.string()?,
                Arg::Long("host") => settings.host = parser.value()?.string()?,
                Arg::Long("port") => settings.port = Some(parser.value()?.parse()?),
                Arg::Long("keep-serving") => settings.keep_serving = true,
                Arg::Long("help") | Arg::Short('h') => return Ok(None),
                other => bail!("{}; see --help", other.unexpected()),
            }
        }
        // A task runs in a folder of its own.
        let logging_dir = std::path::absolute(&settings.logging_dir)?;
        settings.logging_dir = logging_dir.display().to_string();
        if settings.logging_dir.contains(char::is_whitespace) {
            bail!("--logging-dir with a space in it; the task file cannot carry it");
        }
        if settings.workers > 1 && matches!(settings.device, Compute::Cuda(1..)) {
            bail!(
                "--device {} with --workers: say cuda, and each takes a GPU of its own",
                settings.device
            );
        }
        if settings.workers == 0 {
            settings.workers = settings.num_gpus()?.clamp(1, MAX_WORKERS);
        }
        settings.sinks()?; // A wrong name is better known now than in the task.
        Ok(Some(settings))
    }

    /// The model's name in the store: its Hub id, or the name of its folder.
    pub fn model_name(&self) -> String {
        let path = Path::new(&self.model);
        let name = path.file_name().filter(|_| path.exists());
        name.map_or_else(
            || self.model.clone(),
            |name| name.to_string_lossy().into_owned(),
        )
    }

    /// The dataset's name in the store: its Hub id, or the name of its file without extensions.
    pub fn dataset_name(&self) -> String {
        default_name(&self.dataset, &SourceOptions::default())
    }

    /// Where the model comes from: the shipped folder for `tiny`, else as given.
    pub fn model_source(&self) -> String {
        match self.model.as_str() {
            "tiny" if !Path::new("tiny").exists() => assets().join("tiny").display().to_string(),
            model => model.to_owned(),
        }
    }

    /// How many unseen words both models are asked about; a larger model takes a while for each.
    pub fn num_questions(&self) -> usize {
        if self.model == "tiny" { 320 } else { 32 }
    }

    /// The flags that the train task passes on to its worker.
    pub fn train_flags(&self) -> String {
        let max_steps = self.max_steps.map(|steps| format!(" --max-steps {steps}"));
        let (epochs, save_steps, date) = (self.epochs, self.save_steps, &self.date);
        let (device, workers) = (self.device, self.workers);
        let report_to = match self.report_to.as_str() {
            "" => String::new(),
            names => format!(" --report-to {names} --logging-dir {}", self.logging_dir),
        };
        format!(
            "--epochs {epochs} --device {device} --workers {workers} --save-steps {save_steps} --date {date}{}{report_to}",
            max_steps.unwrap_or_default()
        )
    }

    /// Where training's figures go: a folder for each model and data set.
    pub fn sinks(&self) -> Result<Vec<Sink>> {
        let folder = Path::new(&self.logging_dir)
            .join(self.model_name())
            .join(self.dataset_name());
        let names = self.report_to.split(',').filter(|name| !name.is_empty());
        Ok(names
            .map(|name| Sink::named(name, &folder))
            .collect::<Result<_, _>>()?)
    }

    /// The adapter: rank 16, alpha 16, all seven projections, as in the articles.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            base_model_name_or_path: Some(self.model_name()),
            ..LoraConfig::default()
        }
    }

    /// The GPUs that a run on one may have besides; a number such as in `cuda:1` asks for that one alone.
    fn num_gpus(&self) -> Result<usize> {
        #[cfg(feature = "cuda")]
        if self.device == Compute::Cuda(0) {
            return Ok(updraft::model::Gpu::count()?);
        }
        self.device.check()?;
        Ok(1)
    }

    /// The training run: the articles' settings, in the number type that suits the device. A tiny model wants larger steps.
    /// On a GPU every conversation of a step is a micro-batch of its own, which any number of GPUs can share: how many
    /// there are decides nothing that is written.
    pub fn training(&self, device: Compute) -> Result<TrainConfig> {
        let dtype = device.training_dtype()?;
        let articles = TrainConfig {
            bf16: dtype == DType::BF16,
            fp16: dtype == DType::F16,
            learning_rate: 2e-4,
            num_train_epochs: self.epochs,
            max_steps: self.max_steps,
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 4,
            warmup_steps: 5,
            weight_decay: 0.01,
            seed: SEED,
            save_steps: self.save_steps,
            ..TrainConfig::default()
        };
        let mut config = match self.model.as_str() {
            "tiny" => TrainConfig {
                learning_rate: 8e-3,
                per_device_train_batch_size: 4,
                gradient_accumulation_steps: 2,
                warmup_steps: 20,
                ..articles
            },
            _ => articles,
        };
        if device != Compute::Cpu {
            config.gradient_accumulation_steps *= config.per_device_train_batch_size;
            config.per_device_train_batch_size = 1;
        }
        Ok(config)
    }
}

/// The folder of the example's assets: beside the program where it was carried to another machine, else in the sources.
pub fn assets() -> PathBuf {
    let program = std::env::current_exe().ok();
    let beside = program.and_then(|program| Some(program.parent()?.join("assets")));
    beside
        .filter(|folder| folder.is_dir())
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets"))
}

fn parse_command(word: &str) -> Result<Command> {
    match word {
        "train" => Ok(Command::Train),
        "serve" => Ok(Command::Serve),
        _ => bail!("unknown command `{word}`; it is `train`, `serve` or nothing, see --help"),
    }
}
