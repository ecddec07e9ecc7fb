//! The process that keeps a service up.

use std::fs::File;
use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Instant;

use updraft::provision::ExecOptions;
use updraft::provision::service::{Controller, ServiceOrder};

use super::books::{Told, folder, forget, lock, log_path, row, write};
use super::order::{Row, Values};
use super::{Error, LOOK, url};
use crate::world;

/// The process behind a service, until the service is taken down.
pub(crate) async fn run(name: &str) -> Result<(), Error> {
    let begun = Instant::now();
    let _lock = loop {
        match lock(name)? {
            Some(lock) => break lock,
            // Somebody may only be looking whether it is held.
            None if begun.elapsed() < LOOK => tokio::time::sleep(LOOK / 10).await,
            None => return Err(format!("service `{name}` has a process already").into()),
        }
    };
    let engine = world::engine()?;
    let known = row(&engine, name)?.ok_or_else(|| format!("no service `{name}`"))?;
    // Nobody else can read them there, and no job inherits them. Where they do not come whole,
    // whoever gave them has died: without them the service would be another.
    let mut values = match std::io::stdin() {
        terminal if terminal.is_terminal() => Values::default(),
        pipe => serde_json::from_reader(pipe).map_err(|error| {
            format!("the values of `{name}` did not come ({error}): run `updraft serve up` again")
        })?,
    };
    let options = ExecOptions {
        setup: true,
        base: known.base.clone(),
    };
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, known.port));
    let first = order(&known, &values)?;
    let mut controller = Controller::new(
        name,
        engine.clone(),
        world::agent()?,
        options,
        address,
        first,
    )
    .await?;
    let (mut asked, mut problem, mut looked) = (known.version, None, Instant::now());
    loop {
        controller.step().await;
        if looked.elapsed() < LOOK {
            continue;
        }
        looked = Instant::now();
        // Open files outlive their folder: nothing else would tell that nobody can ask for anything more.
        if !folder().exists() {
            return Ok(controller.down().await?);
        }
        match row(&engine, name) {
            Ok(Some(now)) if now.down => {
                controller.down().await?;
                return forget(&engine, name);
            }
            Ok(None) => return Ok(controller.down().await?), // somebody has forgotten it
            Ok(Some(now)) if now.version != asked => {
                asked = now.version;
                problem = begin(&mut controller, name, &now, &mut values).err();
            }
            Ok(Some(_)) => {}
            // What serves goes on serving; the books may be readable again.
            Err(error) => tracing::warn!("cannot look for a new order: {error}"),
        }
        if let Err(error) = tell(&controller, name, known.port, asked, problem.as_deref()) {
            tracing::warn!("cannot tell how it stands: {error}");
        }
    }
}

fn order(row: &Row, values: &Values) -> Result<ServiceOrder, Error> {
    Ok(ServiceOrder {
        task: row.task(values)?,
        version: row.version,
    })
}

/// Begins a new version; an error leaves the one before as it is.
fn begin(
    controller: &mut Controller,
    name: &str,
    row: &Row,
    values: &mut Values,
) -> Result<(), String> {
    let begun = values
        .receive(name, row.version)
        .and_then(|()| order(row, values))
        .and_then(|order| Ok(controller.update(order)?));
    begun.map_err(|error| {
        tracing::warn!("version {} is not begun: {error}", row.version);
        error.to_string()
    })
}

fn tell(
    controller: &Controller,
    name: &str,
    port: u16,
    asked: u32,
    problem: Option<&str>,
) -> Result<(), Error> {
    let mut report = controller.report();
    report.url = url(port);
    let told = Told {
        report,
        asked,
        problem: problem.map(str::to_owned),
    };
    write(
        &folder().join(format!("{name}.json")),
        &serde_json::to_string(&told)?,
    )
}

/// Starts the process of a service, which outlives this one.
pub(super) fn spawn(name: &str, values: &Values) -> Result<(), Error> {
    use std::os::unix::process::CommandExt;
    std::fs::create_dir_all(folder())?;
    let log = File::create(log_path(name))?;
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["serve", "run", name]);
    command
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log);
    command.process_group(0);
    let mut child = command.spawn()?;
    let pipe = child
        .stdin
        .take()
        .ok_or("the service's process has no input")?;
    Ok(serde_json::to_writer(pipe, values)?)
}
