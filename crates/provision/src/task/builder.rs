//! Tasks written in Rust instead of YAML.

use std::collections::BTreeMap;

use super::mounts::{FileMount, MountSource};
use super::{Task, is_env_name, is_task_name};
use crate::error::{Error, Result};
use crate::resources::Resources;
use crate::secret::Secret;
use crate::service::ServiceSpec;

/// Gathers a [`Task`]; only [`TaskBuilder::build`] fails.
///
/// ```
/// use updraft_provision::{Accelerator, Accelerators, Resources, Task};
///
/// let task = Task::builder()
///     .with_name("train")
///     .with_resources(Resources {
///         accelerators: Accelerators::Ordered(vec![
///             Accelerator::new("L4", 1),
///             Accelerator::new("A100", 1),
///         ]),
///         ..Resources::default()
///     })
///     .with_env("EPOCHS", "3")
///     .with_run("python train.py --epochs $EPOCHS")
///     .build()?;
/// assert_eq!(task.num_nodes, 1);
/// # Ok::<(), updraft_provision::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct TaskBuilder {
    task: Task,
}

impl Task {
    /// A task of one node that does nothing yet.
    pub fn builder() -> TaskBuilder {
        TaskBuilder {
            task: Task {
                num_nodes: 1,
                ..Task::default()
            },
        }
    }
}

impl TaskBuilder {
    /// Names the task.
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.task.name = Some(name.into());
        self
    }

    /// The folder whose contents the commands see.
    pub fn with_workdir(mut self, workdir: impl Into<String>) -> Self {
        self.task.workdir = Some(workdir.into());
        self
    }

    /// Commands that prepare the node.
    pub fn with_setup(mut self, setup: impl Into<String>) -> Self {
        self.task.setup = Some(setup.into());
        self
    }

    /// Commands that do the work.
    pub fn with_run(mut self, run: impl Into<String>) -> Self {
        self.task.run = Some(run.into());
        self
    }

    /// One environment variable.
    pub fn with_env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.task.envs.insert(name.into(), value.into());
        self
    }

    /// One environment variable that is never printed.
    pub fn with_secret(mut self, name: impl Into<String>, value: Secret<String>) -> Self {
        self.task.secrets.insert(name.into(), value);
        self
    }

    /// Puts a local file or folder, or the contents of a bucket's URL, at `target`.
    pub fn with_file_mount(mut self, target: impl Into<String>, source: &str) -> Self {
        self.task.file_mounts.push(FileMount {
            target: target.into(),
            source: MountSource::of(source),
        });
        self
    }

    /// What a node must offer.
    pub fn with_resources(mut self, resources: Resources) -> Self {
        self.task.resources = resources;
        self
    }

    /// How many nodes run the task.
    pub fn with_num_nodes(mut self, num_nodes: u32) -> Self {
        self.task.num_nodes = num_nodes;
        self
    }

    /// Makes the task a service.
    pub fn with_service(mut self, service: ServiceSpec) -> Self {
        self.task.service = Some(service);
        self
    }

    /// Checks what YAML's reader would have checked.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] for a name, a variable or a number of nodes that cannot be.
    pub fn build(self) -> Result<Task> {
        let task = self.task;
        let wrong = |what: String| Err(Error::InvalidTask { what });
        if let Some(name) = task.name.as_deref().filter(|name| !is_task_name(name)) {
            return wrong(format!(
                "task name `{name}` must be letters and digits, with single or double . _ - between them"
            ));
        }
        let names: BTreeMap<_, _> = task.environment();
        if let Some(name) = names.keys().find(|name| !is_env_name(name)) {
            return wrong(format!(
                "variable name `{name}` must be letters, digits and _, not beginning with a digit"
            ));
        }
        if task.num_nodes == 0 {
            return wrong("num_nodes must be at least 1".to_owned());
        }
        Ok(task)
    }
}
