//! The trait behind which every cloud, and this machine, rents out instances.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;

use serde::{Deserialize, Serialize};

use crate::capability::{Deadline, Ports, SpotMarket, StopStart};
use crate::error::Result;
use crate::offer::Offer;
use crate::resources::WaitFor;

/// A place that rents out instances.
///
/// # Contract
/// - `create` is idempotent in [`CreateRequest::token`]: the same token twice is one instance, also
///   when the first call's answer was lost.
/// - What `create` made is in `list_owned` until the provider confirms that it is gone, and nothing
///   else is: instances of other owners are never listed, nor terminated.
/// - `list_owned` near an offer has every instance that was created from it, or fails: what it
///   leaves out is gone, unless it is younger than [`Provider::settles`]. Without an offer it may
///   leave out places that cannot be reached now.
/// - An instance keeps the labels it was created with. Its disk is at least as large as asked for: an offer
///   says what it has, or a disk is made to order.
/// - `terminate` is idempotent, also for instances that never were: absent is success.
/// - `describe` of an absent instance is [`Error::NoSuchInstance`](crate::Error::NoSuchInstance).
/// - Errors say what the caller can do; see [`Error::is_retryable`](crate::Error::is_retryable).
#[async_trait]
pub trait Provider: fmt::Debug + Send + Sync {
    /// The name task files use for it, in lower case.
    fn name(&self) -> &'static str;

    /// The guards against a forgotten bill that stand without the client.
    fn guards(&self) -> Guards;

    /// How long after a call to create its instance may be missing from [`Provider::list_owned`] and
    /// [`Provider::describe`]: until then an empty answer proves nothing.
    fn settles(&self) -> Duration;

    /// Everything that could be created now.
    async fn offers(&self) -> Result<Vec<Offer>>;

    /// Creates an instance and returns without waiting until it runs.
    async fn create(&self, request: &CreateRequest) -> Result<Instance>;

    /// The instance as it is now.
    async fn describe(&self, id: &InstanceId) -> Result<Instance>;

    /// Every instance that this owner created and that is not gone: all of them, or those where the
    /// offer `near` is.
    async fn list_owned(&self, near: Option<&Offer>) -> Result<Vec<Instance>>;

    /// Ends the instance and everything that runs on it.
    async fn terminate(&self, id: &InstanceId) -> Result<()>;

    /// The power to stop instances and start them again, where the provider has it.
    fn stop_start(&self) -> Option<&dyn StopStart> {
        None
    }

    /// The power to tell a machine that was taken back from one that ended, where there is spot.
    fn spot_market(&self) -> Option<&dyn SpotMarket> {
        None
    }

    /// The power to open ports, where the provider keeps them shut.
    fn ports(&self) -> Option<&dyn Ports> {
        None
    }

    /// The power to end an instance at a time, where the provider itself can.
    fn deadline(&self) -> Option<&dyn Deadline> {
        None
    }
}

/// Which guards end an instance that its owner has forgotten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Guards {
    /// The instance costs nothing when it idles, because it is a machine one has anyway.
    pub free: bool,
    /// The instance's own system ends it when its heartbeats stop.
    pub dead_man_timer: bool,
    /// The cloud itself ends it at a deadline.
    pub native_deadline: bool,
}

impl Guards {
    /// Whether a forgotten instance would cost money until somebody runs the client again.
    pub fn only_reaper(&self) -> bool {
        !(self.free || self.dead_man_timer || self.native_deadline)
    }
}

/// What to create.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// Makes the call idempotent; derived from the recorded intent, not from the clock.
    pub token: String,
    /// The cluster the instance belongs to; providers keep it as a tag.
    pub cluster: String,
    /// The offer to take.
    pub offer: Offer,
    /// When the instance ends by itself, from the day it is created.
    pub lease: Lease,
    /// Tags of the task, on top of those that mark the instance as ours.
    pub labels: BTreeMap<String, String>,
    /// How large its disk is to be in GiB, where the offer leaves that open.
    pub disk_size_gib: Option<u32>,
}

/// When an instance ends by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// How long it may be idle; for ever when `None`.
    pub idle: Option<Duration>,
    /// Whether it is terminated then, not stopped.
    pub down: bool,
    /// What keeps it from being idle.
    pub wait_for: WaitFor,
}

/// The provider's identifier of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub String);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An instance we created.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    /// The provider's identifier.
    pub id: InstanceId,
    /// The [`CreateRequest::token`] it was created with.
    pub token: String,
    /// The cluster it belongs to.
    pub cluster: String,
    /// The [`CreateRequest::labels`] it was created with.
    pub labels: BTreeMap<String, String>,
    /// What it does now.
    pub state: InstanceState,
    /// How to reach it; `None` until it has an address.
    pub endpoint: Option<Endpoint>,
    /// Its price.
    pub usd_per_hour: f64,
}

/// What an instance does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstanceState {
    /// It was created and cannot be reached yet.
    Starting,
    /// It can be reached.
    Running,
    /// It does not run and keeps its files; [`StopStart::start`] brings it back.
    Stopped,
    /// It is being ended; the bill may still run.
    Terminating,
}

/// How to reach an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Processes of this machine; the folder holds what is theirs.
    Local {
        /// The instance's folder.
        dir: PathBuf,
    },
    /// A machine with an ssh server.
    Ssh {
        /// How to log in.
        target: SshTarget,
        /// The instance's folder on it, under the user's home unless absolute.
        dir: String,
    },
}

/// How to log in to a machine over ssh; what is `None` is left to the user's ssh configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SshTarget {
    /// Its address, or its alias in the user's ssh configuration.
    pub host: String,
    /// The server's port.
    pub port: Option<u16>,
    /// The user to log in as.
    pub user: Option<String>,
    /// The private key.
    pub identity_file: Option<PathBuf>,
    /// The file that holds the machine's key; a machine that is not in it is refused.
    pub known_hosts: Option<PathBuf>,
}
