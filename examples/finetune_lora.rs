//! Fine-tunes a model on conversations with LoRA: the recipe to fork.
//!
//! ```sh
//! cargo run --release --example finetune_lora -- \
//!     --base examples/assets/tiny --data chats.jsonl --out tuned --learning_rate 2e-3 --r 16
//! ```
//!
//! `--base` is a model folder as transformers writes it. `--data` is JSON lines of `messages`, of
//! `question` and `answer`, or of `prompt` and `completion`. `--out` gets the adapter
//! (`lora_model/`, for PEFT), the merged model (`fused/`), `metrics.jsonl`, TensorBoard's files
//! (`runs/`) and checkpoints, from which the same command goes on after an interruption. On SIGTERM
//! and Ctrl-C it writes one more and exits with 143; on a second one it exits at once. Data, base and settings must be the same then, or be given another `--out`.
//!
//! `--workers 8` trains with eight processes on this machine: each takes its share of every step's
//! `--gradient_accumulation_steps` micro-batches, and with `--device cuda` a GPU of its own. When one fails the others are
//! ended. Several machines take part where SkyPilot or Kubernetes starts the same command on each; or torchrun starts all
//! processes (`torchrun --no-python --nproc_per_node 2 -- finetune_lora …`). The first one writes; for the others to go on
//! after an interruption they must see the same `--out`. GPUs add up gradients through NCCL in a build with the feature
//! `nccl`, else over TCP.
//!
//! Any setting of transformers' `TrainingArguments` and PEFT's `LoraConfig` that we know is an
//! option by its own name. Besides:
//!
//! ```text
//! --full true              train every weight instead of an adapter; there is no lora_model/ then
//! --adapter FOLDER         go on from this adapter, with its settings
//! --report_to NAMES        jsonl,tensorboard unless said otherwise; mlflow and wandb with the
//!                          features of their names and the servers that the environment names
//! --device cuda            train on a GPU, the first or that of LOCAL_RANK; on the second with cuda:1; needs the feature `cuda`
//! --workers 2              processes on this machine
//! --push_to_hub OWNER/NAME upload the result as HF_TOKEN; needs the feature `push`
//! --eval_fraction 0.05     held out of training
//! --logging_steps 10       --threads, as many as there are cores for each process
//! ```

#![expect(clippy::print_stdout, reason = "a program talks to a person")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use updraft::chat::{Chat, ChatFiles, Conversation, Example, Message, TemplateFiles};
use updraft::model::memory::MemoryEstimate;
use updraft::model::{Adapter, Compute, Decoder, LoraConfig, ModelFiles, Threads, peft};
use updraft::store::{CancelToken, Store};
use updraft::train::metrics::{RunInfo, Sink, TextLines};
use updraft::train::{
    Checkpoints, Collective, Ended, Error, ExamplePlan, ExampleSource, FUSED, LORA_MODEL, Launch,
    MemorySource, Processes, TcpCollective, TrainConfig, Trainer, check_memory, evaluate, export,
    gemm_ceiling, model_card,
};

/// What a shell says of a program that SIGTERM ended.
const STOPPED: u8 = 128 + 15;
/// How long the processes of a run wait for each other at its beginning.
const MEETING: Duration = Duration::from_secs(600);

