//! The train task's work: import dataset and model, pretokenize, train, merge.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use updraft::DatasetSource;
use updraft::chat::{Chat, ChatFiles, TemplateFiles};
use updraft::dataset::{
    ImportOptions, MemorySource, PretokenizeOptions, Reader, ReaderOptions, Source, SourceOptions,
    import, pretokenize, resolve_source_with,
};
use updraft::model::{Compute, Threads, import_model};
use updraft::store::{CancelToken, FinishedStage, Store};
use updraft::train::{Ended, ExampleSource, Launch, Processes, Sources, TrainStage, train_stage};

use crate::events::{Events, StageSummary};
use crate::letters;
use crate::settings::Settings;

/// How many letter conversations are generated, and their seed.
const LETTERS: (u64, usize) = (3407, 4000);

pub async fn run(settings: &Settings) -> Result<()> {
    let store = Store::open(&settings.store)?;
    let worker = Worker::from_env()?;
    let events = worker.events(false);
    let (cancel, second) = (CancelToken::new(), Arc::new(AtomicU8::new(EXIT)));
    if Processes::is_one() {
        second.store(NOTHING, Ordering::Relaxed);
    }
    let at_once = CancelToken::new();
    cancel_on_signal(cancel.clone(), second.clone(), at_once.clone())?;
    let (model, dataset) = (settings.model_name(), settings.dataset_name());

    // Neither import needs the other.
    let (standardized, base) = tokio::try_join!(
        stage("import", &events, async {
            let source = dataset_source(settings, &events, &cancel).await?;
            Ok(import(
                &store,
                &dataset,
                &*source,
                &ImportOptions::default(),
                &events,
                &cancel,
            )
            .await?)
        }),
        stage("model", &events, async {
            Ok(import_model(&store, &model, &settings.model_source(), &events, &cancel).await?)
        }),
    )?;

    let training = settings.training(worker.device(settings.device))?;
    let data = stage("pretokenize", &events, async {
        let chat = chat(&base)
            .await
            .with_context(|| format!("in model {}", settings.model))?;
        let options = PretokenizeOptions {
            max_seq_len: Some(training.max_seq_len),
            date: Some(settings.date.clone()),
            ..PretokenizeOptions::default()
        };
        Ok(pretokenize(
            &store,
            &model,
            &dataset,
            &standardized,
            &chat,
            &options,
            &events,
            &cancel,
        )
        .await?)
    })
    .await?;

    if settings.workers > 1 && worker.local.is_none() {
        second.store(KILL, Ordering::Relaxed);
        return train_together(worker.launch, settings.workers, cancel, at_once).await;
    }
    let events = worker.events(true);
    stage("train", &events, async {
        let order = ReaderOptions {
            seed: training.seed,
            ..ReaderOptions::default()
        };
        let source = async {
            let reader = Reader::open(&data, order)
                .await
                .map_err(updraft::train::Error::source)?;
            let source = DatasetSource::new(reader, Handle::current());
            Ok(Sources::from(Arc::new(source) as Arc<dyn ExampleSource>))
        };
        let run = TrainStage {
            model: model.clone(),
            dataset: dataset.clone(),
            base: base.clone(),
            data: data.clone(),
            held_out: None,
            lora: settings.lora(),
            config: training.clone(),
            report_to: settings.sinks()?,
            compute: worker.device(settings.device),
            launch: worker.launch.clone(),
            threads: Threads::new(worker.threads()).context("could not start threads")?,
        };
        Ok(train_stage(&store, &run, source, &events, &cancel)
            .await?
            .stage)
    })
    .await?;
    Ok(())
}

/// What was asked for. Each worker has said after which step it stopped.
#[derive(Debug)]
pub struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the workers were stopped; run again to continue")
    }
}

impl std::error::Error for Stopped {}

/// Which of several processes this one is, as torchrun says it, or [`train_together`].
struct Worker {
    launch: Option<Launch>,
    /// Its number on this machine, and how many are there.
    local: Option<(usize, usize)>,
}

impl Worker {
    fn from_env() -> Result<Worker> {
        let variable = |name: &str| std::env::var(name).ok();
        let number = |name| variable(name).and_then(|text| text.parse::<usize>().ok());
        let local =
            number("LOCAL_RANK").map(|rank| (rank, number("LOCAL_WORLD_SIZE").unwrap_or(1)));
        Ok(Worker {
            launch: Launch::from_env(variable)?,
            local,
        })
    }

    /// The first one tells of the training; of what comes before, whoever started the workers.
    fn events(&self, training: bool) -> Events {
        let leads = self.launch.as_ref().is_none_or(|launch| launch.rank == 0);
        match self.local {
            Some((_, count)) if count > 1 && !(training && leads) => Events::silent(),
            _ => Events::from_env(),
        }
    }

