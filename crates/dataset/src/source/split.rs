//! Which of a repository's or folder's files belong to a split, by their names, as
//! `datasets` infers it.

/// The words a file or folder name may carry for a split.
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
    ("validation", &["validation", "valid", "dev", "val"]),
];

/// Files that describe a dataset but hold none of it.
const NO_DATA: [&str; 5] = [
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
];

/// The files of `split`, in the given order.
///
/// A name of the form `data/train-00000-of-00003.parquet` decides; else a keyword between
/// separators in a file or folder name; else every file is `train`.
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
    names.iter().find_map(|name| {
        let (before, number, total, after) = shard_number(name)?;
        let sibling = |index: u64| {
            let width = number.len();
            format!("{before}-{index:0width$}-of-{total}")
        };
        let is_there =
            |sibling: &String| names.iter().any(|name| name.starts_with(sibling.as_str()));
        let total: u64 = total.parse().ok()?;
        let lacking = (0..total.min(MOST_SHARDS))
            .map(sibling)
            .find(|name| !is_there(name))?;
        Some(format!("{lacking}{after}"))
    })
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

fn is_description(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    NO_DATA.contains(&file)
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

fn keyword_split(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let words = || name.split(|c: char| !c.is_ascii_alphabetic());
    KEYWORDS
        .iter()
        .find(|(_, keywords)| words().any(|word| keywords.contains(&word)))
        .map(|(split, _)| *split)
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
            ],
            "train",
            &["a.parquet", "b/c.parquet"],
        );
        check(&["a.parquet"], "test", &[]);
    }
}
