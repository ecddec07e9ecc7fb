//! Which of a folder's, prefix's or repository's files are meant: by its card, or by their names.

use std::collections::{BTreeMap, HashSet};

use super::card;
use super::files::Kind;
use super::resolve::SourceOptions;
use super::split::{files_of_split, is_description, missing_shard};
use crate::{Error, Result};

/// The data files of the split, or an error that says what was expected. `card` is the text of the
/// dataset card, if there is one.
pub(super) fn choose<'a>(
    spec: &str,
    names: &[&'a str],
    card: Option<&str>,
    options: &SourceOptions,
) -> Result<Vec<&'a str>> {
    let missing = |expected: String| Error::NoDataFiles {
        spec: spec.to_owned(),
        expected,
    };
    let data: Vec<&str> = names.iter().copied().filter(|name| is_data(name)).collect();
    if data.is_empty() {
        return Err(missing(
            ".jsonl .ndjson .json .parquet .arrow .csv .tsv .txt, each but Parquet also as .gz or .zst".to_owned(),
        ));
    }
    let configs = card.map_or(Ok(Vec::new()), card::configs)?;
    let (chosen, splits) = match (&configs[..], &options.config) {
        ([], Some(wanted)) => {
            return Err(missing(format!(
                "a README.md with the configuration {wanted}; name none"
            )));
        }
        ([], None) => (files_of_split(&data, &options.split), Vec::new()),
        (configs, wanted) => {
            let config = card::choose(configs, wanted.as_deref())
                .map_err(|names| missing(format!("one configuration; name one of {names}")))?;
            (by_config(config, &data, &options.split), config.splits())
        }
    };
    if chosen.is_empty() {
        let split = &options.split;
        return Err(missing(if splits.is_empty() {
            format!("names with '{split}'; choose another split")
        } else {
            format!(
                "files of the split '{split}'; choose one of {}",
                splits.join(", ")
            )
        }));
    }
    let chosen = of_one_family(spec, chosen);
    if let Some([one, other]) = twice(&chosen) {
        return Err(missing(format!(
            "one of {one} and {other}, which by their names hold the same rows; give one alone"
        )));
    }
    match missing_shard(&chosen) {
        Some(shard) => Err(missing(format!(
            "{shard}, which is not there; fetch the rest"
        ))),
        None => Ok(chosen),
    }
}

/// Whether a file can hold rows of a dataset, by its name.
pub(super) fn is_data(name: &str) -> bool {
    Kind::of(name).is_some() && !is_description(name)
}

/// The files of the commonest family of kinds, as `datasets` has it: the others are the same rows
/// in another form, or none.
fn of_one_family<'a>(spec: &str, names: Vec<&'a str>) -> Vec<&'a str> {
    let family = |name: &&str| Kind::of(name).map(|(kind, _)| kind.family());
    let mut counts = BTreeMap::new();
    for name in &names {
        *counts.entry(family(name)).or_insert(0_usize) += 1;
    }
    let commonest = counts
        .iter()
        .max_by_key(|(family, count)| (**count, **family));
    let Some(commonest) = commonest.map(|(family, _)| *family) else {
        return names;
    };
    let (taken, left): (Vec<_>, Vec<_>) = names
        .into_iter()
        .partition(|name| family(name) == commonest);
    if let Some(first) = left.first() {
        tracing::warn!(spec, files = left.len(), first, family = ?commonest, "files of another kind than most are left out");
    }
    taken
}

/// Two files whose names differ in nothing but the endings that tell their kinds.
fn twice<'a>(names: &[&'a str]) -> Option<[&'a str; 2]> {
    let mut stems = BTreeMap::new();
    names.iter().find_map(|name| {
        let packed = [".gz", ".zst"]
            .iter()
            .find_map(|end| name.strip_suffix(end));
        let stem = packed.unwrap_or(name).rsplit_once('.')?.0;
        stems.insert(stem, *name).map(|other| [other, *name])
    })
}

/// The files that a configuration gives to a split, each once, in the order of its patterns.
fn by_config<'a>(config: &card::Config, data: &[&'a str], split: &str) -> Vec<&'a str> {
    let Some(patterns) = config.patterns(split) else {
        let folder = config
            .folder()
            .map(|folder| format!("{folder}/"))
            .unwrap_or_default();
        let within: Vec<&str> = data
            .iter()
            .copied()
            .filter(|name| name.starts_with(&folder))
            .collect();
        return files_of_split(&within, split);
    };
    let (mut chosen, mut seen) = (Vec::new(), HashSet::new());
    for pattern in patterns {
        let fitting = data
            .iter()
            .copied()
            .filter(|name| card::fits(&pattern, name));
        chosen.extend(fitting.filter(|name| seen.insert(*name)));
    }
    chosen
}
