//! Environment variables of a task: the file's, the env file's, the command line's.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::secret::Secret;

/// Values that fill or replace a task's `envs`; the command line beats the env file.
#[derive(Debug, Clone, Default)]
pub struct EnvOverrides {
    values: BTreeMap<String, Secret<String>>,
    secrets: BTreeMap<String, Secret<String>>,
}

impl EnvOverrides {
    /// No overrides.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the lines of an env file: `NAME=VALUE`, `export NAME=VALUE`, quotes, `#` comments.
    ///
    /// # Errors
    /// [`Error::EnvFile`] names the first line that is none of these; the line's text is not
    /// repeated, because it may hold a secret.
    pub fn with_env_file(mut self, text: &str) -> Result<Self> {
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let line = line.strip_prefix("export ").unwrap_or(line);
            let (name, value) = line
                .split_once('=')
                .filter(|(name, _)| is_env_name(name.trim()))
                .ok_or(Error::EnvFile { line: index + 1 })?;
            self.values
                .insert(name.trim().to_owned(), Secret::new(unquote(value.trim())));
        }
        Ok(self)
    }

    /// Sets one variable, as `--env NAME=VALUE` does.
    pub fn with(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.values.insert(name.into(), Secret::new(value.into()));
        self
    }

    /// Sets one secret, as `--secret NAME=VALUE` does.
    pub fn with_secret(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.secrets.insert(name.into(), Secret::new(value.into()));
        self
    }

    /// Adds the lines of a secret file, which is written like an env file.
    ///
    /// # Errors
    /// As [`EnvOverrides::with_env_file`].
    pub fn with_secret_file(mut self, text: &str) -> Result<Self> {
        let file = EnvOverrides::new().with_env_file(text)?;
        self.secrets.extend(file.values);
        Ok(self)
    }

    /// The secrets given, whether or not the task declares them.
    pub(crate) fn secrets(&self) -> &BTreeMap<String, Secret<String>> {
        &self.secrets
    }

    /// The value given for a secret: as one, or as a variable.
    pub(crate) fn secret(&self, name: &str) -> Option<&Secret<String>> {
        self.secrets.get(name).or_else(|| self.values.get(name))
    }

    /// The value given for `name`.
    pub(crate) fn get(&self, name: &str) -> Option<&Secret<String>> {
        self.values.get(name)
    }

    /// Every value given, whether or not the task declares the variable.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Secret<String>)> {
        self.values.iter()
    }
}

/// Whether `name` may name an environment variable.
pub(crate) fn is_env_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Replaces `$NAME` and `${NAME}` by the values in `envs`; unknown names stay as they are.
pub(crate) fn substitute(text: &str, envs: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let (name, consumed) = match after
            .strip_prefix('{')
            .and_then(|inner| inner.split_once('}'))
        {
            Some((name, _)) => (name, name.len() + 2),
            None => {
                let end = after
                    .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                    .unwrap_or(after.len());
                (&after[..end], end)
            }
        };
        match envs.get(name) {
            Some(value) => out.push_str(value),
            None => out.push_str(&rest[at..at + 1 + consumed]),
        }
        rest = &after[consumed..];
    }
    out.push_str(rest);
    out
}

fn unquote(value: &str) -> String {
    for quote in ['"', '\''] {
        if let Some(inner) = value
            .strip_prefix(quote)
            .and_then(|v| v.strip_suffix(quote))
        {
            return inner.to_owned();
        }
    }
    value
        .split(" #")
        .next()
        .unwrap_or(value)
        .trim_end()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn env_file_dialect() {
        let text = "# comment\nexport A=1\nB = 'two words'\nC=x # note\nD=\"a=b\"\n";
        let envs = EnvOverrides::new().with_env_file(text).expect("valid file");
        let got: Vec<_> = envs
            .iter()
            .map(|(k, v)| format!("{k}={}", v.expose()))
            .collect();
        assert_eq!(got, ["A=1", "B=two words", "C=x", "D=a=b"]);
    }

    #[test]
    fn a_bad_line_is_named_but_not_shown() {
        let error = EnvOverrides::new()
            .with_env_file("A=1\nhunter2\n")
            .expect_err("no =");
        assert_eq!(error.to_string(), "env file line 2: expected NAME=VALUE");
    }

    #[test]
    fn substitution_leaves_unknown_names() {
        let envs = BTreeMap::from([("A".to_owned(), "x".to_owned())]);
        assert_eq!(substitute("$A/${A}/$B/${C}/$", &envs), "x/x/$B/${C}/$");
    }
}
