//! `tokenizer.json` in the one spelling that the fast engine reads.
//!
//! The engine's own converter makes a tree of the whole file and prints it
//! again, which for a vocabulary of 150,000 tokens takes most of a second. It
//! needs to see only the small parts, so here vocabulary and merges go past
//! it as text.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// An object whose members are not parsed.
type Members<'a> = BTreeMap<String, &'a RawValue>;

/// The canonical text; `None` where the converter must see all of it.
pub(super) fn quickly(text: &str) -> Option<String> {
    let root: Members<'_> = serde_json::from_str(text).ok()?;
    let model: Members<'_> = serde_json::from_str(root.get("model")?.get()).ok()?;
    let vocab = model.get("vocab")?.get();
    let merges = match model.get("merges") {
        Some(merges) => Some(pairs(merges.get())?),
        None => None,
    };

    let mut small_model = without(&model, "vocab")?;
    small_model.insert("vocab".to_owned(), empty_like(vocab)?);
    if let Some(merges) = &merges {
        small_model.insert("merges".to_owned(), empty_like(merges)?);
    }
    let mut small = without(&root, "model")?;
    small.insert("model".to_owned(), Value::Object(small_model));
    let mut small = Value::Object(small);
    tokenizers_fast::canonicalize_value(&mut small).ok()?;

    let mut large = vec![("vocab", vocab)];
    large.extend(merges.as_deref().map(|merges| ("merges", merges)));
    let model = print(small.get("model")?.as_object()?, &large);
    Some(print(small.as_object()?, &[("model", &model)]))
}

/// The members but one, and but the merges, parsed.
fn without(members: &Members<'_>, skipped: &str) -> Option<Map<String, Value>> {
    let small = members.iter();
    small
        .filter(|&(name, _)| name != skipped && name != "merges")
        .map(|(name, raw)| Some((name.clone(), serde_json::from_str(raw.get()).ok()?)))
        .collect()
}

/// What tells the converter the kind of a list or mapping.
fn empty_like(text: &str) -> Option<Value> {
    match text.as_bytes().first()? {
        b'{' => Some(Value::Object(Map::new())),
        b'[' => Some(Value::Array(Vec::new())),
        _ => None,
    }
}

/// An object with these members' values replaced by texts.
fn print(members: &Map<String, Value>, large: &[(&str, &str)]) -> String {
    let room: usize = large.iter().map(|(_, text)| text.len()).sum();
    let mut out = String::with_capacity(room + 4096);
    for (name, value) in members {
        out.push(if out.is_empty() { '{' } else { ',' });
        out.push_str(&Value::from(name.as_str()).to_string());
        out.push(':');
        match large.iter().find(|(replaced, _)| replaced == name) {
            Some((_, text)) => out.push_str(text),
            None => out.push_str(&value.to_string()),
        }
    }
    out.push('}');
    out
}

/// Merges as pairs; in old files each is one string with a space in it.
fn pairs(merges: &str) -> Option<Cow<'_, str>> {
    let first = merges.strip_prefix('[')?.trim_start();
    if !first.starts_with('"') {
        return Some(Cow::Borrowed(merges));
    }
    let mut list = serde_json::Deserializer::from_str(merges);
    let out = String::with_capacity(merges.len() * 4 / 3);
    let pairs = list.deserialize_seq(Pairs(out)).ok()?;
    Some(Cow::Owned(pairs))
}

struct Pairs(String);

impl<'de> Visitor<'de> for Pairs {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("merges in one string each")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<String, A::Error> {
        let Pairs(mut out) = self;
        out.push('[');
        while let Some(merge) = list.next_element::<&'de RawValue>()? {
            let (left, right) = halves(merge.get())
                .ok_or_else(|| serde::de::Error::custom("a merge for the converter"))?;
            out.push_str(if out.len() == 1 { "[\"" } else { ",[\"" });
            out.push_str(left);
            out.push_str("\",\"");
            out.push_str(right);
            out.push_str("\"]");
        }
        out.push(']');
        Ok(out)
    }
}

/// The two tokens of `"left right"`, as JSON spells them.
fn halves(merge: &str) -> Option<(&str, &str)> {
    let text = merge.strip_prefix('"')?.strip_suffix('"')?;
    // An escape could spell the space; the old format has a line of version.
    if text.contains("\\u") || text.starts_with('#') {
        return None;
    }
    text.split_once(' ')
        .filter(|(_, right)| !right.contains(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str) {
        let expected = tokenizers_fast::canonicalize_str(text).expect("canonical");
        let found = quickly(text).expect("quick");
        let value = |text: &str| serde_json::from_str::<Value>(text).expect("json");
        assert_eq!(value(&found), value(&expected));
    }

    const MODEL: &str = r#""type":"BPE","vocab":{"a":0,"b":1,"\"":2,"\u0120":3}"#;

    #[test]
    fn it_is_what_the_converter_writes() {
        check(&format!(
            r#"{{"model":{{{MODEL},"merges":["a b","\" a"]}}}}"#
        ));
        check(&format!(r#"{{"model":{{{MODEL},"merges":[["a","b"]]}}}}"#));
        check(&format!(
            r#"{{"version":"1.0","added_tokens":[{{"id":4,"content":"<e>"}}],"pre_tokenizer":{{"type":"ByteLevel","use_regex":true}},"model":{{{MODEL},"merges": [ "a b" ]}}}}"#
        ));
        check(
            r#"{"pre_tokenizer":{"type":"Metaspace","replacement":"▁"},"model":{"vocab":[["a",-1.5]],"unk_id":0}}"#,
        );
    }

    #[test]
    fn what_is_odd_is_left_to_the_converter() {
        for odd in [
            "",
            "[]",
            r#"{"model":[]}"#,
            r#"{"model":{"vocab":7}}"#,
            r##"{"model":{"vocab":{},"merges":["#version: 0.2","a b"]}}"##,
            r#"{"model":{"vocab":{},"merges":["a\u0020b"]}}"#,
            r#"{"model":{"vocab":{},"merges":["a b c"]}}"#,
            r#"{"model":{"vocab":{},"merges":["ab"]}}"#,
        ] {
            assert_eq!(quickly(odd), None, "{odd}");
        }
    }
}
