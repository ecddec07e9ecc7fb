//! What the engine's thread tells about itself.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::engine::EngineStats;
use crate::scheduler::Scheduler;

/// The latest statistics; written by the thread, read by anybody.
#[derive(Debug)]
pub(super) struct Status(Mutex<EngineStats>);

impl Status {
    pub(super) fn new(model: &str) -> Self {
        Self(Mutex::new(EngineStats::idle(model)))
    }

    /// A forward pass of this many tokens was computed.
    pub(super) fn stepped(&self, num_tokens: u32) {
        self.lock().step_tokens.observe(f64::from(num_tokens));
    }

    /// Which adapters have requests, running and waiting.
    pub(super) fn adapters(&self, running: BTreeSet<&str>, waiting: BTreeSet<&str>) {
        let mut stats = self.lock();
        stats.running_adapters = running.into_iter().map(str::to_owned).collect();
        stats.waiting_adapters = waiting.into_iter().map(str::to_owned).collect();
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
        let config = scheduler.config();
        stats.max_num_seqs = config.max_num_seqs;
        stats.block_size = config.block_size;
        stats.num_blocks = all;
    }

    pub(super) fn caches_prefixes(&self, prefix_cache: bool) {
        self.lock().prefix_cache = prefix_cache;
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