    /// A GPU for each.
    fn device(&self, device: Compute) -> Compute {
        match (device, self.local) {
            (Compute::Cuda(_), Some((rank, count))) if count > 1 => Compute::Cuda(rank),
            (device, _) => device,
        }
    }

    /// Its share of this machine's cores.
    fn threads(&self) -> usize {
        let share = self.local.map_or(1, |(_, count)| count);
        (available_threads() / share).max(1)
    }
}

/// Starts this command once for each worker, and waits for them.
async fn train_together(
    launch: Option<Launch>,
    workers: usize,
    cancel: CancelToken,
    at_once: CancelToken,
) -> Result<()> {
    let ended = tokio::task::spawn_blocking(move || {
        let program = std::env::current_exe()?;
        let worker = || {
            let mut command = std::process::Command::new(&program);
            command.args(std::env::args_os().skip(1));
            command
        };
        let ended = Processes::start(launch.as_ref(), workers, worker)?.wait(&cancel, &at_once)?;
        anyhow::Ok(ended)
    });
    match ended
        .await
        .context("the thread that waits for the workers")??
    {
        Ended::Done => Ok(()),
        Ended::Stopped => Err(Stopped.into()),
    }
}

/// Times a stage and reports it.
async fn stage(
    name: &str,
    events: &Events,
    work: impl Future<Output = Result<FinishedStage>>,
) -> Result<FinishedStage> {
    let started = Instant::now();
    let stage = work.await?;
    let counts = stage.counts();
    events.finished(StageSummary {
        stage: name.to_owned(),
        seconds: started.elapsed().as_secs_f64(),
        reused: stage.reused(),
        rows: counts.get("rows").copied(),
        rejected: counts.get("rejected").copied().unwrap_or(0),
        tokens: counts.get("tokens").copied(),
        bytes_written: if stage.reused() {
            0
        } else {
            stage.manifest().await?.total_bytes()
        },
        dir: stage.dir(),
    });
    Ok(stage)
}

/// The model's tokenizer and template, from the store.
async fn chat(base: &FinishedStage) -> Result<Chat> {
    let manifest = base.manifest().await?;
    let mut files = BTreeMap::new();
    for object in &manifest.objects {
        if !object.path.ends_with(".safetensors") {
            files.insert(object.path.as_str(), base.read(object).await?);
        }
    }
    let file = |name: &str| files.get(name).map(|bytes| &bytes[..]);
    Ok(Chat::from_files(&ChatFiles {
        tokenizer_json: file("tokenizer.json").context("there is no tokenizer.json")?,
        template: TemplateFiles {
            chat_template_jinja: file("chat_template.jinja"),
            tokenizer_config: file("tokenizer_config.json"),
            chat_template_json: file("chat_template.json"),
            special_tokens_map: file("special_tokens_map.json"),
            additional_chat_templates: &[],
        },
        generation_config: file("generation_config.json"),
    })?)
}

/// The cores of this machine.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Where the rows come from: `letters` are generated now, the same each time.
async fn dataset_source(
    settings: &Settings,
    events: &Events,
    cancel: &CancelToken,
) -> Result<Arc<dyn Source>> {
    if settings.dataset == "letters" && !Path::new("letters").exists() {
        let (seed, count) = LETTERS;
        let rows: Vec<Value> = letters::conversations(seed, count)
            .map(|line| serde_json::from_str(&line))
            .collect::<Result<_, _>>()?;
        return Ok(Arc::new(MemorySource::new("letters", rows)?));
    }
    let options = SourceOptions::default();
    Ok(resolve_source_with(&settings.dataset, &options, events, cancel).await?)
}

/// What a second signal does: ends the program; kills its workers, and then it; in a worker nothing, for the first may
/// come twice.
const EXIT: u8 = 0;
const KILL: u8 = 1;
const NOTHING: u8 = 2;

/// A spot notice or a launcher's cancel: the trainer writes a checkpoint, then the stage ends. A
/// second one waits for nothing, such as data that does not come; every stage begins again from what
/// is in the store.
fn cancel_on_signal(
    cancel: CancelToken,
    second: Arc<AtomicU8>,
    at_once: CancelToken,
) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            match (cancel.is_cancelled(), second.load(Ordering::Relaxed)) {
                (false, _) => cancel.cancel(),
                (true, EXIT) => std::process::exit(128 + 15),
                (true, KILL) => at_once.cancel(),
                (true, _) => {}
            }
        }
    });
    Ok(())
}
