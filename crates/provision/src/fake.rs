//! A provider in memory, for tests of everything above it.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::{
    CreateRequest, Endpoint, Guards, Instance, InstanceId, InstanceState, Provider, StopStart,
};

/// A provider in memory. Its next answers can be scripted with [`Fake::fail_next`].
#[derive(Debug, Default)]
pub struct Fake {
    offers: Vec<Offer>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    by_token: BTreeMap<String, Instance>,
    faults: VecDeque<Fault>,
}

/// What goes wrong with the next `create`.
#[derive(Debug)]
pub enum Fault {
    /// The call fails and nothing is created.
    Refused(Error),
    /// The instance is created, and the answer is lost on the way.
    AnswerLost,
}

impl Fake {
    /// A fake with one small and one larger machine.
    pub fn new() -> Self {
        let offer = |instance_type: &str, cpus: f64, usd_per_hour: f64| Offer {
            provider: "fake".into(),
            instance_type: instance_type.into(),
            region: "fake-1".into(),
            zone: None,
            cpus,
            memory_gib: cpus * 4.0,
            accelerator: None,
            spot: false,
            usd_per_hour,
        };
        Self::with_offers(vec![offer("small", 2.0, 0.10), offer("large", 16.0, 0.80)])
    }

    /// A fake that makes these offers.
    pub fn with_offers(offers: Vec<Offer>) -> Self {
        Self {
            offers,
            state: Mutex::default(),
        }
    }

    /// Makes the next `create` that has no fault yet fail like this.
    pub fn fail_next(&self, fault: Fault) {
        self.state().faults.push_back(fault);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is left half-changed by a panic between two statements here.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Provider for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn guards(&self) -> Guards {
        Guards {
            native_deadline: true,
            ..Guards::default()
        }
    }

    async fn offers(&self) -> Result<Vec<Offer>> {
        Ok(self.offers.clone())
    }

    async fn create(&self, request: &CreateRequest) -> Result<Instance> {
        let mut state = self.state();
        let fault = state.faults.pop_front();
        if let Some(Fault::Refused(error)) = fault {
            return Err(error);
        }
        let fresh = Instance {
            id: InstanceId(format!("i-{}", request.token)),
            token: request.token.clone(),
            cluster: request.cluster.clone(),
            state: InstanceState::Running,
            endpoint: Some(Endpoint::Local {
                dir: PathBuf::from("/nonexistent"),
            }),
            usd_per_hour: request.offer.usd_per_hour,
        };
        let instance = state
            .by_token
            .entry(request.token.clone())
            .or_insert(fresh)
            .clone();
        match fault {
            Some(_) => Err(Error::Unavailable {
                provider: "fake",
                operation: "create",
                source: "the answer was lost".into(),
            }),
            None => Ok(instance),
        }
    }

    async fn describe(&self, id: &InstanceId) -> Result<Instance> {
        let state = self.state();
        let found = state.by_token.values().find(|instance| instance.id == *id);
        found
            .cloned()
            .ok_or_else(|| Error::NoSuchInstance { id: id.to_string() })
    }

    async fn list_owned(&self) -> Result<Vec<Instance>> {
        Ok(self.state().by_token.values().cloned().collect())
    }

    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        self.state()
            .by_token
            .retain(|_, instance| instance.id != *id);
        Ok(())
    }

    fn stop_start(&self) -> Option<&dyn StopStart> {
        Some(self)
    }
}

impl Fake {
    fn set(&self, id: &InstanceId, to: InstanceState) -> Result<Instance> {
        let mut state = self.state();
        let found = state
            .by_token
            .values_mut()
            .find(|instance| instance.id == *id);
        let instance = found.ok_or_else(|| Error::NoSuchInstance { id: id.to_string() })?;
        instance.state = to;
        Ok(instance.clone())
    }
}

#[async_trait]
impl StopStart for Fake {
    async fn stop(&self, id: &InstanceId) -> Result<()> {
        self.set(id, InstanceState::Stopped).map(drop)
    }

    async fn start(&self, id: &InstanceId) -> Result<Instance> {
        self.set(id, InstanceState::Running)
    }
}

#[cfg(test)]
mod tests {
    mod alone {
        crate::provider_conformance_tests!((crate::Fake::new(), ()));
    }

    mod behind_budget {
        crate::provider_conformance_tests!((crate::Budget::new(crate::Fake::new(), 5.0), ()));
    }

    mod behind_retry {
        use crate::{Backoff, Fake, Retry};
        crate::provider_conformance_tests!((Retry::new(Fake::new(), Backoff::default()), ()));
    }
}
