//! Why provisioning failed, by what the caller can do about it.

use std::path::PathBuf;
use std::time::Duration;

use crate::failover::Attempt;

/// A boxed cause from outside this crate.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why provisioning failed, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The task file is not YAML.
    #[error("{message}")]
    Yaml {
        /// What the YAML parser says, with line and column.
        message: String,
    },
    /// The task file has a field SkyPilot does not know.
    #[error("line {line}, column {column}: unknown field `{field}`; {hint}")]
    UnknownField {
        /// The dotted path of the field, such as `resources.gpuz`.
        field: String,
        /// Line in the file, from 1.
        line: u64,
        /// Column in the line, from 1.
        column: u64,
        /// The nearest known field, or the list of them.
        hint: String,
    },
    /// The task file has a field of SkyPilot's that Updraft does not act on yet.
    #[error(
        "line {line}, column {column}: field `{field}` is not supported by updraft; remove it, or run this task with SkyPilot"
    )]
    Unsupported {
        /// The dotted path of the field.
        field: String,
        /// Line in the file, from 1.
        line: u64,
        /// Column in the line, from 1.
        column: u64,
    },
    /// A field has a value it cannot have.
    #[error("line {line}, column {column}: `{field}` {problem}")]
    InvalidField {
        /// The dotted path of the field.
        field: String,
        /// Line in the file, from 1.
        line: u64,
        /// Column in the line, from 1.
        column: u64,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// `envs: {NAME:}` declares a variable that nobody gave a value.
    #[error(
        "environment variable `{name}` has no value; pass --env {name}=VALUE or add it to the --env-file"
    )]
    MissingEnv {
        /// The variable.
        name: String,
    },
    /// `secrets: {NAME:}` declares a secret that nobody gave a value.
    #[error(
        "secret `{name}` has no value; pass --secret {name}=VALUE or add it to the --secret-file"
    )]
    MissingSecret {
        /// The secret.
        name: String,
    },
    /// A line of an env file is not `NAME=VALUE`.
    #[error("env file line {line}: expected NAME=VALUE")]
    EnvFile {
        /// Line in the file, from 1.
        line: usize,
    },
    /// A catalogue file cannot be read.
    #[error("catalogue of {provider}, line {line}: {problem}")]
    Catalog {
        /// The provider it speaks of.
        provider: String,
        /// Line in the file, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// The task asks for something the launched resources cannot do.
    #[error("{what}")]
    InvalidTask {
        /// What is wrong with the task and what to change.
        what: String,
    },
    /// No offer satisfies the task.
    #[error("no offer satisfies the task's resources{}", skipped_list(.skipped))]
    NoOffer {
        /// Every offer that was looked at, with why it was passed over.
        skipped: Vec<String>,
    },
    /// Nothing to rent right now; another region, or later, may work.
    #[error("no capacity for {instance_type} in {region}")]
    NoCapacity {
        /// The instance type that was asked for.
        instance_type: String,
        /// The region that was asked.
        region: String,
    },
    /// The account may not have that many; ask the provider for more quota.
    #[error(
        "{provider} quota exceeded for {instance_type} in {region}; ask for a higher quota or choose another type"
    )]
    Quota {
        /// The provider.
        provider: &'static str,
        /// The instance type that was asked for.
        instance_type: String,
        /// The region that was asked.
        region: String,
    },
    /// The credentials were refused; retrying cannot help.
    #[error("{provider} refused the credentials; check them and try again")]
    Unauthenticated {
        /// The provider.
        provider: &'static str,
        /// What the provider said.
        source: BoxError,
    },
    /// The provider wants fewer calls; it may say when to come back.
    #[error("{provider} asks for fewer calls; try again in {} s", .retry_after.as_secs())]
    RateLimited {
        /// The provider.
        provider: &'static str,
        /// How long to leave it alone.
        retry_after: Duration,
    },
    /// Every candidate was tried and none could be had.
    #[error("no candidate could be launched:\n{}", attempts_table(.attempts))]
    Exhausted {
        /// What was tried, in order, and how it failed.
        attempts: Vec<Attempt>,
    },
    /// The provider did not answer, or answered with a passing fault.
    #[error("{provider} did not {operation}")]
    Unavailable {
        /// The provider.
        provider: &'static str,
        /// The verb that failed, such as `create`.
        operation: &'static str,
        /// What went wrong underneath.
        source: BoxError,
    },
    /// The launch would cost more than the caller allows.
    #[error(
        "launching this would cost {total_usd_per_hour:.2} USD/h in all, over the limit of {limit_usd_per_hour:.2}; end something first or raise the limit"
    )]
    OverBudget {
        /// What would run, with this launch.
        total_usd_per_hour: f64,
        /// What the caller allows.
        limit_usd_per_hour: f64,
    },
    /// No instance of ours has that id.
    #[error("no instance `{id}`; it may have been terminated")]
    NoSuchInstance {
        /// The id that was asked for.
        id: String,
    },
    /// No cluster of ours has that name.
    #[error("no cluster `{name}`; `status` lists those there are")]
    NoSuchCluster {
        /// The name that was asked for.
        name: String,
    },
    /// Another process works on the cluster at this moment.
    #[error("another process works on cluster `{name}`; try again when it is done")]
    Busy {
        /// The cluster.
        name: String,
    },
    /// The list of one's own machines cannot be read.
    #[error("in {}: {problem}", .path.display())]
    Hosts {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// No provider of that name is at hand.
    #[error("no provider `{name}`; this build and configuration has {known}")]
    NoSuchProvider {
        /// The name that was asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The provider cannot do that.
    #[error("{provider} cannot {verb} instances; use `down`")]
    NotCapable {
        /// The provider.
        provider: String,
        /// What was asked for, such as `stop`.
        verb: &'static str,
    },
    /// The cloud has not confirmed that an instance is gone; its row is kept.
    #[error("{instances} of cluster `{name}` are not gone yet; run `down` again")]
    NotYetTerminated {
        /// The cluster.
        name: String,
        /// How many are left.
        instances: usize,
    },
    /// A call to create was not answered, and it is too early to say that it made nothing.
    #[error(
        "{instances} of cluster `{name}` may still appear: a call to create was not answered, and {} s have not passed; run `gc` then",
        .settles.as_secs()
    )]
    Unconfirmed {
        /// The cluster.
        name: String,
        /// How many may appear.
        instances: usize,
        /// How long after the call its provider may still show them.
        settles: Duration,
    },
    /// Some nodes run and the rest could not be had. What runs has its agent, or is named as without.
    #[error(
        "cluster `{cluster}` is launched in part: {running} still run; launch it again, or take it `down`"
    )]
    LaunchedInPart {
        /// The cluster.
        cluster: String,
        /// The instances that run.
        running: String,
        /// Why the rest does not.
        source: Box<Error>,
    },
    /// Of several things to be done each was tried, and these have failed.
    #[error("could not {verb} everything; the rest is done, run it again for these:{}", problem_lines(.problems))]
    Unfinished {
        /// What was to be done, such as `end`.
        verb: &'static str,
        /// What it was to be done to, and why it was not.
        problems: Vec<String>,
    },
    /// The state file could not be read or written.
    #[error("could not use the state in {}", .path.display())]
    State {
        /// The folder of the state.
        path: PathBuf,
        /// What the database said.
        source: BoxError,
    },
    /// A command could not be started on the node.
    #[error("could not run a command on {host}")]
    Transport {
        /// The node.
        host: String,
        /// What went wrong underneath.
        source: BoxError,
    },
    /// A file or folder of ours could not be read or written.
    #[error("could not access {}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The service ended, or never answered its readiness probe.
    #[error("service did not become ready: {reason}")]
    NotReady {
        /// What was last seen, with the end of the log.
        reason: String,
    },
}

