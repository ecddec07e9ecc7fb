//! Where things lie in a store: areas, stage names and their paths.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result, StageKey};

/// The object that names a stage's newest finished key.
pub const CURRENT: &str = "current.json";
/// The object that makes a stage finished.
pub const MANIFEST: &str = "manifest.json";
/// The folder of a stage that holds its journal.
pub const JOURNAL: &str = "journal";

/// The top folders of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Area {
    /// Rows as they came, only when asked for.
    Raw,
    /// Conversations in one shape, sharded.
    Standardized,
    /// Base models: weights, config, tokenizer, template.
    Models,
    /// Conversations in one model's tokens.
    ModelReady,
    /// What training made: adapter, merged model, loss curve.
    Done,
}

impl Area {
    /// All areas, in the order a pipeline fills them.
    pub const ALL: [Self; 5] = [
        Self::Raw,
        Self::Standardized,
        Self::Models,
        Self::ModelReady,
        Self::Done,
    ];

    /// The folder's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Standardized => "standardized",
            Self::Models => "models",
            Self::ModelReady => "model-ready",
            Self::Done => "done",
        }
    }
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One line of stages: an area, and the dataset, the model or both.
///
/// Names may hold `/`, as on the Hub; each part becomes a folder. Every finished run of
/// the stage is a folder named by its key beside one `current.json`:
///
/// ```text
/// <area>/<name>/current.json
/// <area>/<name>/<key16>/manifest.json
/// ```
///
/// ```
/// use updraft_store::StageId;
///
/// let id = StageId::done("Qwen/Qwen2.5-0.5B", "letters")?;
/// assert_eq!(id.to_string(), "done/Qwen/Qwen2.5-0.5B/letters");
/// assert_eq!("done/Qwen/Qwen2.5-0.5B/letters".parse::<StageId>()?, id);
/// assert!(StageId::models("../secrets").is_err());
/// # Ok::<(), updraft_store::Error>(())
/// ```
///
/// Two ids are equal if they name the same folder.
#[derive(Clone, Debug)]
pub struct StageId {
    area: Area,
    name: String,
    dataset: Option<String>,
}

impl PartialEq for StageId {
    fn eq(&self, other: &Self) -> bool {
        (self.area, &self.name) == (other.area, &other.name)
    }
}

impl Eq for StageId {}

impl StageId {
    /// A name in an area.
    ///
    /// # Errors
    /// [`Error::InvalidName`] unless the name is one to eight parts of letters, digits, `.`,
    /// `_` and `-`, none of which starts with a dot, ends with one, or looks like a key.
    pub fn new(area: Area, name: &str) -> Result<Self> {
        check(name, &[&well_formed, &not_ours])?;
        Ok(Self {
            area,
            name: name.to_owned(),
            dataset: None,
        })
    }

    /// `raw/<dataset>`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn raw(dataset: &str) -> Result<Self> {
        Self::new(Area::Raw, dataset)
    }

    /// `standardized/<dataset>`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn standardized(dataset: &str) -> Result<Self> {
        Self::new(Area::Standardized, dataset)
    }

    /// `models/<model>`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn models(model: &str) -> Result<Self> {
        Self::new(Area::Models, model)
    }

    /// `model-ready/<model>/<dataset>`.
    ///
    /// Of several pairs that would share a folder (`a/b` with `c`, and `a` with `b/c`) the first
    /// one has it: its `current.json` names the dataset, and the others get
    /// [`Error::NameTaken`].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn model_ready(model: &str, dataset: &str) -> Result<Self> {
        Self::pair(Area::ModelReady, model, dataset)
    }

    /// `done/<model>/<dataset>`; see [`model_ready`](Self::model_ready) about shared folders.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn done(model: &str, dataset: &str) -> Result<Self> {
        Self::pair(Area::Done, model, dataset)
    }

    fn pair(area: Area, model: &str, dataset: &str) -> Result<Self> {
        check(model, &[&well_formed])?;
        check(dataset, &[&well_formed])?;
        let id = Self::new(area, &format!("{model}/{dataset}"))?;
        Ok(Self {
            dataset: Some(dataset.to_owned()),
            ..id
        })
    }

    /// The area.
    pub fn area(&self) -> Area {
        self.area
    }

    /// The name within the area.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The dataset's part of the name, where a model and a dataset made it; a name read from text
    /// does not tell.
    pub fn dataset(&self) -> Option<&str> {
        self.dataset.as_deref()
    }

    /// The folder of the stage with this key.
    pub fn dir(&self, key: &StageKey) -> String {
        format!("{self}/{}", key.key16())
    }

    /// The path of `current.json`.
    pub fn current_path(&self) -> String {
        format!("{self}/{CURRENT}")
    }
}

