//! A provider one of whose instances cannot be reached for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::capability::StopStart;
use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::{CreateRequest, Guards, Instance, InstanceId, Provider};

/// A provider that can neither stop nor end one of its instances, as if its machine were off.
#[derive(Debug)]
pub struct Deaf {
    world: Arc<dyn Provider>,
    to: Mutex<Option<InstanceId>>,
}

impl Deaf {
    /// Hears everything at first.
    pub fn new(world: Arc<dyn Provider>) -> Self {
        Self {
            world,
            to: Mutex::default(),
        }
    }

    /// Does nothing to this instance from now on.
    pub fn shut_ears_to(&self, id: &InstanceId) {
        *self.to() = Some(id.clone());
    }

    /// Hears everything again.
    pub fn open_ears(&self) {
        *self.to() = None;
    }

    fn to(&self) -> MutexGuard<'_, Option<InstanceId>> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, id: &InstanceId, operation: &'static str) -> Result<()> {
        match self.to().as_ref() == Some(id) {
            true => Err(Error::Unavailable {
                provider: self.world.name(),
                operation,
                source: "no answer".into(),
            }),
            false => Ok(()),
        }
    }

    fn power(&self) -> Result<&dyn StopStart> {
        self.world.stop_start().ok_or_else(|| Error::NotCapable {
            provider: self.world.name().to_owned(),
            verb: "stop",
        })
    }
}

#[async_trait]
impl Provider for Deaf {
    fn name(&self) -> &'static str {
        self.world.name()
    }

    fn guards(&self) -> Guards {
        self.world.guards()
    }

    fn settles(&self) -> Duration {
        self.world.settles()
    }

    async fn offers(&self) -> Result<Vec<Offer>> {
        self.world.offers().await
    }

    async fn create(&self, request: &CreateRequest) -> Result<Instance> {
        self.world.create(request).await
    }

    async fn describe(&self, id: &InstanceId) -> Result<Instance> {
        self.world.describe(id).await
    }

    async fn list_owned(&self, near: Option<&Offer>) -> Result<Vec<Instance>> {
        self.world.list_owned(near).await
    }

    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        self.hear(id, "terminate")?;
        self.world.terminate(id).await
    }

    fn stop_start(&self) -> Option<&dyn StopStart> {
        Some(self)
    }
}

#[async_trait]
impl StopStart for Deaf {
    async fn stop(&self, id: &InstanceId) -> Result<()> {
        self.hear(id, "stop")?;
        self.power()?.stop(id).await
    }

    async fn start(&self, id: &InstanceId) -> Result<Instance> {
        self.power()?.start(id).await
    }
}
