//! An OpenAI-compatible server for a model and its LoRA adapters.
//!
//! ```sh
//! cargo run --release --example updraft-serve -- --model ./my-model --adapter tuned=./my-lora
//! cargo run --release --example updraft-serve -- --model s3://bucket/done/my-model/my-dataset
//! cargo run --release --example updraft-serve -- --store ./store --model done/my-model/my-dataset
//! curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
//!   -d '{"messages": [{"role": "user", "content": "Hello"}]}'
//! ```

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program talks to a person"
)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lexopt::Arg;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;
use updraft::model::{Threads, import_model};
use updraft::serve::{
    AdapterSource, ApiKeys, EngineOptions, ModelEngine, ModelSource, ServeOptions, Tls, listen,
    serve,
};
use updraft::store::{CancelToken, NoProgress, Store};

const HELP: &str = "\
usage: updraft-serve --model PATH|URL|HUB_ID [options]

  --model M               a folder, a stage's URL such as s3://bucket/done/model/dataset, or a
                          Hub id such as Qwen/Qwen2.5-0.5B-Instruct        UPDRAFT_MODEL
  --store URL             where done/MODEL/DATASET and models/MODEL are looked for, if M or an
                          adapter's path is such a name                    UPDRAFT_STORE
  --name N                the model's name in requests; M if not given     UPDRAFT_NAME
  --adapter NAME=PATH     a LoRA adapter, a folder or a stage's URL; repeatable
                                                          UPDRAFT_ADAPTER (a=P,b=P,…)
  --api-key K             who may ask; repeatable                          UPDRAFT_API_KEY (a,b,…)
  --host H --port P       where to listen; 127.0.0.1 and 8000              UPDRAFT_HOST, UPDRAFT_PORT
  --device D              cpu, cuda or cuda:1; a GPU needs --features cuda UPDRAFT_DEVICE
  --max-model-len N       the longest prompt and completion together       UPDRAFT_MAX_MODEL_LEN
  --quantize q8_0         keeps weights in 9 bits a number: half of bf16   UPDRAFT_QUANTIZE
  --kv-cache-mib N        memory for keys and values; 512, or most of what is
                          left of a GPU's                                  UPDRAFT_KV_CACHE_MIB
  --threads N             threads that compute; all cores                  UPDRAFT_THREADS
  --tls-cert F --tls-key F  HTTPS with this certificate chain and private key, PEM
                                              UPDRAFT_TLS_CERT, UPDRAFT_TLS_KEY
  --request-timeout S     seconds a completion may take; unbounded         UPDRAFT_REQUEST_TIMEOUT
  --drain-timeout S       seconds requests get to end at shutdown; 30      UPDRAFT_DRAIN_TIMEOUT
  --allow-origin O        web pages that may ask, * for any; repeatable
                                                          UPDRAFT_ALLOW_ORIGIN (a,b,…)
  --runtime-adapters      lets clients load and unload adapters            UPDRAFT_RUNTIME_ADAPTERS=true
  --log-json              logs a JSON object a line                        UPDRAFT_LOG_JSON=true
  --cache DIR             where models from the Hub are kept               UPDRAFT_CACHE
";

fn main() -> ExitCode {
    let settings = match Settings::from_args() {
        Ok(Some(settings)) => settings,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&error),
    };
    settings.start_log();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let served = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(settings)));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

async fn run(settings: Settings) -> Result<()> {
    let started = Instant::now();
    let listener = listen(SocketAddr::new(settings.host, settings.port)).await?;
    let address = listener.local_addr()?;
    let source = source(&settings).await?;
    let threads = Threads::new(settings.threads).context("could not start threads")?;
    let name = settings.name.as_ref().unwrap_or(&settings.model);
    let engine = ModelEngine::load(
        name,
        &source,
        &settings.adapters,
        &threads,
        &settings.engine,
    );
    let engine = Arc::new(engine.await?);
    let seconds = started.elapsed().as_secs_f64();
    let scheme = settings.serve.tls.as_ref().map_or("http", |_| "https");
    println!("serving {name} at {scheme}://{address}/v1, ready after {seconds:.2} s");
    serve(listener, engine, settings.serve, first_signal()?).await;
    Ok(())
}

