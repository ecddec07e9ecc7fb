//! What a task file says and cannot mean: traps that cost money without being errors.

use std::fmt;
use std::time::Duration;

use super::Task;

/// A trap in a task file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// The service's probe gives up before a model of any size has loaded.
    ShortInitialDelay {
        /// The task's `initial_delay_seconds`.
        delay: Duration,
    },
    /// The service reads a path that neither its mounts nor its own commands write.
    NobodyWrites {
        /// The path as the task's `run` names it.
        path: String,
    },
    /// The service's port is not the one its resources open.
    PortNotOpened {
        /// The port of `service.ports`.
        port: u16,
    },
}

/// A loading replica needs at least this long before a failed probe may end it.
const SHORT: Duration = Duration::from_secs(60);

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warning::ShortInitialDelay { delay } => write!(
                f,
                "initial_delay_seconds is {}: it is all the time a replica has to load before it is ended, so a loading model is killed; leave it out for 1200",
                delay.as_secs_f64()
            ),
            Warning::NobodyWrites { path } => write!(
                f,
                "the service reads `{path}`, which nothing in this task or in the pipeline before it writes; check the path against what the training task writes"
            ),
            Warning::PortNotOpened { port } => write!(
                f,
                "service.ports is {port}, which resources.ports does not open; add it there"
            ),
        }
    }
}

impl Task {
    /// The traps of this task; `earlier` are the tasks that have written before it runs.
    pub fn warnings(&self, earlier: &[Task]) -> Vec<Warning> {
        let Some(service) = &self.service else {
            return Vec::new();
        };
        let mut warnings = Vec::new();
        let delay = service.readiness_probe.initial_delay;
        if delay < SHORT {
            warnings.push(Warning::ShortInitialDelay { delay });
        }
        if let Some(port) = service
            .port
            .filter(|port| !self.resources.ports.is_empty() && !self.resources.ports.contains(port))
        {
            warnings.push(Warning::PortNotOpened { port });
        }
        let run = self.run.as_deref().unwrap_or_default();
        for path in model_paths(run) {
            if !self.writes(&path) && !earlier.iter().any(|task| task.writes(&path)) {
                warnings.push(Warning::NobodyWrites { path });
            }
        }
        warnings
    }

    /// Whether this task has a mount at the path, or its commands name it other than to serve it.
    fn writes(&self, path: &str) -> bool {
        let mounted = self.file_mounts.iter().any(|mount| {
            let target = mount.target.trim_end_matches('/');
            path == target || path.starts_with(&format!("{target}/"))
        });
        let commands = [self.setup.as_deref(), self.run.as_deref()];
        let named = commands.into_iter().flatten().any(|script| {
            joined_lines(script).iter().any(|line| {
                line.contains(path) && !model_paths(line).iter().any(|model| model == path)
            })
        });
        mounted || named
    }
}

/// The local paths given to a server as `--model` in a script: with a `~` or `$HOME` in front.
fn model_paths(script: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for line in joined_lines(script) {
        let words: Vec<&str> = line.split_whitespace().collect();
        for (index, word) in words.iter().enumerate() {
            let value = match *word {
                "--model" | "--model-path" => words.get(index + 1).copied(),
                "serve" if index > 0 && words[index - 1].ends_with("vllm") => {
                    words.get(index + 1).copied()
                }
                word => word
                    .strip_prefix("--model=")
                    .or_else(|| word.strip_prefix("--model-path=")),
            };
            let is_local = |path: &&str| {
                ["~/", "/", "$HOME/", "${HOME}/"]
                    .iter()
                    .any(|home| path.trim_matches(['"', '\'']).starts_with(home))
            };
            if let Some(path) = value.filter(is_local) {
                paths.push(path.trim_matches(['"', '\'']).to_owned());
            }
        }
    }
    paths
}

/// The lines of a script, those that end in a backslash joined to the next.
fn joined_lines(script: &str) -> Vec<String> {
    script
        .replace("\\\n", " ")
        .lines()
        .map(str::to_owned)
        .collect()
}
