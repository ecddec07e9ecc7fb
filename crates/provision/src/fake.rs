//! A provider in memory, for tests of everything above it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use crate::capability::{Deadline, Ports, SpotMarket, StopStart};
use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::{
    CreateRequest, Endpoint, Guards, Instance, InstanceId, InstanceState, Provider,
};

/// A provider in memory. Its next answers can be scripted with [`Fake::fail_next`].
#[derive(Debug, Default)]
pub struct Fake {
    pub(crate) offers: Vec<Offer>,
    dir: Option<PathBuf>,
    settles: Duration,
    boots: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    by_token: BTreeMap<String, Instance>,
    faults: VecDeque<Fault>,
    preempted: BTreeSet<InstanceId>,
    exposed: BTreeSet<(InstanceId, u16)>,
    deadlines: BTreeMap<InstanceId, SystemTime>,
    hidden: BTreeSet<InstanceId>,
    disks: Vec<Option<u32>>,
    looks: BTreeMap<InstanceId, u32>,
}

/// What goes wrong with the next `create`.
#[derive(Debug)]
pub enum Fault {
    /// The call fails and nothing is created.
    Refused(Error),
    /// The instance is created, and the answer is lost on the way.
    AnswerLost,
    /// The instance is created, the answer is lost, and no list has it until [`Fake::reveal`].
    Hidden,
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
            disk_gib: None,
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
            dir: None,
            settles: Duration::ZERO,
            boots: 0,
            state: Mutex::default(),
        }
    }

    /// Lets instances be reached as processes of this machine, all in the one folder `dir`.
    pub fn with_dir(self, dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: Some(dir.into()),
            ..self
        }
    }

    /// Takes so long until lists have what was created: what [`Provider::settles`] says.
    pub fn with_settling(self, settles: Duration) -> Self {
        Self { settles, ..self }
    }

    /// Instances start for as long as they have not been described so often.
    pub fn with_boots(self, boots: u32) -> Self {
        Self { boots, ..self }
    }

    /// Shows what was created by a [`Fault::Hidden`].
    pub fn reveal(&self) {
        self.state().hidden.clear();
    }

    /// Hides an instance from lists and descriptions until [`Fake::reveal`], as a cloud does whose
    /// answers come from an older copy of its books.
    pub fn hide(&self, id: &InstanceId) {
        self.state().hidden.insert(id.clone());
    }

    /// Makes the next `create` that has no fault yet fail like this.
    pub fn fail_next(&self, fault: Fault) {
        self.state().faults.push_back(fault);
    }

    /// Takes an instance back, as a spot market does.
    pub fn preempt(&self, id: &InstanceId) {
        let mut state = self.state();
        if state.end(id) {
            state.preempted.insert(id.clone());
        }
    }

    /// Lets the time of the deadlines come.
    pub fn pass(&self, now: SystemTime) {
        let mut state = self.state();
        let due: Vec<_> = state
            .deadlines
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            state.end(&id);
        }
    }

    /// The sizes of the disks that were asked for, in order.
    pub fn asked_disks(&self) -> Vec<Option<u32>> {
        self.state().disks.clone()
    }

    /// The ports of an instance that were opened.
    pub fn exposed(&self, id: &InstanceId) -> Vec<u16> {
        let state = self.state();
        let own = state.exposed.iter().filter(|(of, _)| of == id);
        own.map(|(_, port)| *port).collect()
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

    fn settles(&self) -> Duration {
        self.settles
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
        state.disks.push(request.disk_size_gib);
        let fresh = Instance {
            id: InstanceId(format!("i-{}", request.token)),
            token: request.token.clone(),
            cluster: request.cluster.clone(),
            labels: request.labels.clone(),
            state: match self.boots {
                0 => InstanceState::Running,
                _ => InstanceState::Starting,
            },
            endpoint: self.dir.clone().map(|dir| Endpoint::Local { dir }),
            usd_per_hour: request.offer.usd_per_hour,
        };
        let instance = state
            .by_token
            .entry(request.token.clone())
            .or_insert(fresh)
            .clone();
        if let Some(Fault::Hidden) = fault {
            state.hidden.insert(instance.id.clone());
        }
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
        let mut state = self.state();
        let found = state.shown().find(|instance| instance.id == *id).cloned();
        let found = found.ok_or_else(|| Error::NoSuchInstance { id: id.to_string() })?;
        if found.state == InstanceState::Starting {
            let looks = state.looks.entry(id.clone()).or_default();
            *looks += 1;
            if *looks >= self.boots {
                state.find(id)?.state = InstanceState::Running;
                return Ok(state.find(id)?.clone());
            }
        }
        Ok(found)
    }

    async fn list_owned(&self, _near: Option<&Offer>) -> Result<Vec<Instance>> {
        Ok(self.state().shown().cloned().collect())
    }

    /// What is hidden is absent here too, and ending it a success that ends nothing.
    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        let mut state = self.state();
        if !state.hidden.contains(id) {
            state.end(id);
        }
        Ok(())
    }

    fn stop_start(&self) -> Option<&dyn StopStart> {
        Some(self)
    }

    fn spot_market(&self) -> Option<&dyn SpotMarket> {
        Some(self)
    }

    fn ports(&self) -> Option<&dyn Ports> {
        Some(self)
    }

    fn deadline(&self) -> Option<&dyn Deadline> {
        Some(self)
    }
}

impl State {
    fn shown(&self) -> impl Iterator<Item = &Instance> {
        let all = self.by_token.values();
        all.filter(|instance| !self.hidden.contains(&instance.id))
    }

    fn find(&mut self, id: &InstanceId) -> Result<&mut Instance> {
        let mut all = self.by_token.values_mut();
        let found = all.find(|instance| instance.id == *id);
        found.ok_or_else(|| Error::NoSuchInstance { id: id.to_string() })
    }

    /// Ends an instance; says whether there was one.
    fn end(&mut self, id: &InstanceId) -> bool {
        let before = self.by_token.len();
        self.by_token.retain(|_, instance| instance.id != *id);
        self.exposed.retain(|(of, _)| of != id);
        self.deadlines.remove(id);
        self.by_token.len() < before
    }
}

impl Fake {
    fn set(&self, id: &InstanceId, to: InstanceState) -> Result<Instance> {
        let mut state = self.state();
        let instance = state.find(id)?;
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

#[async_trait]
impl SpotMarket for Fake {
    async fn was_preempted(&self, id: &InstanceId) -> Result<bool> {
        Ok(self.state().preempted.contains(id))
    }
}

#[async_trait]
impl Ports for Fake {
    async fn expose(&self, id: &InstanceId, port: u16) -> Result<String> {
        let mut state = self.state();
        state.find(id)?;
        state.exposed.insert((id.clone(), port));
        Ok(format!("{id}.fake:{port}"))
    }
}

#[async_trait]
impl Deadline for Fake {
    async fn set_deadline(&self, id: &InstanceId, at: Option<SystemTime>) -> Result<()> {
        let mut state = self.state();
        state.find(id)?;
        match at {
            Some(at) => state.deadlines.insert(id.clone(), at),
            None => state.deadlines.remove(id),
        };
        Ok(())
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