/// A Hub id is imported once into the cache; everything else is read where it is.
async fn source(settings: &Settings) -> Result<ModelSource> {
    let model = &settings.model;
    if let Some(stage) = stage(model, settings.store.as_deref())? {
        return Ok(stage);
    }
    let is_hub_id = model.split('/').filter(|part| !part.is_empty()).count() == 2
        && !model.contains("://")
        && !model.starts_with(['/', '.'])
        && !Path::new(model).exists();
    if !is_hub_id {
        return Ok(ModelSource::parse(model)?);
    }
    let store = Store::open(&settings.cache)?;
    println!("fetching {model} from the Hub into {}", settings.cache);
    import_model(&store, model, model, &NoProgress, &CancelToken::new()).await?;
    Ok(ModelSource::stage(&store, format!("models/{model}")))
}

/// A stage's name in the store, if there is a store and the text is such a name.
fn stage(text: &str, store: Option<&str>) -> Result<Option<ModelSource>> {
    match store {
        Some(url) if text.starts_with("done/") || text.starts_with("models/") => {
            Ok(Some(ModelSource::stage(&Store::open(url)?, text)))
        }
        _ => Ok(None),
    }
}

/// Ends with the first SIGTERM or SIGINT. A second one ends the process at once.
fn first_signal() -> Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (tell, told) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut tell = Some(tell);
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            match tell.take() {
                Some(tell) => drop(tell.send(())),
                None => {
                    eprintln!("stopped by a second signal");
                    std::process::exit(130);
                }
            }
        }
    });
    Ok(async {
        let _ = told.await;
    })
}

struct Settings {
    model: String,
    name: Option<String>,
    store: Option<String>,
    adapters: Vec<AdapterSource>,
    host: IpAddr,
    port: u16,
    threads: usize,
    cache: String,
    log_json: bool,
    engine: EngineOptions,
    serve: ServeOptions,
}

