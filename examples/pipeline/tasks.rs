//! Launching the task files on this machine and following what they print.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::sync::oneshot;
use updraft::provision::providers::local::LocalProvider;
use updraft::provision::{
    Cluster, EnvOverrides, Job, JobStatus, LaunchOptions, Lease, LogStream, Provider, Task, launch,
    wait_ready,
};

use crate::screen::Screen;
use crate::settings::{Settings, assets};

/// How long a task may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(10);

/// Where the articles' service listens.
const FIRST_PORT: u16 = 30001;

/// This machine, and the names under which this pipeline's tasks run on it.
pub struct Launcher {
    provider: Arc<LocalProvider>,
    id: String,
    /// Held while this process lives: two pipelines on one store would end each other's tasks.
    _lock: File,
}

impl Launcher {
    /// Takes the lock of this store and ends what a killed pipeline left running.
    pub async fn new(settings: &Settings) -> Result<Launcher> {
        let root = std::env::temp_dir().join("updraft-local");
        std::fs::create_dir_all(&root)
            .with_context(|| format!("could not make {}", root.display()))?;
        let id = store_id(&settings.store)?;
        let path = root.join(format!("{id}.lock"));
        let lock =
            File::create(&path).with_context(|| format!("could not open {}", path.display()))?;
        if lock.try_lock().is_err() {
            bail!(
                "another pipeline works on {}; wait for it or choose another --store",
                settings.store
            );
        }
        let provider = Arc::new(LocalProvider::new(root)?);
        for left in provider
            .list_owned(None)
            .await?
            .iter()
            .filter(|instance| instance.cluster.ends_with(&id))
        {
            provider.terminate(&left.id).await?;
        }
        Ok(Launcher {
            provider,
            id,
            _lock: lock,
        })
    }

    /// Parses a task file of the example's assets and launches it; the caller drives the job.
    pub async fn launch(
        &self,
        file: &str,
        settings: &Settings,
        port: Option<u16>,
    ) -> Result<(Cluster, Task, Job)> {
        let path = assets().join(file);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("could not read {}", path.display()))?;
        let task = Task::from_yaml(&text, &environment(settings, port)?)
            .with_context(|| format!("in {}", path.display()))?;
        let name = task.name.clone().unwrap_or_default();
        let options = LaunchOptions {
            cluster: format!("{name}-{}", self.id),
            lease: Lease::default(),
        };
        let cluster = launch(self.provider.clone(), &task, &options).await?;
        let job = cluster.exec(&task).await?;
        Ok((cluster, task, job))
    }

    /// Runs the train task to its end, its output on the screen.
    pub async fn train(&self, settings: &Settings, screen: &mut Screen) -> Result<()> {
        let (cluster, _, mut job) = self.launch("train.yaml", settings, None).await?;
        let result = follow(&mut job, screen).await;
        screen.clear();
        job.cancel(GRACE).await?;
        cluster.down().await?;
        result
    }

    /// Runs the serve task until [`Service::stop`]; returns when its readiness probe answers.
    pub async fn serve(&self, settings: &Settings) -> Result<Service> {
        let port = free_port(settings.port)?;
        let (cluster, task, job) = self.launch("serve.yaml", settings, Some(port)).await?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let probe = task
            .service
            .context("serve.yaml has no service section")?
            .readiness_probe;
        let (stop, stopped) = oneshot::channel();
        let (ended, end) = oneshot::channel();
        let running = tokio::spawn(run_service(job, stopped, ended));
        let ready = wait_ready(address, &probe, async { end.await.unwrap_or_default() }).await;
        let service = Service {
            cluster,
            stop,
            running,
            address,
            ready_after: Duration::ZERO,
        };
        match ready {
            Ok(ready_after) => Ok(Service {
                ready_after,
                ..service
            }),
            Err(error) => {
                service.stop().await?;
                Err(error.into())
            }
        }
    }
}

/// A served model.
pub struct Service {
    cluster: Cluster,
    stop: oneshot::Sender<()>,
    running: tokio::task::JoinHandle<Result<()>>,
    pub address: SocketAddr,
    pub ready_after: Duration,
}

impl Service {
    /// Ends the server and everything of its task.
    pub async fn stop(self) -> Result<()> {
        let _ = self.stop.send(()); // it may have ended by itself
        self.running
            .await
            .context("the service's task panicked")??;
        Ok(self.cluster.down().await?)
    }
}

/// Reads the server's output until it ends or is told to; keeps the last line for the report.
async fn run_service(
    mut job: Job,
    mut stop: oneshot::Receiver<()>,
    ended: oneshot::Sender<String>,
) -> Result<()> {
    let mut last = "no output".to_owned();
    loop {
        tokio::select! {
            line = job.next_line() => match line? {
                Some(line) => last = line.text,
                None => {
                    let _ = ended.send(last.trim_start_matches("error: ").to_owned());
                    return Ok(());
                }
            },
            _ = &mut stop => return Ok(job.cancel(GRACE).await?),
        }
    }
}

/// Shows a job's lines; its failure carries the last line of its standard error.
async fn follow(job: &mut Job, screen: &mut Screen) -> Result<()> {
    let mut last_error = None;
    loop {
        let line = tokio::select! {
            line = job.next_line() => line?,
            _ = tokio::signal::ctrl_c() => bail!("interrupted; run the same command to go on from here"),
        };
        let Some(line) = line else { break };
        match line.stream {
            LogStream::Stdout => screen.line(&line.text),
            LogStream::Stderr => {
                if let Some(error) = last_error.replace(line.text) {
                    screen.say(&format!("  | {error}"));
                }
            }
        }
    }
    match (job.status(), last_error) {
        (Some(JobStatus::Succeeded), last_error) => {
            last_error
                .iter()
                .for_each(|line| screen.say(&format!("  | {line}")));
            Ok(())
        }
        (_, Some(error)) => bail!("{}", error.trim_start_matches("error: ")),
        (status, None) => bail!("the train task ended with {status:?} and said nothing"),
    }
}

/// What the task files leave open.
fn environment(settings: &Settings, port: Option<u16>) -> Result<EnvOverrides> {
    let pipeline = std::env::current_exe().context("could not find this program's own path")?;
    let env = EnvOverrides::new()
        .with("UPDRAFT_PIPELINE", pipeline.display().to_string())
        .with("UPDRAFT_EVENTS", "json")
        .with("STORE", &settings.store)
        .with("MODEL", &settings.model)
        .with("DATASET", &settings.dataset)
        .with("TRAIN_FLAGS", settings.train_flags())
        .with("DEVICE", settings.device.to_string())
        .with("HOST", &settings.host);
    Ok(match port {
        Some(port) => env.with("PORT", port.to_string()),
        None => env,
    })
}

/// The port asked for, if it is free, or the first free one from the articles' 30001.
fn free_port(asked: Option<u16>) -> Result<u16> {
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    match asked {
        Some(port) if is_free(&port) => Ok(port),
        Some(port) => bail!("port {port} is in use; choose another --port or leave the flag out"),
        None => (FIRST_PORT..=FIRST_PORT + 99)
            .find(is_free)
            .context("no free port from 30001; pass --port"),
    }
}

/// Tells stores apart in the names of clusters.
fn store_id(store: &str) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    match store.contains("://") {
        true => store.hash(&mut hasher),
        false => std::path::absolute(PathBuf::from(store))
            .context("--store is not a path")?
            .hash(&mut hasher),
    }
    Ok(format!("{:016x}", hasher.finish()))
}
