//! The names an engine serves: its base model, and adapters that come and go.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use updraft_model::Adapter;

use super::served::ServedAdapter;
use crate::engine::{Existing, ModelInfo};
use crate::error::{Error, Result};

/// An adapter as it was at one moment. Requests hold on to it, so that a name can be given to
/// another adapter while they run.
#[derive(Debug, Clone)]
pub(super) struct Generation {
    /// Never used twice, not even for the same files: keys and values are cached under it.
    pub(super) number: u64,
    pub(super) adapter: Arc<Adapter>,
}

/// Who answers to a name.
#[derive(Debug)]
pub(super) struct Registry {
    base: ModelInfo,
    adapters: RwLock<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    /// In the order they were first loaded.
    entries: Vec<(ModelInfo, Generation)>,
    num_generations: u64,
}

impl Registry {
    /// The base, and adapters whose names were checked.
    pub(super) fn new(base: ModelInfo, adapters: Vec<ServedAdapter>) -> Self {
        let registry = Self {
            base,
            adapters: RwLock::default(),
        };
        for served in adapters {
            let added = registry.add(served, Existing::Keep);
            added.expect("names were checked to be distinct");
        }
        registry
    }

    /// Serves an adapter from now on.
    pub(super) fn add(&self, served: ServedAdapter, existing: Existing) -> Result<()> {
        let mut loaded = self.write();
        self.check_free(&loaded, &served.name, existing)?;
        loaded.num_generations += 1;
        let generation = Generation {
            number: loaded.num_generations,
            adapter: served.adapter,
        };
        let info = ModelInfo {
            id: served.name,
            root: served.root,
            parent: Some(self.base.id.clone()),
            ..self.base.clone()
        };
        let entries = &mut loaded.entries;
        match entries.iter_mut().find(|(known, _)| known.id == info.id) {
            Some(entry) => *entry = (info, generation),
            None => entries.push((info, generation)),
        }
        Ok(())
    }

    /// Refuses a name that is taken, before anything is loaded for it.
    pub(super) fn check(&self, name: &str, existing: Existing) -> Result<()> {
        self.check_free(&self.read(), name, existing)
    }

    fn check_free(&self, loaded: &Loaded, name: &str, existing: Existing) -> Result<()> {
        if name.is_empty() {
            return Err(Error::invalid("lora_name", "the adapter's name is empty"));
        }
        if name == self.base.id {
            let message = format!("`{name}` is the base model; give the adapter another name");
            return Err(Error::invalid("lora_name", message));
        }
        let is_taken = loaded.entries.iter().any(|(info, _)| info.id == name);
        if is_taken && existing == Existing::Keep {
            let message = format!(
                "the adapter `{name}` is already loaded; unload it first or ask to replace it"
            );
            return Err(Error::invalid("lora_name", message));
        }
        Ok(())
    }

    /// Serves an adapter no longer.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        let mut loaded = self.write();
        let place = loaded.entries.iter().position(|(info, _)| info.id == name);
        let place = place.ok_or_else(|| Error::ModelNotFound {
            model: name.to_owned(),
        })?;
        loaded.entries.remove(place);
        Ok(())
    }

    /// What answers to a name: the base (`None`) or an adapter.
    pub(super) fn find(&self, name: &str) -> Result<Option<Generation>> {
        if name == self.base.id {
            return Ok(None);
        }
        let loaded = self.read();
        let entry = loaded.entries.iter().find(|(info, _)| info.id == name);
        match entry {
            Some((_, generation)) => Ok(Some(generation.clone())),
            None => Err(Error::ModelNotFound {
                model: name.to_owned(),
            }),
        }
    }

    /// The base, then the adapters.
    pub(super) fn infos(&self) -> Vec<ModelInfo> {
        let loaded = self.read();
        let adapters = loaded.entries.iter().map(|(info, _)| info.clone());
        std::iter::once(self.base.clone()).chain(adapters).collect()
    }

    // A panic while the lock is held leaves a list that is whole: each change is one step.
    fn read(&self) -> RwLockReadGuard<'_, Loaded> {
        self.adapters.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Loaded> {
        self.adapters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