impl fmt::Display for StageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.area, self.name)
    }
}

/// Reads `<area>/<name>`, as a person writes it: `done/tiny/letters`.
impl FromStr for StageId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (area, name) = text.split_once('/').unwrap_or((text, ""));
        let area = Area::ALL.into_iter().find(|known| known.as_str() == area).ok_or_else(|| {
            Error::InvalidName {
                name: text.to_owned(),
                reason: "it does not start with raw/, standardized/, models/, model-ready/ or done/",
            }
        })?;
        Self::new(area, name)
    }
}

/// Refuses an object's name within a stage's folder if it is not a safe path or is one of ours.
pub(crate) fn check_object_name(name: &str) -> Result<()> {
    check(name, &[&well_formed])?;
    let first = name.split('/').next().unwrap_or(name);
    if name == MANIFEST || first == JOURNAL {
        return Err(invalid(
            name,
            "manifest.json and journal/ belong to the commit protocol",
        ));
    }
    Ok(())
}

/// Whether a folder's name is a stage's short key.
pub(crate) fn is_key16(part: &str) -> bool {
    part.len() == 16 && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

type Rule<'a> = &'a dyn Fn(&str) -> Option<&'static str>;

fn check(name: &str, rules: &[Rule<'_>]) -> Result<()> {
    if name.len() > 512 || name.split('/').count() > 8 {
        return Err(invalid(name, "it is too long"));
    }
    let broken = name
        .split('/')
        .find_map(|part| rules.iter().find_map(|rule| rule(part)));
    broken.map_or(Ok(()), |reason| Err(invalid(name, reason)))
}

fn invalid(name: &str, reason: &'static str) -> Error {
    Error::InvalidName {
        name: name.to_owned(),
        reason,
    }
}

fn well_formed(part: &str) -> Option<&'static str> {
    if part.is_empty() {
        Some("a part is empty")
    } else if part.starts_with('.') || part.ends_with('.') {
        Some("a part starts or ends with a dot")
    } else if !part
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    {
        Some("it holds another character")
    } else {
        None
    }
}

/// Parts that would make a stage's own files ambiguous with another stage's name.
fn not_ours(part: &str) -> Option<&'static str> {
    if is_key16(part) {
        Some("a part looks like a stage key")
    } else if part == CURRENT {
        Some("current.json is the commit protocol's")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_paths_out_are_refused() {
        for name in [
            "",
            "/",
            "a//b",
            "/a",
            "a/",
            "..",
            "a/../b",
            ".hidden",
            "a/.",
            "a b",
            "a\\b",
            "a#1",
            "a%2e",
            "ä",
            "a\n",
            "current.json",
            "a/0123456789abcdef",
            "a/b/c/d/e/f/g/h/i",
        ] {
            assert!(StageId::models(name).is_err(), "{name:?}");
        }
        for name in [
            "tiny",
            "Qwen/Qwen2.5-0.5B",
            "a_b-c.d",
            "mlabonne/FineTome-100k",
        ] {
            assert_eq!(StageId::models(name).expect(name).name(), name);
        }
    }

    #[test]
    fn a_pair_checks_each_half() {
        assert!(StageId::done("a/", "b").is_err());
        assert!(StageId::done("", "b").is_err());
        assert_eq!(
            StageId::done("o/m", "d").expect("good").to_string(),
            "done/o/m/d"
        );
    }

    #[test]
    fn the_protocols_own_objects_are_reserved() {
        for name in ["manifest.json", "journal/00000.json", "journal", "../x"] {
            assert!(check_object_name(name).is_err(), "{name}");
        }
        for name in [
            "shard-00000-ab.parquet",
            "lora_model/manifest.json",
            "tokenizer.json",
        ] {
            check_object_name(name).expect(name);
        }
    }
}
