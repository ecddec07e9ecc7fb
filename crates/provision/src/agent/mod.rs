//! The node's agent: a queue of jobs, their logs, and the node's own end when it is idle.
//!
//! One process per node, [`Agent::run`], owns the queue in a folder. Everything else is a short
//! command in the same folder ([`command`]), run over a [`HostTransport`](crate::HostTransport) by
//! [`AgentClient`]: there is no credential on the node, and no port where it is alone. The agents of a
//! cluster of several nodes speak to its head's, so that none ends while another works.
//!
//! A job outlives the agent. Its wrapper claims the job's folder, records its process group and
//! leaves the outcome in a file, so that an agent that was killed finds everything as it was.

mod binary;
mod client;
mod command;
mod idle;
mod peers;
mod queue;
mod runner;
mod wrapper;

pub use binary::AgentBinary;
pub use client::{AgentClient, JobLogs, NodeSetup};
pub use command::command;
pub use peers::{Head, Place};
pub use queue::{JobRow, JobSpec, Queue, QueueStatus};
pub use runner::Agent;
