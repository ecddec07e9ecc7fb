//! A provider at its worst, whose client dies at one of its calls: what leak tests are made of.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::capability::{Deadline, Ports, SpotMarket, StopStart};
use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::{CreateRequest, Guards, Instance, InstanceId, Provider};

/// When the client dies; calls are counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// Before this call reaches the provider.
    Before(u32),
    /// After the provider has done what this call asked, before its answer arrives.
    After(u32),
    /// Not at all.
    Never,
}

/// How the provider misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// It does not.
    Well,
    /// The first create succeeds and its answer is lost.
    AnswerLost,
    /// What a create made shows in lists only after two of them, and the call times out.
    Late,
    /// Every create makes a second instance that nobody asked for, as where tokens mean nothing.
    Twice,
    /// An instance is still listed once after its end.
    Lingers,
    /// The first terminate succeeds and its answer is lost.
    EndLost,
}

impl Manner {
    /// Every manner.
    pub const ALL: [Manner; 6] = [
        Manner::Well,
        Manner::AnswerLost,
        Manner::Late,
        Manner::Twice,
        Manner::Lingers,
        Manner::EndLost,
    ];
}

/// A provider with scripted manners, whose client dies at one of its calls.
#[derive(Debug)]
pub struct Trap {
    world: Arc<dyn Provider>,
    manner: Manner,
    kill: Kill,
    calls: AtomicU32,
    dead: Notify,
    lost: AtomicBool,
    hidden: Mutex<BTreeMap<InstanceId, u32>>,
    lingering: Mutex<Vec<Instance>>,
}

impl Trap {
    /// Stands between a client and `world`.
    pub fn new(world: Arc<dyn Provider>, manner: Manner, kill: Kill) -> Arc<Self> {
        Arc::new(Self {
            world,
            manner,
            kill,
            calls: AtomicU32::new(0),
            dead: Notify::new(),
            lost: AtomicBool::new(false),
            hidden: Mutex::default(),
            lingering: Mutex::default(),
        })
    }

    /// Runs `work` until it ends or its client dies, and says whether it died. The future is dropped
    /// there, which leaves behind what `kill -9` does.
    pub async fn until_death<T>(&self, work: impl Future<Output = T>) -> bool {
        tokio::select! {
            biased;
            () = self.dead.notified() => true,
            _ = work => false,
        }
    }

    async fn call<T>(&self, call: impl Future<Output = T>) -> T {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.kill == Kill::Before(number) {
            self.dead.notify_one();
            return pending().await;
        }
        let value = call.await;
        if self.kill == Kill::After(number) {
            self.dead.notify_one();
            return pending().await;
        }
        value
    }

    /// Whether the answer of this call is the one that is lost.
    fn loses(&self, manner: Manner) -> bool {
        self.manner == manner && !self.lost.swap(true, Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unavailable(operation: &'static str) -> Error {
    Error::Unavailable {
        provider: "trap",
        operation,
        source: "the answer was lost".into(),
    }
}

#[async_trait]
impl Provider for Trap {
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
        self.call(self.world.offers()).await
    }

    async fn create(&self, request: &CreateRequest) -> Result<Instance> {
        self.call(async {
            let made = self.world.create(request).await?;
            if self.manner == Manner::Twice {
                let again = CreateRequest {
                    token: format!("{}-again", request.token),
                    ..request.clone()
                };
                self.world.create(&again).await?;
            }
            if self.manner == Manner::Late {
                lock(&self.hidden).insert(made.id, 2);
                return Err(unavailable("create"));
            }
            match self.loses(Manner::AnswerLost) {
                true => Err(unavailable("create")),
                false => Ok(made),
            }
        })
        .await
    }

    async fn describe(&self, id: &InstanceId) -> Result<Instance> {
        self.call(self.world.describe(id)).await
    }

    async fn list_owned(&self, near: Option<&Offer>) -> Result<Vec<Instance>> {
        self.call(async {
            let mut listed = self.world.list_owned(near).await?;
            let mut hidden = lock(&self.hidden);
            listed.retain(|instance| !hidden.contains_key(&instance.id));
            hidden.retain(|_, lists| {
                *lists -= 1;
                *lists > 0
            });
            listed.append(&mut lock(&self.lingering));
            Ok(listed)
        })
        .await
    }

    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        self.call(async {
            let before = self.world.describe(id).await;
            self.world.terminate(id).await?;
            let Ok(instance) = before else { return Ok(()) };
            if self.manner == Manner::Lingers {
                lock(&self.lingering).push(instance);
            }
            match self.loses(Manner::EndLost) {
                true => Err(unavailable("terminate")),
                false => Ok(()),
            }
        })
        .await
    }

    fn stop_start(&self) -> Option<&dyn StopStart> {
        self.world.stop_start()
    }

    fn spot_market(&self) -> Option<&dyn SpotMarket> {
        self.world.spot_market()
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.world.ports().map(|_| self as &dyn Ports)
    }

    fn deadline(&self) -> Option<&dyn Deadline> {
        self.world.deadline().map(|_| self as &dyn Deadline)
    }
}

#[async_trait]
impl Ports for Trap {
    async fn expose(&self, id: &InstanceId, port: u16) -> Result<String> {
        match self.world.ports() {
            Some(power) => self.call(power.expose(id, port)).await,
            None => Err(unavailable("expose")),
        }
    }
}

#[async_trait]
impl Deadline for Trap {
    async fn set_deadline(&self, id: &InstanceId, at: Option<SystemTime>) -> Result<()> {
        match self.world.deadline() {
            Some(power) => self.call(power.set_deadline(id, at)).await,
            None => Err(unavailable("set a deadline")),
        }
    }
}
