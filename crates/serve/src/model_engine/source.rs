//! Where a model or an adapter lies: a folder, or a finished stage of a store.

use std::fmt;
use std::path::PathBuf;

use updraft_store::{Area, FinishedStage, StageId, Store};

use crate::error::{Error, Result};

/// Where to load a model or an adapter from.
#[derive(Debug, Clone)]
pub enum ModelSource {
    /// A folder with the files as transformers or PEFT write them.
    Folder(PathBuf),
    /// The newest finished stage of this name: `models/<model>` or `done/<model>/<dataset>`. Of
    /// the latter, a model is its `fused/` and an adapter its `lora_model/`.
    Stage {
        /// The store.
        store: Store,
        /// The stage's name.
        name: String,
    },
}

impl ModelSource {
    /// A folder.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self::Folder(path.into())
    }

    /// What a person writes: a folder, or the URL of a stage such as
    /// `s3://bucket/prefix/done/<model>/<dataset>`.
    ///
    /// # Errors
    /// [`Error::Options`] if a URL names no stage, [`Error::Load`] if its store cannot be opened.
    pub fn parse(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self::folder(text));
        };
        let starts = ["/models/", "/done/"]
            .into_iter()
            .filter_map(|area| rest.rfind(area));
        let Some(at) = starts.max().map(|at| scheme.len() + 3 + at) else {
            return Err(Error::Options(format!(
                "`{text}` names no stage; end it in models/<model> or done/<model>/<dataset>"
            )));
        };
        let (store, name) = (&text[..at], text[at..].trim_matches('/'));
        let store = Store::open(store).map_err(|source| Error::Load {
            model: text.to_owned(),
            source: source.into(),
        })?;
        Ok(Self::stage(&store, name))
    }

    /// A stage of a store.
    pub fn stage(store: &Store, name: impl Into<String>) -> Self {
        Self::Stage {
            store: store.clone(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::Stage { store, name } => f.write_str(&store.url_of(name)),
        }
    }
}

/// What to look for at a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Adapter,
}

/// A source that was found.
#[derive(Debug)]
pub(super) struct Found {
    /// What messages and `/v1/models` call it.
    pub(super) root: String,
    pub(super) place: Place,
}

/// Where its files are.
#[derive(Debug)]
pub(super) enum Place {
    Folder(PathBuf),
    /// In a folder below the stage's own, or in that itself if there is no name.
    Stage(Box<FinishedStage>, &'static str),
}

/// Follows a source to its files.
pub(super) async fn find(source: &ModelSource, kind: Kind) -> Result<Found> {
    match source {
        ModelSource::Folder(path) if path.is_dir() => Ok(Found {
            root: source.to_string(),
            place: Place::Folder(path.clone()),
        }),
        ModelSource::Folder(path) => Err(Error::Read {
            path: path.display().to_string(),
            source: "it is not a folder".into(),
        }),
        ModelSource::Stage { store, name } => find_stage(store, name, kind).await,
    }
}

async fn find_stage(store: &Store, name: &str, kind: Kind) -> Result<Found> {
    let failed = |source: updraft_store::Error| Error::Load {
        model: store.url_of(name),
        source: source.into(),
    };
    let id: StageId = name.parse().map_err(failed)?;
    let below = match (id.area(), kind) {
        (Area::Models, Kind::Model) => "",
        (Area::Done, Kind::Model) => "fused",
        (Area::Done, Kind::Adapter) => "lora_model",
        (Area::Models, Kind::Adapter) => {
            let message = format!("`{name}` is a model; name an adapter's done/<model>/<dataset>");
            return Err(Error::Options(message));
        }
        _ => {
            let message =
                format!("`{name}` is data; name models/<model> or done/<model>/<dataset>");
            return Err(Error::Options(message));
        }
    };
    let Some(stage) = updraft_store::current(store, &id).await.map_err(failed)? else {
        let (store, name) = (store.url().to_owned(), name.to_owned());
        return Err(Error::NoSuchStage { store, name });
    };
    let root = stage.path(below).trim_end_matches('/').to_owned();
    let place = Place::Stage(Box::new(stage), below);
    Ok(Found { root, place })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_a_store_and_a_stage() {
        for (text, expected) in [
            ("memory:///done/a/b", Some("done/a/b")),
            ("memory://models/a", None),
            ("memory://", None),
        ] {
            match (ModelSource::parse(text), expected) {
                (Ok(ModelSource::Stage { name, .. }), Some(expected)) => {
                    assert_eq!(name, expected);
                }
                (Err(Error::Options(message)), None) => assert!(message.contains(text)),
                (other, _) => panic!("{text}: {other:?}"),
            }
        }
        let folder = ModelSource::parse("./models/a").expect("a folder");
        assert!(matches!(folder, ModelSource::Folder(path) if path.ends_with("models/a")));
    }
}
