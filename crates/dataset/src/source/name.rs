//! The name of a dataset, from what a person typed for its source.

use std::path::Path;

use super::SourceOptions;
use super::files::Kind;

/// The name under which a source is kept when none is given: `owner/name` of the Hub, the last
/// part of a path or URL without its endings as a data file, and after a `-` the configuration and
/// the split, if they are not the default ones.
///
/// ```
/// use updraft_dataset::SourceOptions;
/// use updraft_dataset::source::default_name;
///
/// let mut options = SourceOptions::default();
/// assert_eq!(default_name("teknium/OpenHermes-2.5", &options), "teknium/OpenHermes-2.5");
/// assert_eq!(default_name("s3://bucket/chats-2.5.jsonl.zst", &options), "chats-2.5");
/// options.split = "test".to_owned();
/// assert_eq!(default_name("openai/gsm8k", &options), "openai/gsm8k-test");
/// assert_eq!(default_name("../.chats", &SourceOptions::default()), "chats");
/// assert_eq!(default_name(".", &SourceOptions::default()), "dataset");
/// ```
pub fn default_name(spec: &str, options: &SourceOptions) -> String {
    let spec = spec.trim_end_matches('/');
    let is_hub =
        spec.split('/').count() == 2 && !spec.starts_with('.') && !Path::new(spec).exists();
    let last = spec.rsplit('/').next().unwrap_or(spec);
    let stem = || {
        let stem = last.strip_suffix(".gz").or(last.strip_suffix(".zst"));
        let stem = stem.unwrap_or(last);
        stem.rsplit_once('.').map_or(stem, |(stem, _)| stem)
    };
    let name = match Kind::of(last) {
        _ if is_hub => spec,
        Some(_) => stem(),
        None => last,
    };
    let split = (options.split != SourceOptions::default().split).then_some(&options.split);
    let name = [options.config.as_ref(), split]
        .into_iter()
        .flatten()
        .fold(name.to_owned(), |name, part| format!("{name}-{part}"));
    let is_kept = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    let name = name.replace(|c| !is_kept(c), "_");
    match name.trim_matches('.') {
        "" => "dataset".to_owned(),
        name => name.to_owned(),
    }
}