impl Error {
    /// Whether the same call may succeed when tried again a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Error::NoCapacity { .. } | Error::Unavailable { .. } | Error::RateLimited { .. }
        )
    }

    /// The error and what lies under it, in one line.
    #[cfg(feature = "state")]
    pub(crate) fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        text
    }

    #[cfg(any(feature = "local", feature = "ssh", feature = "state"))]
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}

fn attempts_table(attempts: &[Attempt]) -> String {
    let lines: Vec<_> = attempts.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

fn problem_lines(problems: &[String]) -> String {
    let lines = problems.iter().map(|problem| format!("\n  {problem}"));
    lines.collect()
}

/// What has failed of several things, as one error: the only one itself, or all of them in words.
#[cfg(feature = "state")]
pub(crate) fn unfinished(verb: &'static str, mut failed: Vec<(String, Error)>) -> Result<()> {
    match failed.len() {
        0 => Ok(()),
        1 => failed.pop().map_or(Ok(()), |(_, error)| Err(error)),
        _ => {
            let problems = failed
                .iter()
                .map(|(what, error)| format!("{what}: {}", error.with_causes()));
            Err(Error::Unfinished {
                verb,
                problems: problems.collect(),
            })
        }
    }
}

fn skipped_list(skipped: &[String]) -> String {
    if skipped.is_empty() {
        return ": the provider offers nothing".to_owned();
    }
    format!(": {}", skipped.join("; "))
}