impl Settings {
    /// The environment's, overridden by the command line's; `None` if help was asked for.
    fn from_args() -> Result<Option<Self>> {
        let home = std::env::var("HOME").unwrap_or_else(|_| ".".into());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut settings = Self {
            model: env("UPDRAFT_MODEL")?.unwrap_or_default(),
            name: env("UPDRAFT_NAME")?,
            store: env("UPDRAFT_STORE")?,
            adapters: Vec::new(),
            host: env("UPDRAFT_HOST")?.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            port: env("UPDRAFT_PORT")?.unwrap_or(8000),
            threads: env("UPDRAFT_THREADS")?.unwrap_or(cores),
            cache: env("UPDRAFT_CACHE")?.unwrap_or(format!("{home}/.cache/updraft")),
            log_json: env("UPDRAFT_LOG_JSON")?.unwrap_or(false),
            engine: EngineOptions {
                max_model_len: env("UPDRAFT_MAX_MODEL_LEN")?,
                quantization: env("UPDRAFT_QUANTIZE")?,
                kv_cache_bytes: env::<u64>("UPDRAFT_KV_CACHE_MIB")?.map(|mib| mib << 20),
                ..EngineOptions::default()
            },
            serve: ServeOptions::default(),
        };
        settings.serve.request_timeout = env("UPDRAFT_REQUEST_TIMEOUT")?.map(Duration::from_secs);
        if let Some(seconds) = env("UPDRAFT_DRAIN_TIMEOUT")? {
            settings.serve.drain_timeout = Duration::from_secs(seconds);
        }
        settings.serve.runtime_adapters = env("UPDRAFT_RUNTIME_ADAPTERS")?.unwrap_or(false);
        settings.serve.allowed_origins = list("UPDRAFT_ALLOW_ORIGIN")?;
        let mut keys = list("UPDRAFT_API_KEY")?;
        let mut tls: [Option<PathBuf>; 2] = [env("UPDRAFT_TLS_CERT")?, env("UPDRAFT_TLS_KEY")?];
        let mut adapters = list("UPDRAFT_ADAPTER")?;
        let mut compute = env("UPDRAFT_DEVICE")?.unwrap_or_default();

        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            use lexopt::ValueExt;
            match arg {
                Arg::Long("model") => settings.model = parser.value()?.string()?,
                Arg::Long("name") => settings.name = Some(parser.value()?.string()?),
                Arg::Long("adapter") => {
                    adapters.push(parser.value()?.string()?);
                }
                Arg::Long("store") => settings.store = Some(parser.value()?.string()?),
                Arg::Long("tls-cert") => tls[0] = Some(parser.value()?.into()),
                Arg::Long("tls-key") => tls[1] = Some(parser.value()?.into()),
                Arg::Long("api-key") => keys.push(parser.value()?.string()?),
                Arg::Long("host") => settings.host = parser.value()?.parse()?,
                Arg::Long("port") => settings.port = parser.value()?.parse()?,
                Arg::Long("device") => compute = parser.value()?.parse()?,
                Arg::Long("max-model-len") => {
                    settings.engine.max_model_len = Some(parser.value()?.parse()?);
                }
                Arg::Long("quantize") => {
                    settings.engine.quantization = Some(parser.value()?.parse()?);
                }
                Arg::Long("kv-cache-mib") => {
                    settings.engine.kv_cache_bytes = Some(parser.value()?.parse::<u64>()? << 20);
                }
                Arg::Long("threads") => settings.threads = parser.value()?.parse()?,
                Arg::Long("request-timeout") => {
                    let seconds = Duration::from_secs(parser.value()?.parse()?);
                    settings.serve.request_timeout = Some(seconds);
                }
                Arg::Long("drain-timeout") => {
                    settings.serve.drain_timeout = Duration::from_secs(parser.value()?.parse()?);
                }
                Arg::Long("allow-origin") => {
                    let origin = parser.value()?.string()?;
                    settings.serve.allowed_origins.push(origin);
                }
                Arg::Long("runtime-adapters") => settings.serve.runtime_adapters = true,
                Arg::Long("log-json") => settings.log_json = true,
                Arg::Long("cache") => settings.cache = parser.value()?.string()?,
                Arg::Short('h') | Arg::Long("help") => return Ok(None),
                other => return Err(other.unexpected().into()),
            }
        }
        settings.engine = EngineOptions {
            max_model_len: settings.engine.max_model_len,
            quantization: settings.engine.quantization,
            kv_cache_bytes: settings.engine.kv_cache_bytes,
            ..EngineOptions::for_compute(compute)
        };
        if settings.model.is_empty() {
            bail!("no model is named; give --model PATH|URL|HUB_ID, or see --help");
        }
        // One that a script left empty would open the server to everybody.
        if keys.iter().any(String::is_empty) {
            bail!("an API key is empty; give --api-key a key, or leave it out");
        }
        settings.serve.api_keys = ApiKeys::new(keys);
        settings.serve.tls = match tls {
            [Some(certificates), Some(key)] => Some(Tls::from_pem_files(&certificates, &key)?),
            [None, None] => None,
            _ => bail!("HTTPS needs both; give --tls-cert and --tls-key"),
        };
        for adapter in adapters {
            let named = adapter.split_once('=');
            let (name, path) =
                named.with_context(|| format!("--adapter {adapter} is not NAME=PATH"))?;
            let source = match stage(path, settings.store.as_deref())? {
                Some(stage) => stage,
                None => ModelSource::parse(path)?,
            };
            let name = name.to_owned();
            settings.adapters.push(AdapterSource { name, source });
        }
        Ok(Some(settings))
    }

    fn start_log(&self) {
        let log = tracing_subscriber::fmt()
            .with_max_level(LevelFilter::INFO)
            .with_writer(std::io::stderr)
            .with_target(false);
        if self.log_json {
            log.json().init();
        } else {
            log.with_ansi(false).init();
        }
    }
}

/// The entries of a variable, separated by commas; none if it is not set or empty.
fn list(name: &str) -> Result<Vec<String>> {
    let text: Option<String> = env(name)?;
    let entries = text.iter().flat_map(|text| text.split(','));
    Ok(entries.map(|entry| entry.trim().to_owned()).collect())
}

/// A variable's value, if it is set and not empty.
fn env<T: std::str::FromStr>(name: &str) -> Result<Option<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => {
            let value = text.parse();
            Ok(Some(value.with_context(|| {
                format!("{name}={text} has no meaning")
            })?))
        }
        _ => Ok(None),
    }
}
