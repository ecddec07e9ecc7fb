//! From a task to a running job: plan, create, connect, set up, run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};
use crate::failover::{Failover, FailoverPolicy, Step};
use crate::planner::{Plan, chosen};
use crate::provider::{CreateRequest, Instance, Lease, Provider};
use crate::resources::WaitFor;
use crate::secret::Secret;
#[cfg(any(feature = "local", feature = "ssh"))]
use crate::sync::{Syncer, WORKDIR, client_path, mount_files};
use crate::task::Task;
use crate::transport::{ExitStatus, HostTransport, LogLine, Process, ShellCommand};

/// How to launch.
#[derive(Debug, Clone)]
pub struct LaunchOptions {
    /// The cluster's name; launching on an existing cluster uses its instance.
    pub cluster: String,
    /// When the instance ends by itself, where its provider can see to that: without an agent on it, an
    /// idle instance is not told from a busy one.
    pub lease: Lease,
}

/// An instance that runs tasks.
#[derive(Debug, Clone)]
pub struct Cluster {
    instance: Instance,
    provider: Arc<dyn Provider>,
    transport: Arc<dyn HostTransport>,
}

/// Finds or creates the cluster's instance and connects to it.
///
/// Candidates are tried in the plan's order; one without capacity or quota gives way to the next.
///
/// # Errors
/// [`Error::NoOffer`] if nothing fits the task, with the reasons; [`Error::Exhausted`] if every
/// candidate failed, with how; [`Error::InvalidTask`] for several nodes, or a lease that the provider
/// cannot keep: for those there is the `Engine`.
pub async fn launch(
    provider: Arc<dyn Provider>,
    task: &Task,
    options: &LaunchOptions,
) -> Result<Cluster> {
    if task.num_nodes != 1 {
        let what = format!(
            "num_nodes is {}; tasks of several nodes cannot be launched yet",
            task.num_nodes
        );
        return Err(Error::InvalidTask { what });
    }
    let deadline = deadline_of(options.lease, SystemTime::now());
    let ends = match (options.lease.idle, provider.deadline()) {
        (None, _) => None,
        (Some(_), Some(power)) if deadline.is_some() => Some(power),
        _ => {
            return Err(Error::InvalidTask {
                what: format!(
                    "provider {} cannot end an idle instance by itself; launch with an `Engine`, whose agent does, or without a lease",
                    provider.name()
                ),
            });
        }
    };
    let owned = provider.list_owned(None).await?;
    let instance = match owned
        .into_iter()
        .find(|instance| instance.cluster == options.cluster)
    {
        Some(instance) => instance,
        None => create(provider.as_ref(), task, options).await?,
    };
    if let Some(power) = ends {
        power.set_deadline(&instance.id, deadline).await?;
    }
    let transport = connect(&instance)?;
    Ok(Cluster {
        instance,
        provider,
        transport,
    })
}

async fn create(provider: &dyn Provider, task: &Task, options: &LaunchOptions) -> Result<Instance> {
    if provider.guards().only_reaper() {
        tracing::warn!(
            provider = provider.name(),
            "nothing but this client ends a forgotten instance of this provider"
        );
    }
    let plan = Plan::for_task(task, provider.offers().await?);
    if plan.candidates.is_empty() {
        return Err(no_offer(&plan));
    }
    let mut failover = Failover::new(plan, FailoverPolicy::default());
    loop {
        let offer = match failover.step() {
            Step::Try(offer) => offer,
            Step::Wait(pause) => {
                tokio::time::sleep(pause).await;
                continue;
            }
            Step::GiveUp => return Err(failover.exhausted()),
        };
        let wanted = chosen(&task.resources, &offer);
        let request = CreateRequest {
            token: options.cluster.clone(),
            cluster: options.cluster.clone(),
            offer: offer.clone(),
            lease: options.lease,
            labels: wanted.labels.clone(),
            disk_size_gib: wanted.disk_size_gib,
        };
        match provider.create(&request).await {
            Ok(instance) => return Ok(instance),
            Err(error) => failover.failed(&offer, error)?,
        }
    }
}

/// When a provider may end an instance without asking its agent.
pub(crate) fn deadline_of(lease: Lease, now: SystemTime) -> Option<SystemTime> {
    let is_blind = lease.down && lease.wait_for == WaitFor::None;
    lease
        .idle
        .filter(|_| is_blind)
        .and_then(|idle| now.checked_add(idle))
}

/// The error of a plan without candidates: what was skipped and why, and what may have been meant.
pub(crate) fn no_offer(plan: &Plan) -> Error {
    let skipped = plan.skipped.iter().map(ToString::to_string);
    Error::NoOffer {
        skipped: skipped.chain(plan.hints.iter().cloned()).collect(),
    }
}

/// The way to an instance, by its endpoint.
pub(crate) fn connect(instance: &Instance) -> Result<Arc<dyn HostTransport>> {
    match &instance.endpoint {
        #[cfg(feature = "local")]
        Some(crate::provider::Endpoint::Local { dir }) => {
            Ok(Arc::new(crate::providers::local::LocalTransport::new(dir)))
        }
        #[cfg(feature = "ssh")]
        Some(crate::provider::Endpoint::Ssh { target, dir }) => Ok(Arc::new(
            crate::providers::ssh::SshTransport::new(target.clone(), dir),
        )),
        endpoint => Err(Error::Transport {
            host: instance.id.to_string(),
            source: format!("no transport for {endpoint:?} in this build").into(),
        }),
    }
}

impl Cluster {
    /// The instance.
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// The way to it.
    pub fn transport(&self) -> &Arc<dyn HostTransport> {
        &self.transport
    }

