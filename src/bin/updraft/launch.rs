//! `launch` and `exec`: from a task file to a job that runs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use updraft::provision::agent::QueueStatus;
use updraft::provision::providers::ssh::write_alias;
use updraft::provision::{
    Accelerator, Accelerators, Alternatives, Autostop, Endpoint, Engine, EnvOverrides, ExecOptions,
    FailoverPolicy, Instance, JobId, LaunchRequest, Lease, Pipeline, Plan, Task,
    agent::AgentBinary,
};

use crate::arguments::{TaskOptions, minutes};
use crate::screen::Screen;
use crate::{JOB_CANCELLED, JOB_FAILED, Outcome, world};

/// How long `-r` waits before it begins again.
const RETRY_GAP: Duration = Duration::from_secs(60);

type Error = Box<dyn std::error::Error>;

/// Reads the task file with everything the command line says about it.
pub(crate) fn read_tasks(options: &TaskOptions) -> Result<Vec<Task>, Error> {
    let path = options.file.clone().unwrap_or_default();
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|error| format!("could not read {}: {error}", path.display()))
    };
    let mut overrides = EnvOverrides::new();
    if let Some(file) = &options.env_file {
        overrides = overrides.with_env_file(&read(file)?)?;
    }
    if let Some(file) = &options.secret_file {
        overrides = overrides.with_secret_file(&read(file)?)?;
    }
    for (name, value) in &options.envs {
        overrides = overrides.with(name, value.expose());
    }
    for (name, value) in &options.secrets {
        overrides = overrides.with_secret(name, value.expose());
    }
    let pipeline = Pipeline::from_yaml(&read(&path)?, &overrides)
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let mut tasks = pipeline.tasks;
    for task in &mut tasks {
        apply(task, options)?;
    }
    Ok(tasks)
}

/// What the command line says beats the file.
fn apply(task: &mut Task, options: &TaskOptions) -> Result<(), Error> {
    if let Some(workdir) = &options.workdir {
        task.workdir = Some(workdir.clone());
    }
    if let Some(name) = &options.name {
        task.name = Some(name.clone());
    }
    if let Some(num_nodes) = options.num_nodes {
        task.num_nodes = num_nodes;
    }
    let resources = &mut task.resources;
    if let Some(infra) = &options.infra {
        let mut parts = infra.splitn(2, '/');
        resources.cloud = parts
            .next()
            .map(str::to_lowercase)
            .filter(|cloud| cloud != "*");
        resources.region = parts.next().map(str::to_owned);
        resources.zone = None;
        resources.alternatives = Alternatives::None;
    }
    if let Some(gpus) = &options.gpus {
        let (name, count) = gpus.split_once(':').unwrap_or((gpus, "1"));
        let count = count
            .parse()
            .map_err(|_| format!("--gpus {gpus} needs a number, such as A100:8"))?;
        resources.accelerators = Accelerators::AnyOf(vec![Accelerator::new(name, count)]);
    }
    let amount = |text: &str, flag: &str| {
        let task = format!("resources: {{{flag}: {text}}}");
        let parsed = Task::from_yaml(&task, &EnvOverrides::new());
        parsed.map_err(|_| format!("--{flag} {text} must be a number such as 4, or 4+"))
    };
    if let Some(cpus) = &options.cpus {
        resources.cpus = amount(cpus, "cpus")?.resources.cpus;
    }
    if let Some(memory) = &options.memory {
        resources.memory_gib = amount(memory, "memory")?.resources.memory_gib;
    }
    resources.use_spot |= options.use_spot;
    Ok(())
}

