//! A task: what to run, on what, with which environment, in SkyPilot's YAML.

mod env;
mod fields;
pub(crate) mod node;

use std::collections::BTreeMap;

pub use env::EnvOverrides;
pub(crate) use env::{is_env_name, substitute};
pub(crate) use fields::Fields;
use node::{Node, Value};

use crate::error::{Error, Result};
use crate::resources::Resources;
use crate::secret::Secret;
use crate::service::ServiceSpec;

/// A task file: setup and run commands, what they need, and the service they may be.
#[derive(Debug, Clone, Default)]
pub struct Task {
    /// A name for people; clusters and jobs take theirs from it when none is given.
    pub name: Option<String>,
    /// The folder whose contents the commands see as their working directory.
    pub workdir: Option<String>,
    /// Shell commands that prepare the node; they run before `run`, once per launch.
    pub setup: Option<String>,
    /// Shell commands that do the work.
    pub run: Option<String>,
    /// Environment variables of both, overrides applied, every one with a value.
    pub envs: BTreeMap<String, String>,
    /// Like `envs`, but never printed.
    pub secrets: BTreeMap<String, Secret<String>>,
    /// What a node must offer.
    pub resources: Resources,
    /// How many nodes run the task.
    pub num_nodes: u32,
    /// Present when the task serves HTTP and has a readiness probe.
    pub service: Option<ServiceSpec>,
}

const KNOWN: &[&str] = &[
    "name",
    "workdir",
    "setup",
    "run",
    "envs",
    "secrets",
    "resources",
    "num_nodes",
    "service",
];

/// SkyPilot's other fields: known, not acted on, therefore refused.
const UNSUPPORTED: &[&str] = &[
    "file_mounts",
    "config",
    "volumes",
    "volume_mounts",
    "pool",
    "event_callback",
    "inputs",
    "outputs",
    "managed_secrets",
    "file_mounts_mapping",
    "api_server_access",
    "_metadata",
];

impl Task {
    /// Parses a task file of one document.
    ///
    /// ```
    /// use updraft_provision::{EnvOverrides, Task};
    ///
    /// let task = Task::from_yaml(
    ///     "name: hello\nenvs:\n  WHO: world\nrun: echo hello $WHO\n",
    ///     &EnvOverrides::new().with("WHO", "cloud"),
    /// )?;
    /// assert_eq!(task.envs["WHO"], "cloud");
    /// # Ok::<(), updraft_provision::Error>(())
    /// ```
    ///
    /// # Errors
    /// Errors point into the file: [`Error::UnknownField`], [`Error::Unsupported`],
    /// [`Error::InvalidField`], [`Error::Yaml`]. [`Error::MissingEnv`] if `envs` declares a variable
    /// without a value and `overrides` has none either.
    pub fn from_yaml(text: &str, overrides: &EnvOverrides) -> Result<Task> {
        let mut documents = Node::parse_documents(text)?;
        if documents.len() > 1 {
            return Err(documents[1].invalid(
                "---",
                "starts a second document; pipelines of several tasks are not supported, split the file",
            ));
        }
        let Some(document) = documents.pop() else {
            return Ok(Task {
                num_nodes: 1,
                ..Task::default()
            });
        };
        let mut fields = Fields::of("", document, KNOWN, UNSUPPORTED)?;
        let envs = read_envs(&mut fields, overrides)?;
        let secrets = read_secrets(&mut fields, overrides)?;
        let task = Task {
            name: fields.text("name")?,
            workdir: fields.text("workdir")?.map(|dir| substitute(&dir, &envs)),
            setup: fields.text("setup")?,
            run: fields.text("run")?,
            resources: match fields.take("resources") {
                Some(node) => Resources::from_node(node)?,
                None => Resources::default(),
            },
            num_nodes: fields.count("num_nodes")?.unwrap_or(1),
            service: match fields.take("service") {
                Some(node) => Some(ServiceSpec::from_node(node, &envs)?),
                None => None,
            },
            envs,
            secrets,
        };
        Ok(task)
    }

    /// The variables a job of this task sees: `envs`, then `secrets`.
    pub(crate) fn environment(&self) -> BTreeMap<String, Secret<String>> {
        let envs = self
            .envs
            .iter()
            .map(|(k, v)| (k.clone(), Secret::new(v.clone())));
        envs.chain(self.secrets.clone()).collect()
    }
}

/// `envs`, with overrides for the declared names and, as SkyPilot does, for new ones.
fn read_envs(fields: &mut Fields, overrides: &EnvOverrides) -> Result<BTreeMap<String, String>> {
    let mut envs = BTreeMap::new();
    for (name, node) in variables(fields, "envs")? {
        let value = match overrides.get(&name) {
            Some(value) => value.expose().clone(),
            None => node
                .scalar_text()
                .ok_or_else(|| missing(&name, &node, "envs"))?,
        };
        envs.insert(name, value);
    }
    for (name, value) in overrides.iter() {
        envs.entry(name.clone())
            .or_insert_with(|| value.expose().clone());
    }
    Ok(envs)
}

/// `secrets`, whose names leave `envs` alone: a secret is never an ordinary variable.
fn read_secrets(
    fields: &mut Fields,
    overrides: &EnvOverrides,
) -> Result<BTreeMap<String, Secret<String>>> {
    let mut secrets = BTreeMap::new();
    for (name, node) in variables(fields, "secrets")? {
        let value = match overrides.get(&name) {
            Some(value) => value.clone(),
            None => Secret::new(
                node.scalar_text()
                    .ok_or_else(|| missing(&name, &node, "secrets"))?,
            ),
        };
        secrets.insert(name, value);
    }
    Ok(secrets)
}

fn variables(fields: &mut Fields, block: &str) -> Result<Vec<(String, Node)>> {
    let Some(node) = fields.take(block) else {
        return Ok(Vec::new());
    };
    let Value::Mapping(entries) = node.value else {
        return Err(node.invalid(block, "must be a mapping of NAME: value"));
    };
    entries
        .into_iter()
        .map(
            |(key, value)| match key.scalar_text().filter(|name| is_env_name(name)) {
                Some(name) => Ok((name, value)),
                None => Err(key.invalid(
                    block,
                    "has a name that no shell accepts; use letters, digits and _",
                )),
            },
        )
        .collect()
}

fn missing(name: &str, node: &Node, block: &str) -> Error {
    match node.value {
        Value::Null => Error::MissingEnv {
            name: name.to_owned(),
        },
        _ => node.invalid(&format!("{block}.{name}"), "must be a string or a number"),
    }
}

#[cfg(test)]
mod tests;
