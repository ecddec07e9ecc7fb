//! The command line, read into one value.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;
use updraft::provision::{Lease, Secret, WaitFor};

pub(crate) const USAGE: &str = "\
usage: updraft VERB [OPTIONS]

clusters and jobs
  launch [-c NAME] [-n NAME] [-d] [-i MIN] [--down] [--wait-for WHAT] [-y] [-r] [--dryrun] TASK.yaml
  exec CLUSTER TASK.yaml [-n NAME] [-d]    queue a task on a cluster
  queue CLUSTER                            its jobs
  logs CLUSTER [JOB] [--no-follow]         a job's output, the newest's without a number
  cancel CLUSTER JOB | --all
  status [-r|--refresh]                    clusters
  stop|start|down [-y] CLUSTER...          `down --purge` forgets machines that are gone for good
  autostop CLUSTER [-i MIN] [--down] [--cancel] [--wait-for jobs_and_ssh|jobs|none]

services
  serve up -n NAME [--port PORT] [-d] SERVICE.yaml   also where its process has died
  serve update NAME SERVICE.yaml
  serve status
  serve down [-y] NAME...

the rest
  check          which providers can be used
  gpus           accelerators and their prices
  cost-report    what clusters have cost
  gc             end what is ours and forgotten
  completions bash|zsh|fish

options of launch, exec and serve up
  --workdir DIR  --env NAME=VALUE  --env-file FILE  --secret NAME=VALUE  --secret-file FILE
  --infra CLOUD[/REGION]  --gpus NAME:COUNT  --cpus N[+]  --memory N[+]  --num-nodes N  --use-spot
everywhere
  -o json        answers for programs: one document on standard output, or one a line where a job's
                 output is followed or several names are given; everything else on standard error

exit codes: 0 done, 1 failed, 2 bad command line, 100 the job failed, 103 the job was cancelled
";

#[derive(Debug, Default, Clone)]
pub(crate) struct TaskOptions {
    pub(crate) file: Option<PathBuf>,
    pub(crate) cluster: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) detach: bool,
    pub(crate) idle_minutes: Option<u64>,
    pub(crate) wait_for: Option<WaitFor>,
    pub(crate) down: bool,
    pub(crate) yes: bool,
    pub(crate) dryrun: bool,
    pub(crate) retry_until_up: bool,
    pub(crate) json: bool,
    pub(crate) workdir: Option<String>,
    pub(crate) envs: Vec<(String, Secret<String>)>,
    pub(crate) env_file: Option<PathBuf>,
    pub(crate) secrets: Vec<(String, Secret<String>)>,
    pub(crate) secret_file: Option<PathBuf>,
    pub(crate) infra: Option<String>,
    pub(crate) gpus: Option<String>,
    pub(crate) cpus: Option<String>,
    pub(crate) memory: Option<String>,
    pub(crate) num_nodes: Option<u32>,
    pub(crate) use_spot: bool,
    pub(crate) port: Option<u16>,
}

#[derive(Debug)]
pub(crate) enum Command {
    Help,
    Version,
    Completions(String),
    Launch(Box<TaskOptions>),
    Exec(Box<TaskOptions>),
    Queue {
        cluster: String,
        json: bool,
    },
    Logs {
        cluster: String,
        job: Option<i64>,
        follow: bool,
        json: bool,
    },
    Cancel {
        cluster: String,
        job: Option<i64>,
        json: bool,
    },
    Autostop {
        cluster: String,
        lease: Lease,
        json: bool,
    },
    Status {
        refresh: bool,
        json: bool,
    },
    Stop(Vec<String>, bool),
    Start(Vec<String>, bool),
    Down {
        clusters: Vec<String>,
        purge: bool,
        yes: bool,
        json: bool,
    },
    Check {
        json: bool,
    },
    Gpus {
        json: bool,
    },
    CostReport {
        json: bool,
    },
    Gc {
        json: bool,
    },
    ServeUp(Box<TaskOptions>),
    ServeUpdate(Box<TaskOptions>),
    ServeStatus {
        json: bool,
    },
    ServeDown {
        names: Vec<String>,
        yes: bool,
        json: bool,
    },
    /// The process behind a service; `serve up` starts it.
    ServeRun(String),
    /// The node's agent; clients call it on nodes.
    Agent(Vec<String>),
}