pub(crate) async fn launch(options: TaskOptions, screen: &Screen) -> Outcome {
    let tasks = read_tasks(&options)?;
    for (index, task) in tasks.iter().enumerate() {
        for warning in task.warnings(&tasks[..index]) {
            screen.note(&format!("warning: {warning}"));
        }
    }
    if tasks.len() > 1 && options.detach {
        return Err("a pipeline of several tasks cannot be detached; leave -d out".into());
    }
    let engine = world::engine()?;
    let (first, later) = (&tasks[0], &tasks[1..]);
    let cluster = options
        .cluster
        .clone()
        .or_else(|| first.name.clone())
        .unwrap_or_else(|| "updraft".to_owned());
    if options.dryrun {
        let mut offers = world::catalog()?;
        offers = offers.merged(engine.offers().await);
        let plan = Plan::for_tasks(first, later, offers.into_offers());
        screen.say(&match options.json {
            true => plan_json(&plan).to_string(),
            false => plan.to_string(),
        });
        return Ok(if plan.candidates.is_empty() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        });
    }
    let known = engine.state().cluster(&cluster)?.is_some();
    if !known {
        let plan = Plan::for_tasks(first, later, engine.offers().await);
        if plan.candidates.is_empty() {
            return Err(updraft::provision::Error::NoOffer {
                skipped: plan
                    .skipped
                    .iter()
                    .map(ToString::to_string)
                    .chain(plan.hints)
                    .collect(),
            }
            .into());
        }
        screen.note(plan.to_string().trim_end());
        if !options.yes && !screen.agrees(&format!("launch `{cluster}` on the first of these?")) {
            return Ok(ExitCode::FAILURE);
        }
    }
    let agent = world::agent()?;
    let request = LaunchRequest {
        cluster: cluster.clone(),
        lease: lease_of(
            &options,
            tasks.iter().find_map(|task| task.resources.autostop),
        ),
        later: later.to_vec(),
        policy: FailoverPolicy {
            retry_until_up: options.retry_until_up.then_some(RETRY_GAP),
        },
    };
    screen.note(&format!("launching `{cluster}`"));
    // Each node ends by itself from the moment it runs, whatever becomes of this process.
    let instances = engine.launch_guarded(first, &request, &agent).await?;
    alias(&cluster, &instances, screen)?;
    let options_of_run = ExecOptions {
        setup: true,
        base: here()?,
    };
    let mut code = ExitCode::SUCCESS;
    for task in &tasks {
        let job = engine.exec(&cluster, task, &agent, &options_of_run).await?;
        code = after_submit(&engine, &agent, &cluster, job, &options, screen).await?;
        if code != ExitCode::SUCCESS {
            break;
        }
    }
    Ok(code)
}

/// When the cluster ends by itself: what the command line says beats the task; `None` where neither
/// says anything, which leaves a cluster that is there as it is.
///
/// As SkyPilot has it, `--down` alone ends it as soon as it is idle, and no idle time is under a minute:
/// it would end before its first job is queued.
fn lease_of(options: &TaskOptions, autostop: Option<Autostop>) -> Option<Lease> {
    let said = options.down || options.idle_minutes.is_some() || options.wait_for.is_some();
    if !said && autostop.is_none() {
        return None;
    }
    let down = options.down || autostop.is_some_and(|autostop| autostop.down);
    let idle = match (options.idle_minutes, autostop) {
        (Some(number), _) => Some(minutes(number)),
        (None, Some(autostop)) if !options.down || autostop.idle.is_some() => autostop.idle,
        (None, _) if options.down => Some(Duration::ZERO),
        (None, _) => Some(Autostop::DEFAULT_IDLE), // --wait-for alone
    };
    Some(Lease {
        idle: idle.map(|idle| idle.max(minutes(1))),
        down,
        wait_for: options
            .wait_for
            .or(autostop.map(|autostop| autostop.wait_for))
            .unwrap_or_default(),
    })
}

pub(crate) async fn exec(options: TaskOptions, screen: &Screen) -> Outcome {
    let tasks = read_tasks(&options)?;
    let [task] = tasks.as_slice() else {
        return Err("exec takes a file of one task; launch runs pipelines".into());
    };
    let cluster = options.cluster.clone().unwrap_or_default();
    let (engine, agent) = (world::engine()?, world::agent()?);
    let options_of_run = ExecOptions {
        setup: false,
        base: here()?,
    };
    let job = engine.exec(&cluster, task, &agent, &options_of_run).await?;
    after_submit(&engine, &agent, &cluster, job, &options, screen).await
}

/// Says the job's number, and follows it unless it is detached.
async fn after_submit(
    engine: &Engine,
    agent: &AgentBinary,
    cluster: &str,
    job: JobId,
    options: &TaskOptions,
    screen: &Screen,
) -> Outcome {
    if options.json {
        screen.say(&serde_json::json!({"cluster": cluster, "job_id": job.0}).to_string());
    } else {
        screen.note(&format!(
            "job {} on `{cluster}`; `updraft logs {cluster} {}` shows it",
            job.0, job.0
        ));
    }
    if options.detach {
        return Ok(ExitCode::SUCCESS);
    }
    follow(engine, agent, cluster, job, &screen.for_lines(options.json)).await
}

