//! Services: a process of this machine keeps each of them up.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use updraft::provision::service::{Controller, ReplicaPhase, ServiceOrder, ServiceReport};
use updraft::provision::{Engine, ExecOptions, Task};

use crate::arguments::TaskOptions;
use crate::launch::{here, read_tasks};
use crate::screen::Screen;
use crate::show::said;
use crate::{Outcome, world};

/// Where services listen from, as SkyPilot has it.
const FIRST_PORT: u16 = 30001;

/// How often the process of a service looks for a new order, and others look at it.
const LOOK: Duration = Duration::from_millis(500);

/// The variable by which values of the command line reach the process: they are in no file.
const VALUES: &str = "UPDRAFT_SERVE_VALUES";

type Error = Box<dyn std::error::Error>;

/// What is recorded of a service: paths and numbers, no values.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Row {
    file: PathBuf,
    env_file: Option<PathBuf>,
    secret_file: Option<PathBuf>,
    workdir: Option<String>,
    infra: Option<String>,
    gpus: Option<String>,
    cpus: Option<String>,
    memory: Option<String>,
    use_spot: bool,
    base: PathBuf,
    version: u32,
    port: u16,
    down: bool,
}

/// Variables and secrets given on the command line.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Values {
    envs: Vec<(String, String)>,
    secrets: Vec<(String, String)>,
}

impl Row {
    fn task(&self, values: &Values) -> Result<Task, Error> {
        let options = TaskOptions {
            file: Some(self.file.clone()),
            env_file: self.env_file.clone(),
            secret_file: self.secret_file.clone(),
            workdir: self.workdir.clone(),
            infra: self.infra.clone(),
            gpus: self.gpus.clone(),
            cpus: self.cpus.clone(),
            memory: self.memory.clone(),
            use_spot: self.use_spot,
            envs: values.envs.clone(),
            secrets: values.secrets.clone(),
            ..TaskOptions::default()
        };
        let mut tasks = read_tasks(&options)?;
        match (tasks.pop(), tasks.is_empty()) {
            (Some(task), true) if task.service.is_some() => Ok(task),
            (Some(_), true) => {
                Err("the task has no service section; add one with a readiness_probe".into())
            }
            _ => Err("a service is a file of one task".into()),
        }
    }
}

fn folder() -> PathBuf {
    world::home().join("services")
}

fn row(engine: &Engine, name: &str) -> Result<Option<Row>, Error> {
    let found = engine
        .state()
        .services()?
        .into_iter()
        .find(|(known, _)| known == name);
    Ok(found
        .map(|(_, spec)| serde_json::from_value(spec))
        .transpose()?)
}

fn put(engine: &Engine, name: &str, row: &Row) -> Result<(), Error> {
    Ok(engine
        .state()
        .put_service(name, &serde_json::to_value(row)?)?)
}

fn report(name: &str) -> Option<ServiceReport> {
    let text = std::fs::read_to_string(folder().join(format!("{name}.json"))).ok()?;
    serde_json::from_str(&text).ok()
}

/// Held by the process of a service while it lives.
fn lock(name: &str) -> Result<Option<File>, Error> {
    std::fs::create_dir_all(folder())?;
    let file = File::create(folder().join(format!("{name}.lock")))?;
    Ok(file.try_lock().is_ok().then_some(file))
}

pub(crate) async fn up(options: TaskOptions, screen: &Screen) -> Outcome {
    let engine = world::engine()?;
    let file = std::path::absolute(options.file.clone().unwrap_or_default())?;
    let name = match (&options.name, file.file_stem()) {
        (Some(name), _) => name.clone(),
        (None, stem) => stem.unwrap_or_default().to_string_lossy().into_owned(),
    };
    if row(&engine, &name)?.is_some() {
        return Err(format!(
            "service `{name}` is up already; `serve update {name}` rolls a new version out"
        )
        .into());
    }
    let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
    let row = Row {
        file,
        env_file: absolute(&options.env_file)?,
        secret_file: absolute(&options.secret_file)?,
        workdir: options.workdir.clone(),
        infra: options.infra.clone(),
        gpus: options.gpus.clone(),
        cpus: options.cpus.clone(),
        memory: options.memory.clone(),
        use_spot: options.use_spot,
        base: here()?,
        version: 1,
        port: free_port(options.port)?,
        down: false,
    };
    let values = Values {
        envs: options.envs.clone(),
        secrets: options.secrets.clone(),
    };
    let task = row.task(&values)?;
    for warning in task.warnings(&[]) {
        screen.note(&format!("warning: {warning}"));
    }
    if !options.yes && !screen.agrees(&format!("bring service `{name}` up?")) {
        return Ok(ExitCode::FAILURE);
    }
    put(&engine, &name, &row)?;
    spawn(&name, &values)?;
    if options.detach {
        return Ok(ExitCode::SUCCESS);
    }
    wait_ready(&engine, &name, 1, &options, screen).await
}

