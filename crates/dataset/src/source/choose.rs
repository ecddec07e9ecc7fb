//! Which of a folder's, prefix's or repository's files are meant: by its card, or by their names.

use super::card;
use super::files::Kind;
use super::resolve::SourceOptions;
use super::split::{files_of_split, missing_shard};
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
    let data: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| Kind::of(name).is_some())
        .collect();
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
    match missing_shard(&chosen) {
        Some(shard) => Err(missing(format!(
            "{shard}, which is not there; fetch the rest"
        ))),
        None => Ok(chosen),
    }
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
    let mut chosen: Vec<&str> = Vec::new();
    for pattern in patterns {
        let fitting = data
            .iter()
            .copied()
            .filter(|name| card::fits(&pattern, name));
        for name in fitting.collect::<Vec<_>>() {
            if !chosen.contains(&name) {
                chosen.push(name);
            }
        }
    }
    chosen
}