/// Everything after a verb; each verb takes what it knows.
#[derive(Debug, Default)]
struct Rest {
    values: Vec<String>,
    task: TaskOptions,
    all: bool,
    cancel: bool,
    follow: bool,
    refresh: bool,
    purge: bool,
    /// The flags that were given, by their long names.
    flags: Vec<&'static str>,
}

/// Every verb, so that an unknown one is told before its flags are.
const VERBS: [&str; 21] = [
    "launch",
    "exec",
    "queue",
    "logs",
    "cancel",
    "status",
    "stop",
    "start",
    "down",
    "autostop",
    "check",
    "gpus",
    "show-gpus",
    "cost-report",
    "gc",
    "completions",
    "serve up",
    "serve update",
    "serve status",
    "serve down",
    "serve run",
];

/// What tasks are told by `launch`, `exec` and `serve`.
const TASK_FLAGS: [&str; 15] = [
    "name",
    "detach-run",
    "yes",
    "output",
    "workdir",
    "env",
    "env-file",
    "secret",
    "secret-file",
    "infra",
    "gpus",
    "cpus",
    "memory",
    "num-nodes",
    "use-spot",
];

/// Whether a verb knows a flag: one that means nothing to it may be taken for one that keeps it from
/// doing something.
fn knows(verb: &str, flag: &str) -> bool {
    let own: &[&str] = match verb {
        "launch" => &[
            "cluster",
            "idle-minutes-to-autostop",
            "down",
            "wait-for",
            "dryrun",
            "r",
            "retry-until-up",
        ],
        "exec" => &["cluster"],
        "logs" => &["output", "follow", "no-follow"],
        "cancel" => &["output", "all", "yes"],
        "autostop" => &[
            "output",
            "idle-minutes-to-autostop",
            "down",
            "cancel",
            "wait-for",
            "yes",
        ],
        "status" => &["output", "refresh", "r"],
        "stop" | "start" | "serve down" => &["output", "yes"],
        "down" => &["output", "yes", "purge"],
        "queue" | "check" | "cost-report" | "gc" | "serve status" => &["output"],
        "gpus" | "show-gpus" => &["output", "all"],
        "serve up" => &["port"],
        _ => &[],
    };
    let is_of_task = matches!(verb, "launch" | "exec" | "serve up" | "serve update");
    own.contains(&flag) || is_of_task && TASK_FLAGS.contains(&flag)
}