pub(crate) async fn update(options: TaskOptions, screen: &Screen) -> Outcome {
    let engine = world::engine()?;
    let name = options.name.clone().unwrap_or_default();
    let mut row = row(&engine, &name)?.ok_or_else(|| format!("no service `{name}`"))?;
    row.file = std::path::absolute(options.file.clone().unwrap_or_default())?;
    row.version += 1;
    row.task(&Values {
        envs: options.envs.clone(),
        secrets: options.secrets.clone(),
    })?;
    put(&engine, &name, &row)?;
    if options.detach {
        return Ok(ExitCode::SUCCESS);
    }
    wait_ready(&engine, &name, row.version, &options, screen).await
}

/// Waits until a replica of the version is ready, or none will be.
async fn wait_ready(
    engine: &Engine,
    name: &str,
    version: u32,
    options: &TaskOptions,
    screen: &Screen,
) -> Outcome {
    let started = Instant::now();
    let mut seen = String::new();
    loop {
        tokio::time::sleep(LOOK).await;
        if row(engine, name)?.is_none() {
            return Err(format!(
                "service `{name}` has ended; see {}",
                log_path(name).display()
            )
            .into());
        }
        if started.elapsed() > LOOK * 10 && lock(name)?.is_some() {
            return Err(format!(
                "the process of `{name}` has ended; see {}",
                log_path(name).display()
            )
            .into());
        }
        let Some(report) = report(name).filter(|report| report.version == version) else {
            continue;
        };
        let now = phases(&report);
        if now != seen {
            screen.note(&now);
            seen = now;
        }
        if let Some(failure) = &report.failure {
            return Err(format!("replicas of `{name}` fail: {failure}").into());
        }
        let is_ready = |replica: &&updraft::provision::service::Replica| {
            replica.version == version && replica.phase == ReplicaPhase::Ready
        };
        if report.replicas.iter().any(|replica| is_ready(&replica)) {
            match options.json {
                true => screen.say(&serde_json::to_string(&report)?),
                false => screen.say(&report.url),
            }
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Every replica with its version and phase, in words.
fn phases(report: &ServiceReport) -> String {
    let words: Vec<_> = report
        .replicas
        .iter()
        .map(|replica| {
            let phase = serde_json::to_value(&replica.phase).unwrap_or_default();
            let phase = phase.as_str().unwrap_or_default().to_owned();
            format!(
                "replica {} (version {}): {phase}",
                replica.id, replica.version
            )
        })
        .collect();
    words.join(", ")
}

pub(crate) fn status(json: bool, screen: &Screen) -> Result<(), Error> {
    let services = world::engine()?.state().services()?;
    let reports: Vec<_> = services
        .iter()
        .map(|(name, _)| (name, report(name)))
        .collect();
    if json {
        let known: Vec<_> = reports
            .iter()
            .filter_map(|(_, report)| report.as_ref())
            .collect();
        screen.say(&serde_json::to_string(&known)?);
        return Ok(());
    }
    if reports.is_empty() {
        screen.note("no services");
        return Ok(());
    }
    let mut rows = Vec::new();
    for (name, report) in reports {
        let alive = lock(name)?.is_none();
        let ready = report.iter().flat_map(|report| &report.replicas);
        let ready = ready
            .filter(|replica| replica.phase == ReplicaPhase::Ready)
            .count();
        let report = report.as_ref();
        rows.push(vec![
            name.clone(),
            if !alive {
                "NO PROCESS"
            } else if ready > 0 {
                "READY"
            } else {
                "NO REPLICA"
            }
            .to_owned(),
            report.map_or("-".to_owned(), |report| report.version.to_string()),
            report.map_or("-".to_owned(), |report| {
                format!("{ready}/{}", report.replicas.len())
            }),
            report.map_or("-".to_owned(), |report| report.url.clone()),
        ]);
    }
    screen.table(&["NAME", "STATUS", "VERSION", "READY", "URL"], &rows);
    Ok(())
}

pub(crate) async fn down(
    names: &[String],
    yes: bool,
    json: bool,
    screen: &Screen,
) -> Result<(), Error> {
    if !yes && !screen.agrees(&format!("end {} and all replicas?", names.join(", "))) {
        return Err("nothing was ended".into());
    }
    let engine = world::engine()?;
    for name in names {
        let mut known = row(&engine, name)?.ok_or_else(|| format!("no service `{name}`"))?;
        known.down = true;
        put(&engine, name, &known)?;
        // Its process ends it; without one it is done here.
        while row(&engine, name)?.is_some() {
            if let Some(_lock) = lock(name)? {
                engine.down_service(name).await?;
                forget(&engine, name)?;
            }
            tokio::time::sleep(LOOK / 5).await;
        }
        said(name, "GONE", json, screen);
    }
    Ok(())
}

fn forget(engine: &Engine, name: &str) -> Result<(), Error> {
    let _ = std::fs::remove_file(folder().join(format!("{name}.json"))); // it may never have been
    Ok(engine.state().forget_service(name)?)
}

/// The process behind a service, until the service is taken down.
pub(crate) async fn run(name: &str) -> Result<(), Error> {
    let Some(_lock) = lock(name)? else {
        return Err(format!("service `{name}` has a process already").into());
    };
    let engine = world::engine()?;
    let row_now = || row(&engine, name)?.ok_or_else(|| Error::from(format!("no service `{name}`")));
    let values = std::env::var(VALUES).unwrap_or_default();
    let values: Values = serde_json::from_str(&values).unwrap_or_default();
    let mut known = row_now()?;
    let order = |row: &Row| -> Result<ServiceOrder, Error> {
        Ok(ServiceOrder {
            task: row.task(&values)?,
            version: row.version,
        })
    };
    let options = ExecOptions {
        setup: true,
        base: known.base.clone(),
    };
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, known.port));
    let mut controller = Controller::new(
        name,
        engine.clone(),
        world::agent()?,
        options,
        address,
        order(&known)?,
    )
    .await?;
    let mut looked = Instant::now();
    loop {
        controller.step().await;
        if looked.elapsed() < LOOK {
            continue;
        }
        looked = Instant::now();
        let mut report = controller.report();
        report.url = format!("http://127.0.0.1:{}", known.port);
        write(
            &folder().join(format!("{name}.json")),
            &serde_json::to_string(&report)?,
        )?;
        let now = row_now()?;
        if now.down {
            controller.down().await?;
            return forget(&engine, name);
        }
        if now.version != known.version {
            controller.update(order(&now)?)?;
        }
        known = now;
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    let sibling = path.with_extension("tmp");
    std::fs::write(&sibling, text)?;
    Ok(std::fs::rename(sibling, path)?)
}

fn log_path(name: &str) -> PathBuf {
    folder().join(format!("{name}.log"))
}

/// Starts the process of a service, which outlives this one.
fn spawn(name: &str, values: &Values) -> Result<(), Error> {
    use std::os::unix::process::CommandExt;
    std::fs::create_dir_all(folder())?;
    let log = File::create(log_path(name))?;
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["serve", "run", name]);
    command.env(VALUES, serde_json::to_string(values)?);
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    command.process_group(0);
    command.spawn()?;
    Ok(())
}

/// The port asked for, or the first free one from SkyPilot's.
fn free_port(asked: Option<u16>) -> Result<u16, Error> {
    let is_free = |port: &u16| std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok();
    match asked {
        Some(port) if is_free(&port) => Ok(port),
        Some(port) => Err(format!(
            "port {port} is in use; choose another --port or leave the flag out"
        )
        .into()),
        None => (FIRST_PORT..FIRST_PORT + 100)
            .find(is_free)
            .ok_or_else(|| "no free port from 30001; pass --port".into()),
    }
}
