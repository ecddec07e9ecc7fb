//! Powers that only some providers have, each found by a method of [`Provider`](crate::Provider).

use std::time::SystemTime;

use async_trait::async_trait;

use crate::error::Result;
use crate::provider::{Instance, InstanceId};

/// Stopping an instance without losing its files.
///
/// # Contract
/// - Both verbs are idempotent, and [`Error::NoSuchInstance`](crate::Error::NoSuchInstance) for an
///   instance that is gone.
/// - A stopped instance runs nothing, is still listed, and is
///   [`InstanceState::Stopped`](crate::InstanceState::Stopped).
#[async_trait]
pub trait StopStart: Send + Sync {
    /// Ends everything that runs on the instance and keeps its files.
    async fn stop(&self, id: &InstanceId) -> Result<()>;

    /// Lets it run again.
    async fn start(&self, id: &InstanceId) -> Result<Instance>;
}

/// Renting machines that the provider may take back.
///
/// # Contract
/// - `was_preempted` is true for an instance that the provider took back, and stays true for at
///   least an hour. It is false for one that runs, that was ended by anybody else, or that never was.
#[async_trait]
pub trait SpotMarket: Send + Sync {
    /// Whether the provider has taken the instance back.
    async fn was_preempted(&self, id: &InstanceId) -> Result<bool>;
}

/// Letting the net reach an instance, where the provider keeps it out.
///
/// # Contract
/// - Idempotent: the same port twice is the same address.
/// - [`Error::NoSuchInstance`](crate::Error::NoSuchInstance) for an instance that is gone.
#[async_trait]
pub trait Ports: Send + Sync {
    /// Opens a port of the instance; says under which `host:port` it is reached.
    async fn expose(&self, id: &InstanceId, port: u16) -> Result<String>;
}

/// Ending an instance at a time, whether or not its owner or its agent still lives.
///
/// # Contract
/// - The last call counts; `None` takes the deadline away.
/// - Once it has passed, the instance is ended as by
///   [`terminate`](crate::Provider::terminate).
/// - [`Error::NoSuchInstance`](crate::Error::NoSuchInstance) for an instance that is gone.
#[async_trait]
pub trait Deadline: Send + Sync {
    /// Sets when the provider ends the instance.
    async fn set_deadline(&self, id: &InstanceId, at: Option<SystemTime>) -> Result<()>;
}
