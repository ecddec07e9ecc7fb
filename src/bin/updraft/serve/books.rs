//! Where services are recorded: in the state, and in files beside it.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use updraft::provision::Engine;
use updraft::provision::service::ServiceReport;

use super::Error;
use super::order::Row;
use crate::world;

/// What the process of a service tells of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Told {
    #[serde(flatten)]
    pub(super) report: ServiceReport,
    /// The newest version it was asked for; the report's own where that could be begun.
    pub(super) asked: u32,
    /// What stands in its way; the version before serves on.
    pub(super) problem: Option<String>,
}

pub(super) fn folder() -> PathBuf {
    world::home().join("services")
}

pub(super) fn row(engine: &Engine, name: &str) -> Result<Option<Row>, Error> {
    let found = engine
        .state()
        .services()?
        .into_iter()
        .find(|(known, _)| known == name);
    Ok(found
        .map(|(_, spec)| serde_json::from_value(spec))
        .transpose()?)
}

pub(super) fn put(engine: &Engine, name: &str, row: &Row) -> Result<(), Error> {
    Ok(engine
        .state()
        .put_service(name, &serde_json::to_value(row)?)?)
}

pub(super) fn forget(engine: &Engine, name: &str) -> Result<(), Error> {
    let _ = std::fs::remove_file(folder().join(format!("{name}.json"))); // it may never have been
    Ok(engine.state().forget_service(name)?)
}

pub(super) fn told(name: &str) -> Option<Told> {
    let text = std::fs::read_to_string(folder().join(format!("{name}.json"))).ok()?;
    serde_json::from_str(&text).ok()
}

/// Held by the process of a service while it lives.
pub(super) fn lock(name: &str) -> Result<Option<File>, Error> {
    std::fs::create_dir_all(folder())?;
    let file = File::create(folder().join(format!("{name}.lock")))?;
    Ok(file.try_lock().is_ok().then_some(file))
}

pub(super) fn write(path: &Path, text: &str) -> Result<(), Error> {
    let sibling = path.with_extension("tmp");
    std::fs::write(&sibling, text)?;
    Ok(std::fs::rename(sibling, path)?)
}

pub(super) fn log_path(name: &str) -> PathBuf {
    folder().join(format!("{name}.log"))
}

pub(super) fn values_path(name: &str, version: u32) -> PathBuf {
    folder().join(format!("{name}.values-{version}"))
}
