//! Services: a process of this machine keeps each of them up.

use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use updraft::provision::Engine;
use updraft::provision::service::{ReplicaPhase, ServiceReport};

use self::books::{forget, lock, log_path, put, row, told};
use self::order::{Row, Values};
pub(crate) use self::process::run;
use self::process::spawn;
use crate::arguments::TaskOptions;
use crate::screen::Screen;
use crate::show::tell_all;
use crate::{Outcome, world};

mod books;
mod order;
mod process;

/// Where services listen from, as SkyPilot has it.
const FIRST_PORT: u16 = 30001;

/// How often the process of a service looks for a new order, and others look at it.
const LOOK: Duration = Duration::from_millis(500);

type Error = Box<dyn std::error::Error>;

pub(crate) async fn up(options: TaskOptions, screen: &Screen) -> Outcome {
    let engine = world::engine()?;
    let file = std::path::absolute(options.file.clone().unwrap_or_default())?;
    let name = match (&options.name, file.file_stem()) {
        (Some(name), _) => name.clone(),
        (None, stem) => stem.unwrap_or_default().to_string_lossy().into_owned(),
    };
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(is_plain) {
        return Err(
            format!("service name `{name}` must be letters, digits, - and _; pass -n").into(),
        );
    }
    let known = row(&engine, &name)?;
    if let Some(known) = &known {
        if lock(&name)?.is_none() {
            return Err(format!(
                "service `{name}` is up already; `serve update {name}` rolls a new version out"
            )
            .into());
        }
        if known.down {
            return Err(
                format!("service `{name}` is half down; run `serve down {name}` again").into(),
            );
        }
        screen.note(&format!(
            "the process of `{name}` has ended; it is started again"
        ));
    }
    let port = options.port.or(known.as_ref().map(|row| row.port));
    let mut row = Row {
        version: known.as_ref().map_or(1, |row| row.version + 1),
        port: free_port(port)?,
        ..known.unwrap_or_default()
    };
    row.take(&options)?;
    let values = Values::of(&options);
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
        return begun(&name, &row, &options, screen);
    }
    wait_ready(&engine, &name, row.version, &options, screen).await
}

pub(crate) async fn update(options: TaskOptions, screen: &Screen) -> Outcome {
    let engine = world::engine()?;
    let name = options.name.clone().unwrap_or_default();
    let mut row = row(&engine, &name)?.ok_or_else(|| format!("no service `{name}`"))?;
    if lock(&name)?.is_some() {
        return Err(format!(
            "the process of `{name}` has ended; `serve up -n {name}` with this file starts it again"
        )
        .into());
    }
    row.version += 1;
    row.take(&options)?;
    let values = Values::of(&options);
    row.task(&values)?;
    values.hand_over(&name, row.version)?;
    put(&engine, &name, &row)?;
    if options.detach {
        return begun(&name, &row, &options, screen);
    }
    wait_ready(&engine, &name, row.version, &options, screen).await
}

/// Says where a service will be that nobody waits for.
fn begun(name: &str, row: &Row, options: &TaskOptions, screen: &Screen) -> Outcome {
    let url = url(row.port);
    match options.json {
        true => {
            let told = serde_json::json!({"name": name, "url": url, "version": row.version});
            screen.say(&told.to_string());
        }
        false => screen.say(&url),
    }
    Ok(ExitCode::SUCCESS)
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
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
        let Some(told) = told(name).filter(|told| told.asked == version) else {
            continue;
        };
        if let Some(problem) = told.problem {
            return Err(format!(
                "version {version} of `{name}` was not begun, what was there serves on: {problem}"
            )
            .into());
        }
        let report = told.report;
        if report.version != version {
            continue;
        }
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
    let mut reports = Vec::new();
    for (name, _) in &services {
        reports.push((name, lock(name)?.is_none(), told(name)));
    }
    if json {
        let mut known = Vec::new();
        for (name, alive, told) in &reports {
            let mut value = match told {
                Some(told) => serde_json::to_value(told)?,
                None => serde_json::json!({"name": name}),
            };
            value["alive"] = (*alive).into();
            known.push(value);
        }
        screen.say(&serde_json::to_string(&known)?);
        return Ok(());
    }
    if reports.is_empty() {
        screen.note("no services");
        return Ok(());
    }
    let mut rows = Vec::new();
    for (name, alive, told) in reports {
        if let Some(problem) = told.as_ref().and_then(|told| told.problem.as_ref()) {
            screen.note(&format!("`{name}`: {problem}"));
        }
        let report = told.as_ref().map(|told| &told.report);
        let ready = report.iter().flat_map(|report| &report.replicas);
        let ready = ready
            .filter(|replica| replica.phase == ReplicaPhase::Ready)
            .count();
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
    let mut outcomes = Vec::new();
    for name in names {
        outcomes.push((name, take_down(&engine, name).await));
    }
    tell_all(outcomes, "GONE", json, screen)
}

async fn take_down(engine: &Engine, name: &str) -> Result<(), Error> {
    let mut known = row(engine, name)?.ok_or_else(|| format!("no service `{name}`"))?;
    known.down = true;
    put(engine, name, &known)?;
    // Its process ends it; without one it is done here.
    while row(engine, name)?.is_some() {
        if let Some(_lock) = lock(name)? {
            engine.down_service(name).await?;
            forget(engine, name)?;
        }
        tokio::time::sleep(LOOK / 5).await;
    }
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
