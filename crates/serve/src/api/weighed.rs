//! Values that are counted before anything is made of them.
//!
//! A field that is kept as it comes, such as a schema or a template's variables, takes seventy bytes
//! for each value where its JSON needs two: a body within its limit would fill the memory of a
//! machine.

use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

/// Values and names in one field that is kept as it comes at most.
const MAX_VALUES: usize = 1 << 18;

/// A field of at most `MOST` values and names, of which nothing is taken.
#[derive(Debug)]
pub(crate) struct Weighed<const MOST: usize>;

/// Every field that any request keeps as it comes.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct KeptFields {
    #[serde(default, rename = "chat_template_kwargs")]
    _chat_template_kwargs: Option<Weighed<MAX_VALUES>>,
    #[serde(default, rename = "json_schema")]
    _json_schema: Option<Weighed<MAX_VALUES>>,
    #[serde(default, rename = "messages")]
    _messages: Option<Weighed<MAX_VALUES>>,
    #[serde(default, rename = "metadata")]
    _metadata: Option<Weighed<MAX_VALUES>>,
    #[serde(default, rename = "response_format")]
    _response_format: Option<Weighed<MAX_VALUES>>,
    #[serde(default, rename = "structured_outputs")]
    _structured_outputs: Option<Weighed<MAX_VALUES>>,
    #[serde(default, rename = "text")]
    _text: Option<Weighed<MAX_VALUES>>,
    #[serde(default, rename = "tool_choice")]
    _tool_choice: Option<Weighed<MAX_VALUES>>,
}

/// What a response is asked, which may be prompts elsewhere.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct InputField {
    #[serde(default, rename = "input")]
    _input: Option<Weighed<MAX_VALUES>>,
}

impl<'de, const MOST: usize> Deserialize<'de> for Weighed<MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut left = MOST;
        let weigher = Weigher {
            left: &mut left,
            most: MOST,
        };
        weigher.deserialize(deserializer).map(|()| Self)
    }
}

/// Counts down.
struct Weigher<'a> {
    left: &'a mut usize,
    most: usize,
}

impl Weigher<'_> {
    fn count<E: Error>(&mut self) -> Result<(), E> {
        match self.left.checked_sub(1) {
            Some(left) => *self.left = left,
            None => {
                let most = self.most;
                return Err(E::custom(format!("at most {most} values are possible")));
            }
        }
        Ok(())
    }

    fn of_one(&mut self) -> Weigher<'_> {
        Weigher {
            left: self.left,
            most: self.most,
        }
    }
}

impl<'de> DeserializeSeed<'de> for Weigher<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Weigher<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(mut self) -> Result<(), E> {
        self.count()
    }

    fn visit_bool<E: Error>(mut self, _: bool) -> Result<(), E> {
        self.count()
    }

    fn visit_i64<E: Error>(mut self, _: i64) -> Result<(), E> {
        self.count()
    }

    fn visit_u64<E: Error>(mut self, _: u64) -> Result<(), E> {
        self.count()
    }

    fn visit_f64<E: Error>(mut self, _: f64) -> Result<(), E> {
        self.count()
    }

    fn visit_str<E: Error>(mut self, _: &str) -> Result<(), E> {
        self.count()
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        self.count()?;
        while list.next_element_seed(self.of_one())?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.count()?;
        while map.next_key::<IgnoredAny>()?.is_some() {
            self.count()?;
            map.next_value_seed(self.of_one())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_and_name_counts_wherever_it_is() {
        type Five = Weighed<5>;
        let fits = |json| serde_json::from_str::<Five>(json).is_ok();
        for json in [
            "[1, -1, 1.5, null]",
            r#"{"a": "x", "b": true}"#,
            "[[[[0]]]]",
        ] {
            assert!(fits(json), "{json}");
        }
        for json in [
            "[1, 2, 3, 4, 5]",
            r#"{"a": 1, "b": [0]}"#,
            "[[[[[0]]]]]",
            // Not even read to its end.
            "[[], [], [], [], [], nonsense",
        ] {
            assert!(!fits(json), "{json}");
        }
    }
}