fn main() -> Result<ExitCode> {
    // What the libraries warn of.
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .init();

    // Settings: the libraries' defaults, but for these four.
    let mut options = Options::parse(std::env::args().skip(1))?;
    let (base, data) = (options.need("base")?, options.need("data")?);
    let out = options.need("out")?;
    let eval_fraction: f64 = options.take("eval_fraction", "0.05")?;
    let launch = Launch::from_env(|name| std::env::var(name).ok())?;
    let workers: usize = options.take("workers", "1")?;
    if workers > 1 && local("LOCAL_RANK").is_none() {
        return start(launch.as_ref(), workers);
    }
    let leads = launch.as_ref().is_none_or(|launch| launch.rank == 0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (threads / local("LOCAL_WORLD_SIZE").unwrap_or(1).max(1)).max(1);
    let threads = Threads::new(options.take("threads", &threads.to_string())?)?;
    let logging_steps = options.take("logging_steps", "10")?;
    let report_to: String = options.take("report_to", "jsonl,tensorboard")?;
    let continued: String = options.take("adapter", "")?;
    let push_to_hub: String = options.take("push_to_hub", "")?;
    ensure!(
        push_to_hub.is_empty() || cfg!(feature = "push"),
        "--push_to_hub needs a build with --features push"
    );
    let device = device(options.take("device", "cpu")?)?;
    let usual = match options.take("full", "false")? {
        true => LoraConfig::full_fine_tuning(),
        false => LoraConfig::default(),
    };
    let config: TrainConfig = options.fields(TrainConfig {
        learning_rate: 2e-4,
        num_train_epochs: 1.0,
        warmup_ratio: 0.03,
        ..TrainConfig::default()
    })?;
    let lora: LoraConfig = options.fields(LoraConfig {
        base_model_name_or_path: Some(base.clone()),
        ..usual
    })?;
    options.nothing_left()?;
    ensure!(
        !out.contains("://"),
        "--out {out} is not a folder: `pipeline` and `train::train_stage` write to stores"
    );

    // The model's files, and how it chats.
    let files = ModelFiles::from_dir(Path::new(&base))?;
    let file = |name: &str| files.files.get(name).map(|bytes| &bytes[..]);
    let chat = Chat::from_files(&ChatFiles {
        tokenizer_json: file("tokenizer.json").context("the base has no tokenizer.json")?,
        template: TemplateFiles {
            tokenizer_config: file("tokenizer_config.json"),
            chat_template_jinja: file("chat_template.jinja"),
            ..TemplateFiles::default()
        },
        generation_config: file("generation_config.json"),
    })?;

    // Conversations become token ids with the assistant's part marked; every so many-th is held out.
    let longest = files.config.max_len().min(config.max_seq_len as usize);
    let hold_every = (1.0 / eval_fraction).round().max(2.0) as u64; // 0 holds out none
    let (mut train, mut held_out, mut too_long) = (Vec::new(), Vec::new(), 0);
    let text = std::fs::read_to_string(&data).with_context(|| data.clone())?;
    for (line, number) in text.lines().zip(1u64..) {
        let example = example(&chat, line).with_context(|| format!("{data}, line {number}"))?;
        if example.len() > longest {
            too_long += 1;
        } else if number.is_multiple_of(hold_every) {
            held_out.push(example);
        } else {
            train.push(example);
        }
    }
    let (num_train, num_held_out) = (train.len(), held_out.len());
    println!("{num_train} examples to train on, {num_held_out} held out, {too_long} too long");
    ensure!(num_train > 0, "no line of {data} fits in {longest} tokens");
    let probe = train[0].clone();
    let source = MemorySource::new(&data, train).shuffled(config.seed);
    let held_out = (num_held_out > 0).then(|| MemorySource::new("held out", held_out));

    // What is trained: a fresh adapter, or one that goes on with the settings it has.
    let adapter = if continued.is_empty() {
        Adapter::init_over(
            &lora,
            &files.config,
            &files.weights,
            config.seed,
            &Device::Cpu,
        )?
    } else {
        let read =
            |name: &str| std::fs::read(Path::new(&continued).join(name)).context(name.to_owned());
        let (settings, weights) = (read(peft::CONFIG_FILE)?, read(peft::WEIGHTS_FILE)?);
        let adapter = peft::read_adapter(&settings, &weights, &files.config)?;
        let over = adapter.config().base_model_name_or_path.clone();
        ensure!(
            !adapter.config().is_for_another_base(&base),
            "--adapter {continued} was trained over {}, not {base}: give that base, or correct its {}",
            over.unwrap_or_default(),
            peft::CONFIG_FILE
        );
        adapter
    };
    let lora = adapter.config().clone();

    // Will it fit? Then load it.
    let dtype = config.dtype();
    let load = |dtype| {
        let (config, weights) = (&files.config, &files.weights);
        Decoder::load(config, weights, dtype, &Device::Cpu, &threads)
    };
    let is_on_cpu = device == Compute::Cpu;
    let (estimate, decoder) = match is_on_cpu {
        true => {
            let fits = check_memory(&files.config, &lora, source.plan(), &config, &threads)?;
            (fits, load(dtype)?)
        }
        false => load_on_gpu(device, &files, &lora, source.plan(), &config, &threads)?,
    };
    let (trained, all) = (adapter.num_parameters(), files.config.num_parameters());
    println!("{trained} parameters are trained over a model of {all}");
    println!("training takes about {} MiB", estimate.total() >> 20);

    // Where several processes train together, this one meets the others.
    let meet = |launch: &Launch| {
        let (rank, count) = (launch.rank, launch.num_workers);
        println!(
            "worker {rank} of {count} meets the others at {}",
            launch.master
        );
        connect(TcpCollective::join(launch, MEETING)?, &decoder)
    };
    let workers = launch.as_ref().map(meet).transpose()?;

    // A spot notice, or Ctrl-C: the trainer writes a checkpoint.
    let runtime = Runtime::new()?;
    let cancel = CancelToken::new();
    let is_worker = Processes::is_one(); // whose parent says what a second one means
    watch_signals(&runtime, cancel.clone(), move || {
        if !is_worker {
            std::process::exit(STOPPED.into());
        }
    })?;

    // Train, from the newest checkpoint if there is one.
    let store = Store::open(&out)?;
    let checkpoints = Checkpoints::new(&store, "checkpoints", config.save_total_limit as usize);
    let path = Path::new(&out);
    let mut trainer = Trainer::new(&decoder, adapter, &source, config.clone())?
        .with_base(files.fingerprint())
        .with_cancel(cancel.clone())
        .with_checkpoints(checkpoints.clone(), runtime.handle().clone());
    if is_on_cpu {
        trainer = trainer.with_gemm_ceiling(gemm_ceiling(&threads, dtype));
    }
    if let Some(held_out) = &held_out {
        trainer = trainer.with_evaluation(held_out);
    }
    if let Some(workers) = workers {
        trainer = trainer.with_workers(workers);
    }
    if let Some(checkpoint) = runtime.block_on(checkpoints.latest(decoder.config()))? {
        println!("continuing after step {}", checkpoint.state.cursor.step);
        trainer = trainer.resume(checkpoint)?;
    }
    let run = RunInfo::new(&out)
        .with_identity(trainer.identity().key())
        .with_params(&lora)?
        .with_params(&config)?;
    if leads {
        trainer = trainer.with_observer(TextLines::new(std::io::stdout(), logging_steps));
        for name in report_to.split(',').filter(|name| !name.is_empty()) {
            trainer = trainer.with_observer(Sink::named(name, path)?.open(&run)?);
        }
    }
    let tokens = std::slice::from_ref(&cancel);
    if let Some(held_out) = held_out.as_ref().filter(|_| leads) {
        let batch_size = config.per_device_eval_batch_size as usize;
        match evaluate(&decoder, None, held_out, batch_size, tokens) {
            Ok((eval_loss, _)) => println!("{{'eval_loss': {eval_loss:.4}, 'epoch': 0}}"),
            Err(Error::Cancelled { .. }) => {} // which the run tells the other workers
            Err(error) => return Err(error.into()),
        }
    }
    match trainer.run() {
        Err(Error::Cancelled { step }) => {
            println!("stopped after step {step}; the same command goes on from there");
            return Ok(ExitCode::from(STOPPED));
        }
        Err(error) => return Err(error.into()),
        Ok(_) => {} // Its last line is the report.
    }
    let (adapter, log) = trainer.into_parts();
    if !leads {
        println!("the first worker writes the result");
        return Ok(ExitCode::SUCCESS);
    }

    // Export the adapter and the merged model; both are read back and compared before they count.
    let decoder = match (dtype, is_on_cpu) {
        (DType::F32, true) => decoder,
        _ => {
            drop(decoder);
            load(DType::F32)?
        }
    };
    let card = model_card(&data, &lora, &config, &log);
    match export(path, &files, decoder, &adapter, &card, &probe, tokens) {
        Err(Error::Cancelled { .. }) => {
            println!("stopped after the last step; the same command writes the result");
            return Ok(ExitCode::from(STOPPED));
        }
        exported => exported?,
    }
    let result = if adapter.is_whole() {
        FUSED
    } else {
        LORA_MODEL
    };
    println!("{result} is in {out}; what other programs load is {out}/{FUSED}");
    if !push_to_hub.is_empty() {
        runtime.block_on(push(&push_to_hub, &path.join(result), &cancel))?;
        println!("{result} is at https://huggingface.co/{push_to_hub}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts this command once for each worker on this machine, and waits for them. SIGTERM and Ctrl-C go on to them.
fn start(launch: Option<&Launch>, workers: usize) -> Result<ExitCode> {
    let (runtime, cancel, at_once) = (Runtime::new()?, CancelToken::new(), CancelToken::new());
    let second = at_once.clone();
    watch_signals(&runtime, cancel.clone(), move || second.cancel())?;
    let program = std::env::current_exe()?;
    let worker = || {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1));
        command
    };
    match Processes::start(launch, workers, worker)?.wait(&cancel, &at_once)? {
        Ended::Done => Ok(ExitCode::SUCCESS),
        Ended::Stopped => Ok(ExitCode::from(STOPPED)),
    }
}

/// With NCCL, GPUs add up gradients themselves.
#[cfg(feature = "nccl")]
fn connect(workers: TcpCollective, decoder: &Decoder) -> Result<Box<dyn Collective>> {
    Ok(match decoder.gpu() {
        Some(gpu) => Box::new(updraft::train::NcclCollective::join(workers, gpu)?),
        None => Box::new(workers),
    })
}

#[cfg(not(feature = "nccl"))]
fn connect(workers: TcpCollective, _: &Decoder) -> Result<Box<dyn Collective>> {
    Ok(Box::new(workers))
}

/// A number that torchrun tells the processes of one machine.
fn local(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.parse().ok()
}

/// With several workers on this machine each takes a GPU of its own.
fn device(asked: Compute) -> Result<Compute> {
    asked.check()?;
    let several = local("LOCAL_WORLD_SIZE").filter(|&count| count > 1);
    match (asked, several.and_then(|_| local("LOCAL_RANK"))) {
        (Compute::Cuda(0), Some(rank)) => Ok(Compute::Cuda(rank)),
        (Compute::Cuda(_), Some(_)) => {
            anyhow::bail!(
                "--device {asked} with several workers: say cuda, and each takes a GPU of its own"
            )
        }
        _ => Ok(asked),
    }
}

/// The base on a GPU, if the run fits there.
#[cfg(feature = "cuda")]
fn load_on_gpu(
    device: Compute,
    files: &ModelFiles,
    lora: &LoraConfig,
    data: &ExamplePlan,
    config: &TrainConfig,
    threads: &Threads,
) -> Result<(MemoryEstimate, Decoder)> {
    let gpu = device.gpu()?.context("the CPU is no GPU")?;
    let visible = updraft::model::Gpu::count()?;
    let used = local("LOCAL_WORLD_SIZE").unwrap_or(1);
    if visible > used {
        tracing::warn!(
            "{visible} GPUs are visible and this run uses {used}: start a process for each (--workers {visible}), \
             or hide the others with CUDA_VISIBLE_DEVICES"
        );
    }
    println!("training on {}", gpu.name()?);
    let estimate = updraft::train::check_gpu_memory(&files.config, lora, data, config, &gpu)?;
    let (model, weights) = (&files.config, &files.weights);
    let decoder = Decoder::load_on_gpu(model, weights, config.dtype(), &gpu, threads)?;
    Ok((estimate, decoder))
}

#[cfg(not(feature = "cuda"))]
fn load_on_gpu(
    device: Compute,
    _: &ModelFiles,
    _: &LoraConfig,
    _: &ExamplePlan,
    _: &TrainConfig,
    _: &Threads,
) -> Result<(MemoryEstimate, Decoder)> {
    anyhow::bail!("--device {device} needs a build with --features cuda")
}

/// SIGTERM and Ctrl-C end the training with a checkpoint, and an export, which begins anew the next time. The second time
/// they end the program, or its workers.
fn watch_signals(
    runtime: &Runtime,
    cancel: CancelToken,
    second: impl Fn() + Send + 'static,
) -> Result<()> {
    let _inside = runtime.enter();
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    runtime.spawn(async move {
        loop {
            tokio::select! {
                _ = terminated.recv() => {}
                _ = interrupted.recv() => {}
            }
            match cancel.is_cancelled() {
                true => second(),
                false => cancel.cancel(),
            }
        }
    });
    Ok(())
}

/// Uploads a folder to a repository of the Hub, which is made, private, if it is not there.
#[cfg(feature = "push")]
async fn push(repo: &str, folder: &Path, cancel: &CancelToken) -> Result<()> {
    use updraft::store::NoProgress;
    use updraft::store::hub::{HubClient, PushOptions, RepoRef};
    let (client, repo) = (HubClient::from_env()?, RepoRef::model(repo)?);
    let options = PushOptions::default();
    client
        .push_folder(&repo, folder, &options, &NoProgress, cancel)
        .await?;
    Ok(())
}

#[cfg(not(feature = "push"))]
async fn push(_: &str, _: &Path, _: &CancelToken) -> Result<()> {
    anyhow::bail!("this build is without the feature push")
}

/// One line of the data.
fn example(chat: &Chat, line: &str) -> Result<Example> {
    let row: Map<String, Value> = serde_json::from_str(line)?;
    let text = |name: &str| row.get(name).and_then(Value::as_str);
    let question = text("question").or(text("prompt"));
    let answer = text("answer").or(text("completion"));
    let conversation = match (question, answer) {
        (Some(q), Some(a)) => Conversation::new([Message::user(q), Message::assistant(a)]),
        _ => serde_json::from_str(line).context("neither messages nor question and answer")?,
    };
    Ok(chat.example(&conversation)?)
}

/// `--name value`, dashes as good as underscores.
struct Options(BTreeMap<String, String>);

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = BTreeMap::new();
        while let Some(argument) = arguments.next() {
            let name = argument
                .strip_prefix("--")
                .context("options begin with --")?;
            let value = arguments.next();
            let value = value.with_context(|| format!("--{name} has no value"))?;
            options.insert(name.replace('-', "_"), value);
        }
        Ok(Self(options))
    }

    fn need(&mut self, name: &str) -> Result<String> {
        let value = self.0.remove(name);
        value.with_context(|| format!("--{name} is missing"))
    }

    fn take<T>(&mut self, name: &str, default: &str) -> Result<T>
    where
        T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
    {
        let value = self.0.remove(name);
        let value = value.as_deref().unwrap_or(default);
        value.parse().with_context(|| format!("--{name} {value}"))
    }

    /// A configuration with those of its fields that are options.
    fn fields<T: Serialize + DeserializeOwned>(&mut self, ours: T) -> Result<T> {
        let mut fields: Map<String, Value> = serde_json::from_value(serde_json::to_value(ours)?)?;
        let rest = std::mem::take(&mut self.0);
        for (name, value) in rest {
            let parsed = match serde_json::from_str(&value) {
                Ok(parsed) => parsed,
                Err(_) if name == "modules_to_save" => value.split(',').collect(),
                Err(_) if name == "target_modules" && value != "all-linear" => {
                    value.split(',').collect()
                }
                Err(_) => Value::from(value.as_str()),
            };
            // A field is what the configuration takes under this name.
            let one = Value::Object([(name.clone(), parsed.clone())].into_iter().collect());
            match serde_json::from_value::<T>(one) {
                Err(error) if error.to_string().starts_with("unknown field") => {
                    self.0.insert(name, value);
                }
                Err(error) => return Err(error).with_context(|| format!("--{name} {value}")),
                Ok(_) => {
                    fields.insert(name, parsed);
                }
            }
        }
        Ok(serde_json::from_value(Value::Object(fields))?)
    }

    fn nothing_left(&self) -> Result<()> {
        let unknown: Vec<&String> = self.0.keys().collect();
        ensure!(unknown.is_empty(), "no setting is called {unknown:?}");
        Ok(())
    }
}