/// The long name of a flag.
fn flag_of(argument: &lexopt::Arg<'_>) -> Option<&'static str> {
    Some(match argument {
        Short('c') | Long("cluster") => "cluster",
        Short('n') | Long("name" | "service-name") => "name",
        Short('d') | Long("detach-run") => "detach-run",
        Short('i') | Long("idle-minutes-to-autostop" | "idle-minutes") => {
            "idle-minutes-to-autostop"
        }
        Long("down") => "down",
        Short('y') | Long("yes") => "yes",
        Long("dryrun") => "dryrun",
        Short('r') => "r",
        Long("retry-until-up") => "retry-until-up",
        Long("refresh") => "refresh",
        Short('o') | Long("output") => "output",
        Long("workdir") => "workdir",
        Long("env") => "env",
        Long("env-file") => "env-file",
        Long("secret") => "secret",
        Long("secret-file") => "secret-file",
        Long("infra" | "cloud") => "infra",
        Long("gpus") => "gpus",
        Long("cpus") => "cpus",
        Long("memory") => "memory",
        Long("num-nodes") => "num-nodes",
        Long("use-spot") => "use-spot",
        Long("port") => "port",
        Short('a') | Long("all") => "all",
        Long("cancel") => "cancel",
        Short('f') | Long("follow") => "follow",
        Long("no-follow") => "no-follow",
        Long("wait-for") => "wait-for",
        Long("purge") => "purge",
        _ => return None,
    })
}

impl Command {
    /// Reads a command line whose first word is the program.
    pub(crate) fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, lexopt::Error> {
        let mut parser = lexopt::Parser::from_iter(args);
        let verb = match parser.next()? {
            None | Some(Short('h') | Long("help")) => return Ok(Command::Help),
            Some(Short('V') | Long("version")) => return Ok(Command::Version),
            Some(Value(verb)) => verb.string()?,
            Some(other) => return Err(other.unexpected()),
        };
        if verb == "agent" {
            let words = parser.raw_args()?.map(OsString::into_string);
            let words: Result<Vec<_>, _> = words.collect();
            return words
                .map(Command::Agent)
                .map_err(|_| "words of the agent must be UTF-8".into());
        }
        let verb = match verb.as_str() {
            "serve" => format!("serve {}", parser.value()?.string()?),
            _ => verb,
        };
        let Some(rest) = Rest::read(&mut parser)? else {
            return Ok(Command::Help);
        };
        rest.into_command(&verb)
    }
}

impl Rest {
    /// `None` when help is asked for.
    fn read(parser: &mut lexopt::Parser) -> Result<Option<Self>, lexopt::Error> {
        let mut rest = Rest {
            follow: true,
            ..Rest::default()
        };
        let task = &mut rest.task;
        while let Some(argument) = parser.next()? {
            let Some(flag) = flag_of(&argument) else {
                match argument {
                    Short('h') | Long("help") => return Ok(None),
                    Value(value) => rest.values.push(value.string()?),
                    other => return Err(other.unexpected()),
                }
                continue;
            };
            rest.flags.push(flag);
            match flag {
                "cluster" => task.cluster = Some(parser.value()?.string()?),
                "name" => task.name = Some(parser.value()?.string()?),
                "detach-run" => task.detach = true,
                "idle-minutes-to-autostop" => task.idle_minutes = Some(parser.value()?.parse()?),
                "down" => task.down = true,
                "yes" => task.yes = true,
                "dryrun" => task.dryrun = true,
                // `launch -r` retries, `status -r` asks again: SkyPilot's letters.
                "r" => (task.retry_until_up, rest.refresh) = (true, true),
                "retry-until-up" => task.retry_until_up = true,
                "refresh" => rest.refresh = true,
                "output" => match parser.value()?.string()?.as_str() {
                    "json" => task.json = true,
                    "table" | "text" => task.json = false,
                    other => return Err(format!("-o knows json and text, not {other}").into()),
                },
                "workdir" => task.workdir = Some(parser.value()?.string()?),
                "env" => task.envs.push(pair(&parser.value()?.string()?, "--env")?),
                "env-file" => task.env_file = Some(parser.value()?.into()),
                "secret" => task
                    .secrets
                    .push(pair(&parser.value()?.string()?, "--secret")?),
                "secret-file" => task.secret_file = Some(parser.value()?.into()),
                "infra" => task.infra = Some(parser.value()?.string()?),
                "gpus" => task.gpus = Some(parser.value()?.string()?),
                "cpus" => task.cpus = Some(parser.value()?.string()?),
                "memory" => task.memory = Some(parser.value()?.string()?),
                "num-nodes" => task.num_nodes = Some(parser.value()?.parse()?),
                "use-spot" => task.use_spot = true,
                "port" => task.port = Some(parser.value()?.parse()?),
                "all" => rest.all = true,
                "cancel" => rest.cancel = true,
                "follow" => rest.follow = true,
                "no-follow" => rest.follow = false,
                "wait-for" => task.wait_for = Some(wait_for(&parser.value()?.string()?)?),
                _ => rest.purge = true,
            }
        }
        Ok(Some(rest))
    }

    fn into_command(mut self, verb: &str) -> Result<Command, lexopt::Error> {
        let (json, yes) = (self.task.json, self.task.yes);
        if VERBS.contains(&verb)
            && let Some(flag) = self.flags.iter().find(|flag| !knows(verb, flag))
        {
            let dashes = if flag.len() == 1 { "-" } else { "--" };
            return Err(format!("`{verb}` does not know {dashes}{flag}").into());
        }
        let command = match verb {
            "launch" => {
                self.task.file = Some(self.value("a task file")?.into());
                Command::Launch(Box::new(std::mem::take(&mut self.task)))
            }
            "exec" => {
                if self.task.cluster.is_none() {
                    self.task.cluster = Some(self.value("a cluster")?);
                }
                self.task.file = Some(self.value("a task file")?.into());
                Command::Exec(Box::new(std::mem::take(&mut self.task)))
            }
            "queue" => Command::Queue {
                cluster: self.value("a cluster")?,
                json,
            },
            "logs" => Command::Logs {
                cluster: self.value("a cluster")?,
                job: self.job()?,
                follow: self.follow,
                json,
            },
            "cancel" => {
                let cluster = self.value("a cluster")?;
                let job = self.job()?;
                if job.is_none() != self.all {
                    return Err("cancel needs the number of a job, or --all".into());
                }
                Command::Cancel { cluster, job, json }
            }
            "autostop" => Command::Autostop {
                cluster: self.value("a cluster")?,
                lease: Lease {
                    idle: match self.cancel {
                        true => None,
                        false => Some(minutes(self.task.idle_minutes.unwrap_or(5))),
                    },
                    down: self.task.down,
                    wait_for: self.task.wait_for.unwrap_or_default(),
                },
                json,
            },
            "status" => Command::Status {
                refresh: self.refresh,
                json,
            },
            "stop" => Command::Stop(self.many("a cluster")?, json),
            "start" => Command::Start(self.many("a cluster")?, json),
            "down" => Command::Down {
                clusters: self.many("a cluster")?,
                purge: self.purge,
                yes,
                json,
            },
            "check" => Command::Check { json },
            "gpus" | "show-gpus" => {
                self.values.retain(|word| word != "list");
                Command::Gpus { json }
            }
            "cost-report" => Command::CostReport { json },
            "gc" => Command::Gc { json },
            "completions" => Command::Completions(self.value("bash, zsh or fish")?),
            "serve up" => {
                self.task.file = Some(self.value("a service file")?.into());
                Command::ServeUp(Box::new(std::mem::take(&mut self.task)))
            }
            "serve update" => {
                if self.task.name.is_none() {
                    self.task.name = Some(self.value("a service's name")?);
                }
                self.task.file = Some(self.value("a service file")?.into());
                Command::ServeUpdate(Box::new(std::mem::take(&mut self.task)))
            }
            "serve status" => Command::ServeStatus { json },
            "serve down" => Command::ServeDown {
                names: self.many("a service's name")?,
                yes,
                json,
            },
            "serve run" => Command::ServeRun(self.value("a service's name")?),
            other => return Err(format!("unknown verb `{other}`").into()),
        };
        match self.values.first() {
            Some(word) => Err(format!("`{word}` is one word too many").into()),
            None => Ok(command),
        }
    }

    fn value(&mut self, what: &str) -> Result<String, lexopt::Error> {
        match self.values.is_empty() {
            true => Err(format!("{what} is missing").into()),
            false => Ok(self.values.remove(0)),
        }
    }

    fn many(&mut self, what: &str) -> Result<Vec<String>, lexopt::Error> {
        let first = self.value(what)?;
        Ok(std::iter::once(first)
            .chain(self.values.drain(..))
            .collect())
    }

    fn job(&mut self) -> Result<Option<i64>, lexopt::Error> {
        match self.values.is_empty() {
            true => Ok(None),
            false => {
                let word = self.values.remove(0);
                let number = word
                    .parse()
                    .map_err(|_| format!("`{word}` is not the number of a job"))?;
                Ok(Some(number))
            }
        }
    }
}

pub(crate) fn minutes(number: u64) -> Duration {
    Duration::from_secs(number.saturating_mul(60))
}

fn wait_for(word: &str) -> Result<WaitFor, lexopt::Error> {
    match word {
        "jobs_and_ssh" => Ok(WaitFor::JobsAndSsh),
        "jobs" => Ok(WaitFor::Jobs),
        "none" => Ok(WaitFor::None),
        other => Err(format!("--wait-for knows jobs_and_ssh, jobs and none, not {other}").into()),
    }
}

/// `NAME=VALUE`, or `NAME` for the value of this process; a secret's value is not repeated.
fn pair(text: &str, flag: &str) -> Result<(String, Secret<String>), lexopt::Error> {
    let hidden = |name: &str, value: &str| (name.to_owned(), Secret::new(value.to_owned()));
    match text.split_once('=') {
        Some((name, value)) => Ok(hidden(name, value)),
        None => match std::env::var(text) {
            Ok(value) => Ok(hidden(text, &value)),
            Err(_) => Err(format!(
                "{flag} needs NAME=VALUE, or the name of a variable that is set"
            )
            .into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Command, lexopt::Error> {
        let words = std::iter::once("updraft").chain(line.split_whitespace());
        Command::read(words.map(OsString::from))
    }

    /// The lines of the two articles, with `updraft` in place of `sky`.
    #[test]
    fn the_articles_lines_are_understood() {
        let Ok(Command::Launch(options)) = read("launch -c mycluster skypilot.yaml") else {
            panic!("launch");
        };
        assert_eq!(options.cluster.as_deref(), Some("mycluster"));
        let Ok(Command::Launch(options)) = read("launch -d -c mycluster cluster.yaml -i 10 --down")
        else {
            panic!("launch");
        };
        assert_eq!(
            (options.detach, options.idle_minutes, options.down),
            (true, Some(10), true)
        );
        let line = "launch -n test allatonce.yaml --env-file .env --workdir . -i 15 --down";
        let Ok(Command::Launch(options)) = read(line) else {
            panic!("launch");
        };
        assert_eq!(options.workdir.as_deref(), Some("."));
        assert!(
            matches!(read("exec mycluster task.yaml -d"), Ok(Command::Exec(options)) if options.detach)
        );
        assert!(matches!(read("status"), Ok(Command::Status { .. })));
        assert!(
            matches!(read("down mycluster"), Ok(Command::Down { clusters, .. }) if clusters == ["mycluster"])
        );
        let line = "serve up -n mymodel service.yaml --env-file .env";
        assert!(
            matches!(read(line), Ok(Command::ServeUp(options)) if options.name.as_deref() == Some("mymodel"))
        );
        assert!(matches!(
            read("serve down mymodel"),
            Ok(Command::ServeDown { .. })
        ));
    }

    #[test]
    fn every_verb_keeps_its_own_flags() {
        for line in [
            "launch t.yaml -r --dryrun --wait-for jobs -o json",
            "status -r -o json",
            "down c -y --purge",
            "logs c 1 --no-follow",
            "cancel c --all -y",
            "serve up t.yaml --port 30002 -d --secret A=b",
            "serve update s t.yaml --env A=b --infra local",
            "gpus list -a",
        ] {
            assert!(read(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn what_cannot_be_understood_is_an_error() {
        for line in [
            "fly",
            "launch",
            "exec c",
            "queue",
            "cancel c",
            "cancel c 1 --all",
            "logs c x",
            "serve",
            "serve dance",
            "status extra",
            "launch t.yaml -o xml",
            "autostop c --wait-for dinner",
            "down c --dryrun",
            "stop c --purge",
            "status -i 5",
            "queue c --all",
            "serve down s --env A=b",
            "launch t.yaml --secret NOT_SET_ANYWHERE",
        ] {
            assert!(read(line).is_err(), "{line}");
        }
    }
}
