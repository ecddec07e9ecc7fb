//! Lists and maps that are read no further than they may be long: a field that is refused for its
//! length never takes more memory than one that is not.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// A collection of at most `MOST` entries.
#[derive(Debug, Clone, Default)]
pub(crate) struct Capped<C, const MOST: usize>(pub(crate) C);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Capped<Vec<T>, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_seq(List(PhantomData, MOST))
            .map(Self)
    }
}

impl<'de, V: Deserialize<'de>, const MOST: usize> Deserialize<'de>
    for Capped<BTreeMap<String, V>, MOST>
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_map(Map(PhantomData, MOST))
            .map(Self)
    }
}

/// The entries of a list, for visitors that meet one.
pub(crate) fn entries<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut list: A,
    most: usize,
) -> Result<Vec<T>, A::Error> {
    let mut entries = Vec::new();
    while let Some(entry) = list.next_element()? {
        if entries.len() == most {
            return Err(too_many(most));
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn too_many<E: Error>(most: usize) -> E {
    E::custom(format!("at most {most} entries are possible"))
}

struct List<T>(PhantomData<T>, usize);

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Vec<T>, A::Error> {
        entries(list, self.1)
    }
}

struct Map<V>(PhantomData<V>, usize);

impl<'de, V: Deserialize<'de>> Visitor<'de> for Map<V> {
    type Value = BTreeMap<String, V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some((key, value)) = map.next_entry()? {
            if entries.len() == self.1 {
                return Err(too_many(self.1));
            }
            entries.insert(key, value);
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_limit() {
        type Ids = Capped<Vec<u32>, 2>;
        let read = |json| serde_json::from_str::<Ids>(json);
        assert_eq!(read("[1, 2]").expect("as many as may be").0, [1, 2]);
        // What follows the third entry is not even JSON.
        let error = read("[1, 2, 3, nonsense").expect_err("one too many");
        assert!(error.to_string().contains("at most 2 entries"), "{error}");
        type Biases = Capped<BTreeMap<String, f64>, 1>;
        let read = |json| serde_json::from_str::<Biases>(json);
        assert_eq!(read(r#"{"1": 2}"#).expect("one").0.len(), 1);
        let error = read(r#"{"1": 2, "3": 4, nonsense"#).expect_err("one too many");
        assert!(error.to_string().contains("at most 1 entries"), "{error}");
    }
}
