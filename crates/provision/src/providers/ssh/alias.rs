//! `ssh mycluster`: an alias per cluster, in files of our own that the user's configuration includes.

use std::path::Path;

use crate::error::{Error, Result};
use crate::provider::SshTarget;

/// Writes the alias of a cluster to `folder`, and includes the folder in the ssh configuration
/// `config` unless it is included already.
///
/// # Errors
/// [`Error::Io`].
pub fn write_alias(folder: &Path, config: &Path, cluster: &str, target: &SshTarget) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let mut text = format!("Host {cluster}\n  HostName {}\n", target.host);
    let mut line = |word: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&format!("  {word} {value}\n"));
        }
    };
    line("User", target.user.clone());
    line("Port", target.port.map(|port| port.to_string()));
    let path =
        |path: &Option<std::path::PathBuf>| path.as_ref().map(|p| format!("\"{}\"", p.display()));
    line("IdentityFile", path(&target.identity_file));
    line("UserKnownHostsFile", path(&target.known_hosts));
    line("StrictHostKeyChecking", Some("yes".to_owned()));
    let file = folder.join(format!("{cluster}.conf"));
    std::fs::write(&file, text).map_err(Error::io(file))?;
    let include = format!("Include \"{}/*.conf\"", folder.display());
    let before = std::fs::read_to_string(config).unwrap_or_default();
    if before.lines().any(|line| line.trim() == include) {
        return Ok(());
    }
    if let Some(parent) = config.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    // First: what follows a `Host` line belongs to that host.
    let sibling = config.with_extension("updraft-tmp");
    std::fs::write(&sibling, format!("{include}\n{before}")).map_err(Error::io(&sibling))?;
    std::fs::rename(&sibling, config).map_err(Error::io(config))
}

/// Removes the alias of a cluster.
///
/// # Errors
/// [`Error::Io`].
pub fn forget_alias(folder: &Path, cluster: &str) -> Result<()> {
    let file = folder.join(format!("{cluster}.conf"));
    match std::fs::remove_file(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(file)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_configuration_is_kept_and_included_once() {
        let dir = tempfile::tempdir().expect("folder");
        let (folder, config) = (dir.path().join("aliases"), dir.path().join("config"));
        std::fs::write(&config, "Host other\n  Port 1\n").expect("write");
        let target = SshTarget {
            host: "10.0.0.1".into(),
            port: Some(2222),
            ..SshTarget::default()
        };
        for cluster in ["a", "b"] {
            write_alias(&folder, &config, cluster, &target).expect("alias");
        }
        let text = std::fs::read_to_string(&config).expect("config");
        assert_eq!(text.matches("Include").count(), 1);
        assert!(text.ends_with("Host other\n  Port 1\n"));
        let alias = std::fs::read_to_string(folder.join("a.conf")).expect("alias");
        assert_eq!(
            alias,
            "Host a\n  HostName 10.0.0.1\n  Port 2222\n  StrictHostKeyChecking yes\n"
        );
        forget_alias(&folder, "a").expect("forget");
        forget_alias(&folder, "a").expect("twice");
        assert!(!folder.join("a.conf").exists());
    }
}
