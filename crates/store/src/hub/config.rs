//! Which Hub, with which token: from the usual places.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};

/// How to reach the Hub.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Where it is, without a path: `https://huggingface.co`.
    pub endpoint: String,
    /// Who asks; sent to `endpoint` only.
    pub token: Option<Token>,
    /// Refuse every network call with [`Error::Offline`]; what the cache holds can still be read.
    pub offline: bool,
    /// The cache that `huggingface_hub` fills, read where it holds a file and never written.
    pub cache: Option<PathBuf>,
    /// Offline, take the files of a commit that the cache holds without the commit's listing,
    /// though somebody may have fetched a part of them only.
    pub partial_cache: bool,
    /// The longest one request may take until its body begins, waiting for a busy server included
    /// and its own body not. The Hub counts requests in windows of five minutes, so less gives up
    /// on a full window.
    pub deadline: Duration,
    /// The longest a server may stay silent before its answer counts as broken off; after a body
    /// was sent, four times that.
    pub stall: Duration,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self {
            endpoint: "https://huggingface.co".to_owned(),
            token: None,
            offline: false,
            cache: None,
            partial_cache: false,
            deadline: Duration::from_secs(360),
            stall: Duration::from_secs(30),
        }
    }
}

impl HubConfig {
    /// Reads `HF_ENDPOINT`, `HF_HUB_OFFLINE`, and the token from `HF_TOKEN`, the file
    /// `HF_TOKEN_PATH` or `$HF_HOME/token` (by default `~/.cache/huggingface/token`), in this
    /// order; the files are left alone when `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set. The cache is
    /// `HF_HUB_CACHE` or `$HF_HOME/hub`, if there is such a folder; `UPDRAFT_PARTIAL_CACHE` sets
    /// [`partial_cache`](Self::partial_cache).
    ///
    /// # Errors
    /// [`Error::Denied`] if a token file is there but cannot be read.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// [`from_env`](Self::from_env) with the variables given.
    pub(crate) fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).filter(|value| !value.trim().is_empty());
        let is_set = |name: &str| {
            var(name).is_some_and(|value| {
                ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())
            })
        };
        let mut config = Self {
            offline: is_set("HF_HUB_OFFLINE"),
            partial_cache: is_set("UPDRAFT_PARTIAL_CACHE"),
            ..Self::default()
        };
        if let Some(endpoint) = var("HF_ENDPOINT") {
            endpoint
                .trim_end_matches('/')
                .clone_into(&mut config.endpoint);
        }
        config.cache = var("HF_HUB_CACHE")
            .map(PathBuf::from)
            .or_else(|| Some(home(var)?.join("hub")))
            .filter(|folder| folder.is_dir());
        config.token = match var("HF_TOKEN") {
            Some(token) => Some(Token::new(&token)),
            None if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") => None,
            None => token_file(var)
                .map(|path| read_token(&path))
                .transpose()?
                .flatten(),
        };
        Ok(config)
    }
}

fn token_file(var: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    match var("HF_TOKEN_PATH") {
        Some(path) => Some(path.into()),
        None => Some(home(var)?.join("token")),
    }
}

/// Where `huggingface_hub` keeps its files.
fn home(var: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    var("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(var("XDG_CACHE_HOME")?).join("huggingface")))
        .or_else(|| Some(PathBuf::from(var("HOME")?).join(".cache/huggingface")))
}

fn read_token(path: &Path) -> Result<Option<Token>> {
    match std::fs::read_to_string(path) {
        Ok(token) if token.trim().is_empty() => Ok(None),
        Ok(token) => Ok(Some(Token::new(&token))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Denied {
            url: path.display().to_string(),
            source: Box::new(source),
        }),
    }
}

/// A Hub token; `Debug` prints stars.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Takes a token, without the white space that files and copying leave around it.
    pub fn new(token: &str) -> Self {
        Self(token.trim().to_owned())
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vars: &[(&str, &str)]) -> HubConfig {
        let find = |name: &str| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        HubConfig::from_vars(find).expect("readable")
    }

    fn token(vars: &[(&str, &str)]) -> Option<String> {
        config(vars).token.map(|token| token.expose().to_owned())
    }

    #[test]
    fn the_token_comes_from_the_first_place_that_has_one() {
        let home = tempfile::tempdir().expect("a folder");
        let path = home.path().join("elsewhere");
        std::fs::write(home.path().join("token"), "from-home\n").expect("write");
        std::fs::write(&path, " from-path ").expect("write");
        let home = ("HF_HOME", home.path().to_str().expect("plain"));
        let path = ("HF_TOKEN_PATH", path.to_str().expect("plain"));

        assert_eq!(token(&[]), None);
        assert_eq!(token(&[home]).as_deref(), Some("from-home"));
        assert_eq!(token(&[home, path]).as_deref(), Some("from-path"));
        assert_eq!(
            token(&[home, path, ("HF_TOKEN", "direct")]).as_deref(),
            Some("direct")
        );
        assert_eq!(token(&[home, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert_eq!(token(&[home, ("HF_TOKEN_PATH", "/nowhere/at/all")]), None);
    }

    #[test]
    fn endpoint_and_offline_are_read() {
        let config = config(&[
            ("HF_ENDPOINT", "http://127.0.0.1:1/"),
            ("HF_HUB_OFFLINE", "ON"),
            ("UPDRAFT_PARTIAL_CACHE", "1"),
        ]);
        assert_eq!(config.endpoint, "http://127.0.0.1:1");
        assert!(config.offline && config.partial_cache);
    }

    #[test]
    fn the_cache_is_a_folder_that_is_there() {
        let home = tempfile::tempdir().expect("a folder");
        let hub = home.path().join("hub");
        let vars = [("HF_HOME", home.path().to_str().expect("plain"))];
        assert_eq!(config(&vars).cache, None);
        std::fs::create_dir(&hub).expect("made");
        assert_eq!(config(&vars).cache.as_deref(), Some(hub.as_path()));
        let elsewhere = [vars[0], ("HF_HUB_CACHE", "/nowhere/at/all")];
        assert_eq!(config(&elsewhere).cache, None);
    }

    #[test]
    fn debug_shows_no_token() {
        let config = HubConfig {
            token: Some(Token::new("hf_secret")),
            ..HubConfig::default()
        };
        assert!(!format!("{config:?}").contains("hf_secret"));
    }
}