    /// Copies the task's working folder and file mounts to the instance, relative paths from this process's
    /// own folder, and starts its setup; [`Job`] goes on to its run when the setup has succeeded.
    ///
    /// # Errors
    /// [`Error::Io`] for a folder that is not there; [`Error::Transport`] if the node cannot be copied to,
    /// or cannot start a shell.
    pub async fn exec(&self, task: &Task) -> Result<Job> {
        let workdir = self.bring(task).await?;
        let mut environment = self.node_environment(task);
        environment.extend(task.environment());
        let command = |script: &Option<String>| {
            script
                .as_deref()
                .filter(|script| !script.trim().is_empty())
                .map(|script| ShellCommand {
                    script: script.to_owned(),
                    workdir: workdir.clone(),
                    environment: environment.clone(),
                })
        };
        let mut phases = Vec::new();
        phases.extend(command(&task.run).map(|run| (Phase::Run, run)));
        phases.extend(command(&task.setup).map(|setup| (Phase::Setup, setup)));
        let mut job = Job {
            transport: self.transport.clone(),
            waiting: phases,
            current: None,
            status: None,
        };
        job.start_next().await?;
        Ok(job)
    }

    /// Copies the task's files; says where its commands run.
    #[cfg(any(feature = "local", feature = "ssh"))]
    async fn bring(&self, task: &Task) -> Result<Option<String>> {
        let syncer = Syncer::new(self.instance.endpoint.clone(), self.transport.clone());
        let base = std::env::current_dir().map_err(Error::io("."))?;
        mount_files(&syncer, &base, &task.file_mounts).await?;
        let Some(workdir) = &task.workdir else {
            return Ok(None);
        };
        syncer.folder(&client_path(workdir, &base), WORKDIR).await?;
        Ok(Some(WORKDIR.to_owned()))
    }

    #[cfg(not(any(feature = "local", feature = "ssh")))]
    async fn bring(&self, _task: &Task) -> Result<Option<String>> {
        Ok(None) // nothing can be reached in this build
    }

    /// Terminates the instance and everything that runs on it.
    ///
    /// # Errors
    /// The provider's; the instance then still exists, and the call can be repeated.
    pub async fn down(&self) -> Result<()> {
        self.provider.terminate(&self.instance.id).await
    }

    /// What SkyPilot tells a job about its node.
    fn node_environment(&self, task: &Task) -> BTreeMap<String, Secret<String>> {
        let accelerators = task.resources.accelerators.choices();
        let gpus = accelerators
            .first()
            .map_or(0, |accelerator| accelerator.count);
        [
            ("SKYPILOT_NUM_NODES", "1".to_owned()),
            ("SKYPILOT_NODE_RANK", "0".to_owned()),
            ("SKYPILOT_NODE_IPS", "127.0.0.1".to_owned()),
            ("SKYPILOT_NUM_GPUS_PER_NODE", gpus.to_string()),
            ("UPDRAFT_CLUSTER", self.instance.cluster.clone()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Secret::new(value)))
        .collect()
    }
}

/// Which part of a task runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its `setup`.
    Setup,
    /// Its `run`.
    Run,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobStatus {
    /// Setup and run both exited with zero.
    Succeeded,
    /// This phase did not.
    Failed(Phase, ExitStatus),
    /// It was cancelled.
    Cancelled,
}

/// A task on a node: first its setup, then its run.
///
/// A job must be driven: [`Job::next_line`] until it returns `None`, or [`Job::wait`].
#[derive(Debug)]
pub struct Job {
    transport: Arc<dyn HostTransport>,
    /// What is still to run, last first.
    waiting: Vec<(Phase, ShellCommand)>,
    current: Option<(Phase, Process)>,
    status: Option<JobStatus>,
}

impl Job {
    /// The next line of output; `None` once the job has ended.
    ///
    /// # Errors
    /// [`Error::Transport`] if the node was lost.
    pub async fn next_line(&mut self) -> Result<Option<LogLine>> {
        while let Some((phase, process)) = &mut self.current {
            if let Some(line) = process.lines.recv().await {
                return Ok(Some(line));
            }
            let (phase, exit) = (*phase, process.control.wait().await?);
            self.current = None;
            if !exit.success() {
                self.waiting.clear();
                self.status = Some(JobStatus::Failed(phase, exit));
            } else {
                self.start_next().await?;
            }
        }
        Ok(None)
    }

    /// Drops the remaining output and waits for the end.
    ///
    /// # Errors
    /// As [`Job::next_line`].
    pub async fn wait(&mut self) -> Result<JobStatus> {
        while self.next_line().await?.is_some() {}
        Ok(self.status.unwrap_or(JobStatus::Succeeded))
    }

    /// How it ended; `None` while it runs.
    pub fn status(&self) -> Option<JobStatus> {
        match (&self.current, self.status) {
            (Some(_), _) => None,
            (None, status) => Some(status.unwrap_or(JobStatus::Succeeded)),
        }
    }

    /// Ends the job: SIGTERM, and SIGKILL to what is left after `grace`.
    ///
    /// # Errors
    /// [`Error::Transport`] if the node was lost.
    pub async fn cancel(&mut self, grace: Duration) -> Result<()> {
        self.waiting.clear();
        let Some((_, mut process)) = self.current.take() else {
            return Ok(());
        };
        // With nobody reading, a process that writes in its last moments would block for ever.
        drop(process.lines);
        process.control.end(grace).await?;
        self.status = Some(JobStatus::Cancelled);
        Ok(())
    }

    async fn start_next(&mut self) -> Result<()> {
        if let Some((phase, command)) = self.waiting.pop() {
            self.current = Some((phase, self.transport.start(&command).await?));
        }
        Ok(())
    }
}
