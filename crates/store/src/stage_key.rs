//! The key of a stage: SHA-256 over everything that decides its output.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// SHA-256 of canonical JSON: object keys sorted by their bytes, no white space.
///
/// Two descriptions of the same inputs have the same key whatever the order of their
/// fields; a change of any value, at any depth, changes it. Values that JSON cannot hold
/// (NaN, infinities) become null, so validate them before they get here.
///
/// ```
/// use serde_json::json;
/// use updraft_store::StageKey;
///
/// let key = StageKey::of(&json!({"source": "letters.jsonl", "limit": 10}))?;
/// assert_eq!(key, StageKey::of(&json!({"limit": 10, "source": "letters.jsonl"}))?);
/// assert_ne!(key, StageKey::of(&json!({"limit": 11, "source": "letters.jsonl"}))?);
/// assert_eq!(key.key16(), &key.to_string()[..16]);
/// # Ok::<(), updraft_store::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StageKey([u8; 32]);

impl StageKey {
    /// The key of these inputs.
    ///
    /// # Errors
    /// [`Error::Json`] if the inputs cannot be written as JSON.
    pub fn of(inputs: &impl Serialize) -> Result<Self> {
        Ok(Self::of_value(&canonical(inputs, "a stage's inputs")?))
    }

    pub(crate) fn of_value(canonical: &Value) -> Self {
        Self(Sha256::digest(canonical.to_string()).into())
    }

    /// The first 16 hex digits: the name of the stage's folder.
    pub fn key16(&self) -> String {
        let mut hex = self.to_string();
        hex.truncate(16);
        hex
    }
}

impl fmt::Display for StageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for StageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StageKey({})", self.key16())
    }
}

impl FromStr for StageKey {
    type Err = Error;

    fn from_str(hex: &str) -> Result<Self> {
        let invalid = || Error::InvalidName {
            name: hex.to_owned(),
            reason: "a stage key is 64 hex digits",
        };
        if hex.len() != 64 || !hex.is_ascii() {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for StageKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StageKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

/// The lower-case hex SHA-256 of some bytes, as manifests record it.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn hex(digest: &[u8]) -> String {
    use fmt::Write as _;
    digest
        .iter()
        .fold(String::with_capacity(2 * digest.len()), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("a String takes every write");
            hex
        })
}

/// Turns a value into JSON whose objects are sorted by key at every depth.
pub(crate) fn canonical(value: &impl Serialize, what: &'static str) -> Result<Value> {
    serde_json::to_value(value)
        .map(sorted)
        .map_err(|source| Error::Json { what, source })
}

/// Sorts objects by key, whether or not `serde_json` preserves insertion order.
pub(crate) fn sorted(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(
                entries
                    .into_iter()
                    .map(|(key, value)| (key, sorted(value)))
                    .collect(),
            )
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_stable_across_versions_of_this_crate() {
        let key =
            StageKey::of(&json!({"b": [1, 2.5, "ü"], "a": {"y": null, "x": true}})).expect("key");
        // printf '{"a":{"x":true,"y":null},"b":[1,2.5,"ü"]}' | sha256sum
        assert_eq!(
            key.to_string(),
            sha256_hex("{\"a\":{\"x\":true,\"y\":null},\"b\":[1,2.5,\"ü\"]}".as_bytes())
        );
    }

    #[test]
    fn text_form_round_trips_and_refuses_others() {
        let key = StageKey::of(&1).expect("key");
        assert_eq!(key.to_string().parse::<StageKey>().expect("own text"), key);
        let json = serde_json::to_string(&key).expect("json");
        assert_eq!(
            serde_json::from_str::<StageKey>(&json).expect("own json"),
            key
        );
        for text in ["", "ab", &"g".repeat(64), &"ä".repeat(32)] {
            assert!(text.parse::<StageKey>().is_err(), "{text}");
        }
    }
}
