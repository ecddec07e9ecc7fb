//! The dataset card: which files its `configs` give to which split.

use serde::Deserialize;

use crate::{Error, Result};

/// The file that holds the card.
pub(super) const CARD: &str = "README.md";

/// One configuration: its splits' patterns.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    #[serde(rename = "config_name", default = "default_name")]
    name: String,
    #[serde(default)]
    data_files: Option<DataFiles>,
    #[serde(default)]
    data_dir: Option<String>,
    #[serde(default)]
    default: bool,
}

fn default_name() -> String {
    "default".to_owned()
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum DataFiles {
    One(String),
    Many(Vec<Entry>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Entry {
    Path(String),
    Split { split: String, path: Paths },
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Paths {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct Configs {
    configs: Vec<Config>,
}

/// The configurations of a card; none if it names none.
///
/// # Errors
/// [`Error::Corrupt`] if it names them in a way that cannot be read.
pub(super) fn configs(card: &str) -> Result<Vec<Config>> {
    let Some(block) = configs_block(card) else {
        return Ok(Vec::new());
    };
    serde_saphyr::from_str::<Configs>(&block)
        .map(|found| found.configs)
        .map_err(|err| Error::corrupt(CARD, format!("its configs cannot be read ({err})")))
}

/// The lines of the card's YAML that belong to `configs`: whatever else it holds is not ours to
/// judge.
fn configs_block(card: &str) -> Option<String> {
    let card = card.strip_prefix('\u{feff}').unwrap_or(card);
    let mut lines = card.lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let yaml = lines.take_while(|line| line.trim_end() != "---");
    let is_configs = |line: &&str| line.starts_with("configs:");
    let mut yaml = yaml.skip_while(|line| !is_configs(line));
    let first = yaml.next()?;
    let belongs = |line: &&str| line.starts_with([' ', '-', '#']) || line.trim().is_empty();
    let rest: Vec<&str> = yaml.take_while(belongs).collect();
    Some([&[first], &rest[..]].concat().join("\n"))
}

/// The configuration asked for, or else the one that is the default.
///
/// # Errors
/// The names to choose from.
pub(super) fn choose<'a>(
    configs: &'a [Config],
    wanted: Option<&str>,
) -> Result<&'a Config, String> {
    let named = |name: &str| configs.iter().find(|config| config.name == name);
    let found = match wanted {
        Some(name) => named(name),
        None if configs.len() == 1 => configs.first(),
        None => configs
            .iter()
            .find(|config| config.default)
            .or_else(|| named("default")),
    };
    found.ok_or_else(|| {
        let names: Vec<&str> = configs.iter().map(|config| config.name.as_str()).collect();
        names.join(", ")
    })
}

impl Config {
    /// The patterns of a split; `None` if the card leaves the splits to the files' names.
    pub(super) fn patterns(&self, split: &str) -> Option<Vec<String>> {
        let own = |path: &String| self.in_folder(path);
        let files = self.data_files.as_ref()?;
        Some(match files {
            DataFiles::One(path) if split == "train" => vec![own(path)],
            DataFiles::One(_) => Vec::new(),
            DataFiles::Many(entries) => entries
                .iter()
                .flat_map(|entry| match entry {
                    Entry::Path(path) if split == "train" => vec![own(path)],
                    Entry::Split { split: of, path } if of == split => match path {
                        Paths::One(path) => vec![own(path)],
                        Paths::Many(paths) => paths.iter().map(own).collect(),
                    },
                    _ => Vec::new(),
                })
                .collect(),
        })
    }

    /// The splits that the card names.
    pub(super) fn splits(&self) -> Vec<&str> {
        match &self.data_files {
            Some(DataFiles::Many(entries)) => entries
                .iter()
                .map(|entry| match entry {
                    Entry::Path(_) => "train",
                    Entry::Split { split, .. } => split,
                })
                .collect(),
            Some(DataFiles::One(_)) => vec!["train"],
            None => Vec::new(),
        }
    }

    /// The folder that the card restricts it to.
    pub(super) fn folder(&self) -> Option<&str> {
        self.data_dir
            .as_deref()
            .map(|dir| dir.trim_matches('/'))
            .filter(|dir| !dir.is_empty())
    }

    fn in_folder(&self, path: &str) -> String {
        let path = path.trim_start_matches("./");
        match self.folder() {
            Some(folder) => format!("{folder}/{path}"),
            None => path.to_owned(),
        }
    }
}

/// Whether a path fits a pattern: `*` and `?` within a part, `**` over parts, `[abc]` a choice.
pub(super) fn fits(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<&str>, Vec<&str>) =
        (pattern.split('/').collect(), path.split('/').collect());
    parts_fit(&pattern, &path)
}

fn parts_fit(pattern: &[&str], path: &[&str]) -> bool {
    match pattern.split_first() {
        None => path.is_empty(),
        Some((&"**", [])) => !path.is_empty(),
        Some((&"**", rest)) => (0..=path.len()).any(|skip| parts_fit(rest, &path[skip..])),
        Some((first, rest)) => path.split_first().is_some_and(|(part, after)| {
            part_fits(first.as_bytes(), part.as_bytes()) && parts_fit(rest, after)
        }),
    }
}

/// One part, by the greedy matcher that goes back to the last `*` only: linear for one `*`, never
/// worse than the product of the lengths.
fn part_fits(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut last_star = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            last_star = Some((p, t));
            p += 1;
        } else if let Some(next) = one_fits(&pattern[p..], text[t]) {
            p += next;
            t += 1;
        } else if let Some((star, from)) = last_star {
            last_star = Some((star, from + 1));
            (p, t) = (star + 1, from + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

/// How many bytes of the pattern fit this one byte; `None` if they do not.
fn one_fits(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern.first()? {
        b'?' => Some(1),
        b'[' => {
            let end = pattern.iter().position(|&byte| byte == b']')?;
            in_class(&pattern[1..end], byte).then_some(end + 1)
        }
        &literal => (literal == byte).then_some(1),
    }
}

fn in_class(class: &[u8], byte: u8) -> bool {
    let (negated, class) = match class.split_first() {
        Some((b'!' | b'^', rest)) => (true, rest),
        _ => (false, class),
    };
    let mut found = false;
    let mut at = 0;
    while at < class.len() {
        if class.get(at + 1) == Some(&b'-') && at + 2 < class.len() {
            found |= (class[at]..=class[at + 2]).contains(&byte);
            at += 3;
        } else {
            found |= class[at] == byte;
            at += 1;
        }
    }
    found != negated
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_a_shell() {
        for (pattern, path, expected) in [
            ("data/train-*", "data/train-00000-of-00001.parquet", true),
            ("data/train-*", "data/test-00000-of-00001.parquet", false),
            ("*.csv", "a.csv", true),
            ("*.csv", "b/a.csv", false),
            ("**/*.csv", "a.csv", true),
            ("**/*.csv", "b/c/a.csv", true),
            ("en/**", "en/x/y.json", true),
            ("en/**", "fr/x.json", false),
            ("a?[0-9].txt", "ab7.txt", true),
            ("a[!0-9].txt", "a7.txt", false),
            ("*a*b*c", "xxaxxbxxbxc", true),
            ("*a*b*c", "xxaxxbxxbx", false),
            ("a[", "a[", false),
        ] {
            assert_eq!(fits(pattern, path), expected, "{pattern} {path}");
        }
    }

    const CARD_TEXT: &str = "---
license: mit
tags: [a: b: not yaml we could read
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*
  - split: test
    path: [en/a.jsonl, en/b.jsonl]
- config_name: fr
  default: true
  data_dir: french
  data_files: '*.jsonl'
- config_name: es
  data_files: [x.csv, y.csv]
- config_name: bare
task_categories:
- text-generation
---
# configs:
";

    #[test]
    fn every_way_to_name_files_is_read() {
        let configs = configs(CARD_TEXT).expect("readable");
        let patterns = |name, split| choose(&configs, Some(name)).expect(name).patterns(split);
        let some = |paths: &[&str]| {
            Some(
                paths
                    .iter()
                    .map(|path| (*path).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(patterns("en", "train"), some(&["en/train-*"]));
        assert_eq!(patterns("en", "test"), some(&["en/a.jsonl", "en/b.jsonl"]));
        assert_eq!(patterns("en", "validation"), some(&[]));
        assert_eq!(patterns("fr", "train"), some(&["french/*.jsonl"]));
        assert_eq!(patterns("es", "train"), some(&["x.csv", "y.csv"]));
        assert_eq!(patterns("bare", "train"), None);
        assert_eq!(choose(&configs, None).expect("the default").name, "fr");
        assert_eq!(
            choose(&configs, Some("de")).expect_err("none"),
            "en, fr, es, bare"
        );
    }

    #[test]
    fn a_card_without_configs_says_nothing() {
        for card in [
            "",
            "# Title",
            "---\nlicense: mit\n---\nconfigs:\n- a",
            "configs:\n- a",
        ] {
            assert!(configs(card).expect("readable").is_empty(), "{card}");
        }
        assert!(configs("---\nconfigs: 7\n---\n").is_err());
    }
}
