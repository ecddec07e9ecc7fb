//! What a service was ordered to be, and the values that are in no file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use updraft::provision::{MountSource, Secret, Task};

use super::Error;
use super::books::values_path;
use crate::arguments::TaskOptions;
use crate::launch::{here, read_tasks};

/// What is recorded of a service: paths and numbers, no values.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) file: PathBuf,
    pub(super) env_file: Option<PathBuf>,
    pub(super) secret_file: Option<PathBuf>,
    pub(super) workdir: Option<String>,
    pub(super) infra: Option<String>,
    pub(super) gpus: Option<String>,
    pub(super) cpus: Option<String>,
    pub(super) memory: Option<String>,
    pub(super) use_spot: bool,
    pub(super) base: PathBuf,
    pub(super) version: u32,
    pub(super) port: u16,
    pub(super) down: bool,
}

/// Variables and secrets given on the command line.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Values {
    envs: Vec<(String, String)>,
    secrets: Vec<(String, String)>,
}

fn hidden(pairs: &[(String, String)]) -> Vec<(String, Secret<String>)> {
    let hide = |(name, value): &(String, String)| (name.clone(), Secret::new(value.clone()));
    pairs.iter().map(hide).collect()
}

fn shown(pairs: &[(String, Secret<String>)]) -> Vec<(String, String)> {
    let show = |(name, value): &(String, Secret<String>)| (name.clone(), value.expose().clone());
    pairs.iter().map(show).collect()
}

impl Row {
    pub(super) fn task(&self, values: &Values) -> Result<Task, Error> {
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
            envs: hidden(&values.envs),
            secrets: hidden(&values.secrets),
            ..TaskOptions::default()
        };
        let mut tasks = read_tasks(&options)?;
        tasks.iter_mut().for_each(|task| self.root(task));
        match (tasks.pop(), tasks.is_empty()) {
            (Some(task), true) if task.service.is_some() => Ok(task),
            (Some(_), true) => {
                Err("the task has no service section; add one with a readiness_probe".into())
            }
            _ => Err("a service is a file of one task".into()),
        }
    }

    /// Makes the task's folders independent of where its process runs.
    fn root(&self, task: &mut Task) {
        let rooted = |path: &mut String| {
            if !path.starts_with("~/") {
                *path = self.base.join(&*path).to_string_lossy().into_owned();
            }
        };
        task.workdir.as_mut().map(rooted);
        for mount in &mut task.file_mounts {
            if let MountSource::Local(path) = &mut mount.source {
                rooted(path);
            }
        }
    }

    /// Takes over what a command line says.
    pub(super) fn take(&mut self, options: &TaskOptions) -> Result<(), Error> {
        let given = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
        self.file = std::path::absolute(options.file.clone().unwrap_or_default())?;
        self.env_file = given(&options.env_file)?.or(self.env_file.take());
        self.secret_file = given(&options.secret_file)?.or(self.secret_file.take());
        let or = |new: &Option<String>, old: &mut Option<String>| {
            if new.is_some() {
                old.clone_from(new);
            }
        };
        or(&options.workdir, &mut self.workdir);
        or(&options.infra, &mut self.infra);
        or(&options.gpus, &mut self.gpus);
        or(&options.cpus, &mut self.cpus);
        or(&options.memory, &mut self.memory);
        self.use_spot |= options.use_spot;
        self.base = here()?;
        Ok(())
    }
}

impl Values {
    pub(super) fn of(options: &TaskOptions) -> Self {
        Self {
            envs: shown(&options.envs),
            secrets: shown(&options.secrets),
        }
    }

    /// Hands the values of a version to the service's process, which takes the file away.
    pub(super) fn hand_over(&self, name: &str, version: u32) -> Result<(), Error> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = std::fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(values_path(name, version))?;
        Ok(serde_json::to_writer(file, self)?)
    }

    /// Takes over the values of a version, if it has any of its own.
    pub(super) fn receive(&mut self, name: &str, version: u32) -> Result<(), Error> {
        let path = values_path(name, version);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        std::fs::remove_file(&path)?;
        let newer: Values = serde_json::from_str(&text)?;
        self.envs.extend(newer.envs); // later ones win
        self.secrets.extend(newer.secrets);
        Ok(())
    }
}
