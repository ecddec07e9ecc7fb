//! The manifest: what a finished stage consists of.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::layout::check_object_name;
use crate::stage_key::sorted;
use crate::{Error, Result, StageKey};

/// The version of the manifest's form that this crate writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Everything a finished stage consists of; its existence is what makes the stage finished.
///
/// Equal inputs make an equal manifest to the byte, so it holds no time, host or path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The form of this document, [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Which stage made it: `import`, `pretokenize`, `train`.
    pub stage: String,
    /// The hash of the stage's name and `inputs`.
    pub key: StageKey,
    /// Everything that decided the output, with sorted keys.
    pub inputs: Value,
    /// Rows, tokens and other totals.
    pub counts: BTreeMap<String, u64>,
    /// The objects of the stage that hold its output, in reading order. Readers trust no others.
    pub objects: Vec<ObjectEntry>,
    /// The shards' schema, if they share one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// Source rows that were not taken, with the reason: all of them, but for those in
    /// `more_rejects`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rejects: Vec<Reject>,
    /// Objects that list the rejects of which there are too many for this document.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_rejects: Vec<ObjectEntry>,
    /// Whatever else a later stage needs to know.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, Value>,
}

/// One object of a stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectEntry {
    /// Path relative to the stage's folder.
    pub path: String,
    /// Rows, if it holds rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u64>,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the bytes, lower-case hex.
    pub sha256: String,
}

impl ObjectEntry {
    /// The same entry with a number of rows.
    #[must_use]
    pub fn with_rows(mut self, rows: u64) -> Self {
        self.rows = Some(rows);
        self
    }
}

/// A source row that was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    /// The file it came from.
    pub source: String,
    /// Its number in the whole source, from 0.
    pub row: u64,
    /// Why, in words for the person who owns the data.
    pub reason: String,
}

/// What a stage hands in to be committed; the rest of the [`Manifest`] is known already.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ManifestDraft {
    /// Every object, in reading order.
    pub objects: Vec<ObjectEntry>,
    /// Rows, tokens and other totals.
    pub counts: BTreeMap<String, u64>,
    /// The shards' schema, if they share one.
    pub schema: Option<Value>,
    /// Source rows that were not taken.
    pub rejects: Vec<Reject>,
    /// Objects that list the others.
    pub more_rejects: Vec<ObjectEntry>,
    /// Whatever else a later stage needs to know.
    pub attributes: BTreeMap<String, Value>,
}

impl ManifestDraft {
    /// Every object that the manifest will list.
    pub(crate) fn all_objects(&self) -> impl Iterator<Item = &ObjectEntry> {
        self.objects.iter().chain(&self.more_rejects)
    }
}

impl Manifest {
    pub(crate) fn from_draft(
        stage: &str,
        key: StageKey,
        inputs: Value,
        draft: ManifestDraft,
    ) -> Result<Self> {
        let mut seen = HashSet::new();
        for object in draft.all_objects() {
            check_object_name(&object.path)?;
            if !seen.insert(object.path.as_str()) {
                return Err(Error::InvalidName {
                    name: object.path.clone(),
                    reason: "two objects of one stage share it",
                });
            }
        }
        Ok(Self {
            format_version: FORMAT_VERSION,
            stage: stage.to_owned(),
            key,
            inputs,
            counts: draft.counts,
            objects: draft.objects,
            schema: draft.schema.map(sorted),
            rejects: draft.rejects,
            more_rejects: draft.more_rejects,
            attributes: draft
                .attributes
                .into_iter()
                .map(|(k, v)| (k, sorted(v)))
                .collect(),
        })
    }

    /// The manifest's bytes: indented JSON, the same for equal manifests.
    pub(crate) fn to_bytes(&self) -> Result<Bytes> {
        let mut json = serde_json::to_vec_pretty(self).map_err(|source| Error::Json {
            what: "the manifest",
            source,
        })?;
        json.push(b'\n');
        Ok(json.into())
    }

    /// Reads a manifest; `url` is for messages.
    pub(crate) fn from_bytes(bytes: &[u8], url: &str) -> Result<Self> {
        let corrupt = |reason: String| Error::Corrupt {
            url: url.to_owned(),
            reason,
        };
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| corrupt(format!("it is not a manifest ({error})")))?;
        if manifest.format_version != FORMAT_VERSION {
            return Err(corrupt(format!(
                "its format is version {}, this program reads version {FORMAT_VERSION}",
                manifest.format_version
            )));
        }
        // A manifest is input: no path in it may lead out of its folder.
        let mut objects = manifest.all_objects();
        if let Some(object) = objects.find(|o| check_object_name(&o.path).is_err()) {
            return Err(corrupt(format!(
                "it lists '{}', which is no object's name",
                object.path
            )));
        }
        drop(objects);
        Ok(manifest)
    }

    /// The entry of an object, by its path within the stage.
    pub fn object(&self, path: &str) -> Option<&ObjectEntry> {
        self.all_objects().find(|object| object.path == path)
    }

    fn all_objects(&self) -> impl Iterator<Item = &ObjectEntry> {
        self.objects.iter().chain(&self.more_rejects)
    }

    /// The bytes of all objects together.
    pub fn total_bytes(&self) -> u64 {
        self.all_objects().map(|object| object.bytes).sum()
    }
}
