//! What the engine's thread tells about itself.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::engine::EngineStats;
use crate::scheduler::Scheduler;

/// The latest statistics; written by the thread, read by anybody.
#[derive(Debug)]
pub(super) struct Status(Mutex<EngineStats>);

impl Status {
    pub(super) fn new(model: &str) -> Self {
        Self(Mutex::new(EngineStats {
            model: model.to_owned(),
            alive: true,
            running: 0,
            waiting: 0,
            kv_cache_usage: 0.0,
            preemptions: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
        }))
    }

    pub(super) fn publish(&self, scheduler: &Scheduler) {
        let (free, all) = scheduler.block_usage();
        let mut stats = self.lock();
        stats.running = scheduler.num_running();
        stats.waiting = scheduler.num_waiting();
        stats.kv_cache_usage = (all - free) as f64 / all as f64;
        let counts = scheduler.counts();
        stats.preemptions = counts.preemptions;
        stats.prefix_cache_queries = counts.prefix_cache_queries;
        stats.prefix_cache_hits = counts.prefix_cache_hits;
    }

    pub(super) fn stopped(&self) {
        self.lock().alive = false;
    }

    pub(super) fn get(&self) -> EngineStats {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, EngineStats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
