#![doc = include_str!("../README.md")]

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(any(feature = "agent", feature = "ssh"))]
mod boot;
mod budget;
mod capability;
mod catalog;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
#[cfg(feature = "state")]
mod engine;
mod error;
mod failover;
mod fake;
#[cfg(any(feature = "local", feature = "agent"))]
#[cfg_attr(
    not(feature = "local"),
    expect(
        dead_code,
        reason = "the agent alone looks and signals, and records nothing"
    )
)]
mod groups;
mod launch;
mod offer;
mod planner;
mod provider;
pub mod providers;
mod resources;
mod retry;
mod secret;
pub mod service;
#[cfg(any(feature = "agent", feature = "local", feature = "ssh"))]
mod shell;
#[cfg(feature = "state")]
mod state;
#[cfg(any(feature = "local", feature = "ssh"))]
mod sync;
mod task;
mod transport;

pub use budget::Budget;
pub use capability::{Deadline, Ports, SpotMarket, StopStart};
pub use catalog::Catalog;
#[cfg(all(feature = "agent", any(feature = "local", feature = "ssh")))]
pub use engine::{ClusterLogs, ExecOptions, JobId};
#[cfg(feature = "state")]
pub use engine::{ClusterReport, CostLine, Engine, LaunchRequest};
pub use error::{BoxError, Error, Result};
pub use failover::{Attempt, Failover, FailoverPolicy, Step};
pub use fake::{Fake, Fault};
pub use launch::{Cluster, Job, JobStatus, LaunchOptions, Phase, launch};
pub use offer::Offer;
pub use planner::{Plan, Skipped, plan};
pub use provider::{
    CreateRequest, Endpoint, Guards, Instance, InstanceId, InstanceState, Lease, Provider,
    SshTarget,
};
pub use resources::{
    Accelerator, Accelerators, Alternatives, Amount, Autostop, Resources, WaitFor,
};
pub use retry::{Backoff, Retry};
pub use secret::Secret;
#[cfg(feature = "service")]
pub use service::wait_ready;
pub use service::{
    LoadBalancing, ProbeOutcome, ProbeState, ProbeVerdict, ReadinessProbe, ServiceSpec,
};
#[cfg(feature = "state")]
pub use state::{ClusterRow, ClusterStatus, NodeRow, NodeState, State};
#[cfg(any(feature = "local", feature = "ssh"))]
pub use sync::{Syncer, mount_files};
pub use task::{EnvOverrides, FileMount, MountSource, Pipeline, Task, TaskBuilder, Warning};
pub use transport::{
    ExitStatus, Forward, HostTransport, LogLine, LogStream, Process, ProcessControl, ShellCommand,
};
