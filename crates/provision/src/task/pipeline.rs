//! A file of several documents: tasks that run one after the other.

use super::env::EnvOverrides;
use super::node::{Node, Value};
use super::{Task, surface};
use crate::error::Result;

/// The tasks of a file, in the order they run.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// The name in the header, or the only task's.
    pub name: Option<String>,
    /// At least one task.
    pub tasks: Vec<Task>,
}

impl Pipeline {
    /// Parses a file of one or several documents; the first may be a header with only a name.
    ///
    /// ```
    /// use updraft_provision::{EnvOverrides, Pipeline};
    ///
    /// let file = "name: both\n---\nname: a\nrun: echo a\n---\nname: b\nrun: echo b\n";
    /// let pipeline = Pipeline::from_yaml(file, &EnvOverrides::new())?;
    /// assert_eq!(pipeline.tasks.len(), 2);
    /// # Ok::<(), updraft_provision::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Task::from_yaml`], with positions in the whole file.
    pub fn from_yaml(text: &str, overrides: &EnvOverrides) -> Result<Self> {
        let mut documents = Node::parse_documents(text)?;
        let header = match documents.first() {
            Some(first) if surface::is_header(&first.keys()) => Some(documents.remove(0)),
            _ => None,
        };
        documents.retain(|document| !matches!(document.value, Value::Null));
        let name = header
            .as_ref()
            .and_then(|header| header.text_map().remove("name"));
        if let Some(execution) = header.as_ref().and_then(|header| header.get("execution"))
            && execution.scalar_text().as_deref() != Some("serial")
        {
            return Err(execution.invalid(
                "execution",
                "must be serial; groups of parallel jobs are not supported",
            ));
        }
        if documents.is_empty() {
            let task = Task {
                name: name.clone(),
                num_nodes: 1,
                ..Task::default()
            };
            return Ok(Self {
                name,
                tasks: vec![task],
            });
        }
        let tasks = documents
            .into_iter()
            .map(|document| Task::from_node(document, overrides))
            .collect::<Result<Vec<_>>>()?;
        let only = (tasks.len() == 1).then(|| tasks[0].name.clone()).flatten();
        Ok(Self {
            name: name.or(only),
            tasks,
        })
    }
}
