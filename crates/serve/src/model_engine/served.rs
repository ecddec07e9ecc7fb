//! A model in memory, under the names clients know.

use std::sync::Arc;

use updraft_chat::Chat;
use updraft_model::{Adapter, Decoder, ModelConfig};

use crate::error::{Error, Result};
use crate::sampling::SamplingDefaults;

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
    /// What requests leave out.
    pub sampling: SamplingDefaults,
    /// As [`ModelInfo::text_prefix`](crate::ModelInfo::text_prefix).
    pub text_prefix: Vec<u32>,
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
        let config = self.decoder.config();
        self.adapters
            .iter()
            .try_for_each(|served| served.check(config))
    }
}

impl ServedAdapter {
    /// Checks that it is for this model.
    pub(super) fn check(&self, config: &ModelConfig) -> Result<()> {
        self.adapter.check(config).map_err(|source| Error::Load {
            model: self.root.clone(),
            source: source.into(),
        })
    }
}
