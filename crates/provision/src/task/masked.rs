//! Tasks in `Debug`, without what their variables hold.

use std::fmt;

use super::{MountSource, Secret, Task};

/// Values shorter than this are words of everyday, not keys; secrets are hidden whatever their length.
const SHORT: usize = 4;

/// The names of variables with stars for values: those of an env file are not told from the task's own.
/// What the file's text was filled with, in paths, mounts and probes, is starred as well.
impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stars = |name: &String| (name.clone(), Secret::new(String::new()));
        let envs: std::collections::BTreeMap<_, _> = self.envs.keys().map(stars).collect();
        f.debug_struct("Task")
            .field("name", &self.name)
            .field("workdir", &Masked(self, &self.workdir))
            .field("setup", &self.setup)
            .field("run", &self.run)
            .field("envs", &envs)
            .field("secrets", &self.secrets)
            .field("resources", &self.resources)
            .field("num_nodes", &self.num_nodes)
            .field("file_mounts", &Masked(self, &self.file_mounts))
            .field("inputs", &self.inputs)
            .field("service", &Masked(self, &self.service))
            .finish()
    }
}

/// A part of a task whose text may have been filled with its variables.
struct Masked<'a, T>(&'a Task, &'a T);

impl<T: fmt::Debug> fmt::Debug for Masked<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match f.alternate() {
            true => format!("{:#?}", self.1),
            false => format!("{:?}", self.1),
        };
        f.write_str(&self.0.masked(&text))
    }
}

impl Task {
    /// The text with stars for every value that may be a secret.
    fn masked(&self, text: &str) -> String {
        let secrets = self.secrets.values().map(Secret::expose);
        let envs = self.envs.values().filter(|value| value.len() >= SHORT);
        let mut values: Vec<&String> = secrets.chain(envs).filter(|v| !v.is_empty()).collect();
        // A value that is part of another must not leave the other's rest.
        values.sort_by_key(|value| std::cmp::Reverse(value.len()));
        values.iter().fold(text.to_owned(), |text, value| {
            let quoted = format!("{value:?}");
            let escaped = quoted.trim_matches('"');
            text.replace(value.as_str(), "***").replace(escaped, "***")
        })
    }
}

impl fmt::Debug for MountSource {
    /// A URL without the login and the query it may have: there signed URLs keep their keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MountSource::Local(path) => f.debug_tuple("Local").field(path).finish(),
            MountSource::Bucket(url) => f.debug_tuple("Bucket").field(&public_part(url)).finish(),
        }
    }
}

/// A URL without login and query.
pub(crate) fn public_part(url: &str) -> String {
    let bare = url.split(['?', '#']).next().unwrap_or_default();
    match bare.split_once("://") {
        Some((scheme, rest)) => {
            let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
            let host = host.rsplit('@').next().unwrap_or_default();
            let slash = if path.is_empty() { "" } else { "/" };
            format!("{scheme}://{host}{slash}{path}")
        }
        None => bare.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EnvOverrides;

    #[test]
    fn no_value_of_a_variable_is_in_debug() {
        let yaml = "
workdir: ~/runs/$TOKEN
envs: {FROM_FILE:, PLAIN: plainvalue}
secrets: {KEY:, QUOTED:}
file_mounts:
  ~/data: s3://bucket/$KEY
  ~/more: https://me:$FROM_FILE@host/x?sig=$PLAIN
service:
  readiness_probe:
    path: /health?key=$KEY
    headers: {authorization: Bearer $FROM_FILE}
    post_data: {key: $KEY}
run: echo $TOKEN
";
        let file = "TOKEN=tokenvalue\nFROM_FILE=filevalue\n";
        let overrides = EnvOverrides::new().with_env_file(file).expect("file");
        let overrides = overrides
            .with_secret("KEY", "ab")
            .with_secret("QUOTED", "with \"quotes\"");
        let task = Task::from_yaml(yaml, &overrides).expect("task");
        let service = task.service.clone().expect("service");
        for text in [
            format!("{task:?}"),
            format!("{task:#?}"),
            format!("{overrides:?}"),
            format!("{:?}", Some(&task)),
        ] {
            for value in [
                "tokenvalue",
                "filevalue",
                "plainvalue",
                "\"ab\"",
                "/ab",
                "quotes",
            ] {
                assert!(!text.contains(value), "{value} in {text}");
            }
            assert!(text.contains("FROM_FILE"), "{text}");
        }
        // Parts of it say nothing either: a probe's header is a key more often than not.
        let text = format!("{service:?} {:?}", task.file_mounts);
        for value in ["filevalue", "key=", "sig="] {
            assert!(!text.contains(value), "{value} in {text}");
        }
    }

    #[test]
    fn a_url_is_shown_without_login_and_query() {
        for (url, shown) in [
            ("s3://bucket/a/b", "s3://bucket/a/b"),
            ("https://me:pw@host/x?sig=1#y", "https://host/x"),
            ("https://host?sig=1", "https://host"),
        ] {
            assert_eq!(public_part(url), shown);
        }
    }
}
