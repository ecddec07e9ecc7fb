//! Which of a repository's or folder's files belong to a split, by their names, as
//! `datasets` infers it.

use std::collections::{BTreeMap, BTreeSet};

/// The words a file or folder name may carry for a split.
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
    ("validation", &["validation", "valid", "dev", "val"]),
];

/// Files that describe a dataset but hold none of it.
const NO_DATA: [&str; 5] = [
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
];

/// Texts about a dataset, by the word that their names begin with.
const ABOUT: [&str; 9] = [
    "authors",
    "changelog",
    "citation",
    "copying",
    "licence",
    "license",
    "notice",
    "readme",
    "requirements",
];

/// The files of `split`, in the given order.
///
/// A name of the form `data/train-00000-of-00003.parquet` decides; else a keyword between
/// separators in the file's name, or else in that of the nearest folder with one; else every
/// file is `train`.
pub(super) fn files_of_split<'a>(names: &[&'a str], split: &str) -> Vec<&'a str> {
    let names: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| !is_description(name))
        .collect();
    let sharded = |name: &&str| {
        name.strip_prefix("data/")
            .is_some_and(|rest| sharded_split(rest).is_some())
    };
    if names.iter().any(sharded) {
        let belongs =
            |name: &&str| name.strip_prefix("data/").and_then(sharded_split) == Some(split);
        return names.into_iter().filter(belongs).collect();
    }
    if names.iter().any(|name| keyword_split(name).is_some()) {
        return names
            .into_iter()
            .filter(|name| keyword_split(name) == Some(split))
            .collect();
    }
    if split == "train" { names } else { Vec::new() }
}

/// A file that names of the form `train-00000-of-00003` promise and that is not among them.
pub(super) fn missing_shard(names: &[&str]) -> Option<String> {
    let mut sets: BTreeMap<(&str, &str), Set<'_>> = BTreeMap::new();
    for name in names {
        let Some((before, number, total, after)) = shard_number(name) else {
            continue;
        };
        let set = sets.entry((before, total)).or_insert(Set {
            after,
            width: number.len(),
            there: BTreeSet::new(),
        });
        set.there.extend(number.parse::<u64>());
    }
    sets.into_iter().find_map(|((before, total), set)| {
        let promised = total.parse().unwrap_or(u64::MAX).min(MOST_SHARDS);
        let lacking = (0..promised).find(|index| !set.there.contains(index))?;
        let width = set.width;
        Some(format!(
            "{before}-{lacking:0width$}-of-{total}{}",
            set.after
        ))
    })
}

/// The shards of one set that are there, and how their names are written.
struct Set<'a> {
    after: &'a str,
    width: usize,
    there: BTreeSet<u64>,
}

/// More shards than any repository has.
const MOST_SHARDS: u64 = 100_000;

/// `data/train`, `00000`, `00003` and `.parquet` in `data/train-00000-of-00003.parquet`.
fn shard_number(name: &str) -> Option<(&str, &str, &str, &str)> {
    let at = name.rfind("-of-")?;
    let (before, number) = name[..at].rsplit_once('-')?;
    let rest = &name[at + 4..];
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (total, after) = rest.split_at(digits);
    let is_number = |part: &str| part.len() >= 5 && part.bytes().all(|b| b.is_ascii_digit());
    (is_number(number) && is_number(total)).then_some((before, number, total, after))
}

/// Whether a file only says something about a dataset, or is hidden.
pub(super) fn is_description(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    let word = file.split(|c: char| !c.is_ascii_alphabetic()).next();
    NO_DATA.contains(&&*file)
        || (file.ends_with(".txt") && word.is_some_and(|word| ABOUT.contains(&word)))
        || name
            .split('/')
            .any(|part| part.starts_with('.') || part.starts_with("__"))
}

/// `train` in `train-00000-of-00003.parquet`.
fn sharded_split(file: &str) -> Option<&str> {
    let stem = file.split('.').next()?;
    let mut parts = stem.rsplitn(4, '-');
    let (total, of, index, split) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let number = |part: &str| part.len() >= 5 && part.bytes().all(|b| b.is_ascii_digit());
    // A fingerprint may follow the total: train-00000-of-00001-abcdef.
    (of == "of" && number(total) && number(index)).then_some(split)
}

/// The split that the file's name speaks of, or else the nearest folder's that speaks of one.
fn keyword_split(name: &str) -> Option<&'static str> {
    name.rsplit('/').find_map(|part| {
        let part = part.to_ascii_lowercase();
        let words = || part.split(|c: char| !c.is_ascii_alphabetic());
        KEYWORDS
            .iter()
            .find(|(_, keywords)| words().any(|word| keywords.contains(&word)))
            .map(|(split, _)| *split)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(names: &[&str], split: &str, expected: &[&str]) {
        assert_eq!(
            files_of_split(names, split),
            expected,
            "{split} of {names:?}"
        );
    }

    #[test]
    fn sharded_names_decide() {
        let names = [
            "README.md",
            "data/test-00000-of-00001.parquet",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "train_extra.json",
        ];
        check(&names, "train", &names[2..4]);
        check(&names, "test", &names[1..2]);
        check(&names, "validation", &[]);
    }

    #[test]
    fn a_shard_that_is_promised_and_absent_is_named() {
        let whole = [
            "a/train-00000-of-00002-ab12.parquet",
            "a/train-00001-of-00002-cd34.parquet",
            "b.jsonl",
        ];
        assert_eq!(missing_shard(&whole), None);
        assert_eq!(
            missing_shard(&[
                "train-00000-of-00003.parquet",
                "train-00002-of-00003.parquet"
            ])
            .as_deref(),
            Some("train-00001-of-00003.parquet")
        );
        assert_eq!(missing_shard(&["out-of-00002.csv", "-of-.json"]), None);
    }

    #[test]
    fn many_shards_are_looked_at_once() {
        let names: Vec<String> = (0..50_000)
            .map(|shard| format!("train-{shard:05}-of-50001.parquet"))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let started = std::time::Instant::now();
        let missing = missing_shard(&names);
        assert_eq!(missing.as_deref(), Some("train-50000-of-50001.parquet"));
        // Were each name looked for among all, this would take hours.
        assert!(started.elapsed().as_secs() < 30);
    }

    #[test]
    fn keywords_in_files_and_folders() {
        check(
            &["gsm8k_train.jsonl", "gsm8k_test.jsonl"],
            "train",
            &["gsm8k_train.jsonl"],
        );
        check(
            &["val/a.json", "training/a.json"],
            "validation",
            &["val/a.json"],
        );
        check(&["eval.csv", "train.csv"], "test", &["eval.csv"]);
        let nested = ["training_data/test.jsonl", "training_data/all.jsonl"];
        check(&nested, "test", &nested[..1]);
        check(&nested, "train", &nested[1..]);
        check(&["test/train/a.csv"], "train", &["test/train/a.csv"]);
        check(
            &["constraint.json", "brain.json"],
            "train",
            &["constraint.json", "brain.json"],
        );
    }

    #[test]
    fn without_a_hint_all_is_train() {
        check(
            &[
                "a.parquet",
                "b/c.parquet",
                ".git/x.json",
                "dataset_infos.json",
                "LICENSE.txt",
                "docs/requirements-dev.txt",
                "licensed.txt",
            ],
            "train",
            &["a.parquet", "b/c.parquet", "licensed.txt"],
        );
        check(&["a.parquet"], "test", &[]);
    }
}
