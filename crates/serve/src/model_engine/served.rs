//! A model in memory, under the names clients know.

use std::sync::Arc;

use updraft_chat::Chat;
use updraft_model::{Adapter, Decoder};

use crate::engine::ModelInfo;
use crate::error::{Error, Result};

/// A model ready to be served.
#[derive(Debug)]
pub struct ServedModel {
    /// The id in requests.
    pub name: String,
    /// Where it came from.
    pub root: String,
    /// The weights.
    pub decoder: Decoder,
    /// The template and tokenizer.
    pub chat: Chat,
    /// The adapters over it.
    pub adapters: Vec<ServedAdapter>,
}

/// A LoRA adapter ready to be served.
#[derive(Debug)]
pub struct ServedAdapter {
    /// The id in requests.
    pub name: String,
    /// Where it came from.
    pub root: String,
    /// The low-rank update.
    pub adapter: Arc<Adapter>,
}

impl ServedModel {
    /// Checks that names are unique and adapters fit.
    pub(super) fn validate(&self) -> Result<()> {
        let mut names: Vec<&str> = self
            .adapters
            .iter()
            .map(|served| served.name.as_str())
            .collect();
        names.push(&self.name);
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::same_name(pair[0]));
        }
        self.adapters.iter().try_for_each(|served| {
            let fits = served.adapter.check(self.decoder.config());
            fits.map_err(|source| Error::Load {
                model: served.root.clone(),
                source: source.into(),
            })
        })
    }

    /// The model, then its adapters in their order.
    pub(super) fn infos(&self, max_model_len: u32) -> Vec<ModelInfo> {
        let base = ModelInfo {
            id: self.name.clone(),
            root: self.root.clone(),
            parent: None,
            max_model_len,
        };
        let adapters = self.adapters.iter().map(|served| ModelInfo {
            id: served.name.clone(),
            root: served.root.clone(),
            parent: Some(self.name.clone()),
            max_model_len,
        });
        std::iter::once(base).chain(adapters).collect()
    }
}
