//! A task: what to run, on what, with which environment, in SkyPilot's YAML.

mod builder;
mod env;
mod fields;
mod masked;
mod mounts;
pub(crate) mod node;
mod pipeline;
mod schema;
pub(crate) mod surface;
mod warnings;

use std::collections::BTreeMap;

pub use builder::TaskBuilder;
pub use env::EnvOverrides;
pub(crate) use env::{is_env_name, substitute};
pub(crate) use fields::Fields;
#[cfg(any(feature = "local", feature = "ssh"))]
pub(crate) use masked::public_part;
pub use mounts::{FileMount, MountSource};
use node::{Node, Value};
pub use pipeline::Pipeline;
pub(crate) use schema::edit_distance;
pub use warnings::Warning;

use crate::error::{Error, Result};
use crate::resources::Resources;
use crate::secret::Secret;
use crate::service::ServiceSpec;

/// A task file: setup and run commands, what they need, and the service they may be.
#[derive(Clone, Default)]
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
    /// Files and folders that are put on every node before `setup`.
    pub file_mounts: Vec<FileMount>,
    /// Where the task's input lies, with its size in GB, for the cost of reading it from elsewhere.
    pub inputs: Option<(String, f64)>,
    /// Present when the task serves HTTP and has a readiness probe.
    pub service: Option<ServiceSpec>,
}

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
                "starts a second document; read a pipeline of several tasks with `Pipeline::from_yaml`",
            ));
        }
        match documents.pop() {
            Some(document) => Self::from_node(document, overrides),
            None => Ok(Task {
                num_nodes: 1,
                ..Task::default()
            }),
        }
    }

    /// The shape first, then the meaning, and last what Updraft does not act on: a file that
    /// SkyPilot would refuse is refused for the same reason.
    fn from_node(document: Node, overrides: &EnvOverrides) -> Result<Task> {
        let mut refused = Vec::new();
        if !matches!(document.value, Value::Null) {
            surface::TASK.check("", &document, &mut refused)?;
        }
        let mut fields = Fields::of("", document);
        if let (Some(pool), Some(_)) = (fields.peek("pool"), fields.peek("service")) {
            return Err(pool.invalid("pool", "cannot stand beside service; keep one of the two"));
        }
        let envs = read_envs(&mut fields, overrides)?;
        let (secrets, unfilled) = read_secrets(&mut fields, overrides, &mut refused)?;
        let mut visible = envs.clone();
        visible.extend(secrets.iter().map(|(k, v)| (k.clone(), v.expose().clone())));
        let mut filled = |name: &str| fields.take(name).map(|node| node.substituted(&visible));
        let (workdir, mounts, service) =
            (filled("workdir"), filled("file_mounts"), filled("service"));
        let task = Task {
            name: read_name(&mut fields)?,
            workdir: workdir.and_then(|node| read_workdir(&node, &mut refused)),
            setup: fields.text("setup")?,
            run: fields.text("run")?,
            resources: match fields.take("resources") {
                Some(node) => Resources::from_node(&node, &mut refused)?,
                None => Resources::default(),
            },
            num_nodes: fields.count("num_nodes")?.unwrap_or(1),
            file_mounts: match mounts {
                Some(node) => mounts::read(&node, &mut refused)?,
                None => Vec::new(),
            },
            inputs: fields.take("inputs").and_then(|node| read_inputs(&node)),
            service: match service {
                Some(node) => Some(ServiceSpec::from_node(node, &mut refused)?),
                None => None,
            },
            envs,
            secrets,
        };
        match refused.into_iter().chain(unfilled).next() {
            Some(error) => Err(error),
            None => Ok(task),
        }
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
                .ok_or_else(|| Error::MissingEnv { name: name.clone() })?,
        };
        envs.insert(name, value);
    }
    for (name, value) in overrides.iter() {
        envs.entry(name.clone())
            .or_insert_with(|| value.expose().clone());
    }
    Ok(envs)
}

/// Secrets by name, and the error of the first that has no value.
type Secrets = (BTreeMap<String, Secret<String>>, Option<Error>);

/// `secrets`, whose names leave `envs` alone: a secret is never an ordinary variable.
///
/// One without a value is not SkyPilot's error: its server may know the value. Ours cannot.
fn read_secrets(
    fields: &mut Fields,
    overrides: &EnvOverrides,
    refused: &mut Vec<Error>,
) -> Result<Secrets> {
    let Some(node) = fields.take("secrets") else {
        return Ok((overrides.secrets().clone(), None));
    };
    let entries = match &node.value {
        Value::Mapping(entries) => entries.as_slice(),
        _ => &[],
    };
    if let Value::Sequence(items) = &node.value {
        for item in items {
            if !item
                .scalar_text()
                .is_some_and(|text| text.starts_with("secrets:"))
            {
                return Err(item.invalid("secrets", "must list names such as secrets:HF_TOKEN"));
            }
        }
        if !items.is_empty() {
            refused.push(Error::Unsupported {
                field: "secrets (a list of names kept on a server)".to_owned(),
                line: node.line,
                column: node.column,
            });
        }
    }
    let mut unfilled = None;
    let mut secrets = overrides.secrets().clone();
    for (key, value) in entries {
        let name = key.scalar_text().unwrap_or_default();
        if name.starts_with("secrets:") && !matches!(value.value, Value::Null) {
            return Err(value.invalid("secrets", "has a reference with a value; leave one out"));
        }
        match (overrides.secret(&name), value.scalar_text()) {
            (Some(given), _) => secrets.insert(name, given.clone()),
            (None, Some(text)) => secrets.insert(name, Secret::new(text)),
            (None, None) => {
                unfilled = unfilled.or(Some(Error::MissingSecret { name }));
                None
            }
        };
    }
    Ok((secrets, unfilled))
}

/// Letters and digits, with one or two of `.`, `_` and `-` between them.
pub(crate) fn is_task_name(name: &str) -> bool {
    let mut separators = 0;
    for c in name.chars() {
        match c {
            c if c.is_ascii_alphanumeric() => separators = 0,
            '.' | '_' | '-' if separators < 2 => separators += 1,
            _ => return false,
        }
    }
    separators == 0 && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

fn read_name(fields: &mut Fields) -> Result<Option<String>> {
    let Some(node) = fields.take("name") else {
        return Ok(None);
    };
    let name = node.scalar_text().unwrap_or_default();
    if !is_task_name(&name) {
        return Err(node.invalid(
            "name",
            "must be letters and digits, with single or double . _ - between them",
        ));
    }
    Ok(Some(name))
}

/// A folder; a git repository is refused.
fn read_workdir(node: &Node, refused: &mut Vec<Error>) -> Option<String> {
    let workdir = node.scalar_text();
    if workdir.is_none() {
        refused.push(Error::Unsupported {
            field: "workdir.url".to_owned(),
            line: node.line,
            column: node.column,
        });
    }
    workdir
}

fn read_inputs(node: &Node) -> Option<(String, f64)> {
    let Value::Mapping(entries) = &node.value else {
        return None;
    };
    let (key, value) = entries.first()?;
    Some((key.scalar_text()?, value.number()?))
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

#[cfg(test)]
mod tests;