/// Shows a job's output to its end; the exit code is the job's. For programs each line is an object, and
/// the last says what has become of the job.
pub(crate) async fn follow(
    engine: &Engine,
    agent: &AgentBinary,
    cluster: &str,
    job: JobId,
    screen: &Screen,
) -> Outcome {
    let mut logs = engine.logs(cluster, agent, Some(job), true).await?;
    loop {
        match logs.next_line().await {
            Ok(Some(line)) => screen.line(&line),
            Ok(None) => break,
            // The job is the node's: it goes on without anybody who reads.
            Err(error) => {
                screen.note(&format!("warning: its output is cut off: {error}"));
                break;
            }
        }
    }
    let row = match logs.ended() {
        Some(row) => row.clone(),
        None => engine.wait(cluster, agent, job).await?,
    };
    let told = serde_json::json!({
        "cluster": cluster,
        "job_id": job.0,
        "status": row.status,
        "exit_code": row.exit_code,
    });
    let words = format!("job {} on `{cluster}`: {}", job.0, row.status.word());
    screen.done(screen.is_for_programs(), &told, &words);
    Ok(match row.status {
        QueueStatus::Succeeded => ExitCode::SUCCESS,
        QueueStatus::Cancelled => ExitCode::from(JOB_CANCELLED),
        _ => ExitCode::from(JOB_FAILED),
    })
}

/// A plan for programs: candidates with their first hour's price, and what was skipped.
fn plan_json(plan: &Plan) -> serde_json::Value {
    let candidates: Vec<_> = plan
        .candidates
        .iter()
        .map(|offer| serde_json::json!({"offer": offer, "first_hour_usd": plan.first_hour_usd(offer)}))
        .collect();
    let skipped: Vec<_> = plan
        .skipped
        .iter()
        .map(|skipped| serde_json::json!({"offer": skipped.offer, "reason": skipped.reason}))
        .collect();
    serde_json::json!({
        "num_nodes": plan.num_nodes,
        "candidates": candidates,
        "skipped": skipped,
        "hints": plan.hints,
    })
}

/// `ssh mycluster`, where the head is reached over ssh.
fn alias(cluster: &str, instances: &[Instance], screen: &Screen) -> Result<(), Error> {
    let head = instances
        .first()
        .and_then(|instance| instance.endpoint.as_ref());
    if let Some(Endpoint::Ssh { target, .. }) = head {
        let config = world::user_home().join(".ssh/config");
        write_alias(&world::home().join("ssh"), &config, cluster, target)?;
        screen.note(&format!("`ssh {cluster}` leads to it"));
    }
    Ok(())
}

pub(crate) fn here() -> Result<PathBuf, Error> {
    Ok(std::env::current_dir()?)
}

#[cfg(test)]
mod tests {
    use updraft::provision::WaitFor;

    use super::*;

    const HOUR: Autostop = Autostop {
        idle: Some(Duration::from_secs(3600)),
        down: false,
        wait_for: WaitFor::Jobs,
    };

    fn lease(down: bool, idle_minutes: Option<u64>, autostop: Option<Autostop>) -> Option<Lease> {
        let options = TaskOptions {
            down,
            idle_minutes,
            ..TaskOptions::default()
        };
        lease_of(&options, autostop)
    }

    #[test]
    fn a_lease_is_what_the_command_line_and_the_task_say() {
        let of = |seconds: u64, down: bool, wait_for: WaitFor| {
            Some(Lease {
                idle: Some(Duration::from_secs(seconds)),
                down,
                wait_for,
            })
        };
        assert_eq!(lease(false, None, None), None, "nothing was said");
        assert_eq!(lease(true, None, None), of(60, true, WaitFor::JobsAndSsh));
        assert_eq!(
            lease(true, Some(0), None),
            of(60, true, WaitFor::JobsAndSsh)
        );
        assert_eq!(
            lease(false, Some(9), None),
            of(540, false, WaitFor::JobsAndSsh)
        );
        assert_eq!(
            lease(false, None, Some(HOUR)),
            of(3600, false, WaitFor::Jobs)
        );
        assert_eq!(lease(true, None, Some(HOUR)), of(3600, true, WaitFor::Jobs));
        assert_eq!(
            lease(true, Some(9), Some(HOUR)),
            of(540, true, WaitFor::Jobs)
        );
        // `autostop: false` takes autostop away, unless the command line wants it.
        let never = Autostop { idle: None, ..HOUR };
        let lease_of_never = lease(false, None, Some(never)).expect("said");
        assert_eq!(lease_of_never.idle, None);
        assert_eq!(lease(true, None, Some(never)), of(60, true, WaitFor::Jobs));
    }
}
