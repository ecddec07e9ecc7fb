//! `ssh mycluster`: an alias per cluster, in files of our own that the user's configuration includes.

use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
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
    put(&folder.join(format!("{cluster}.conf")), text.as_bytes())?;
    // A link is the user's way of keeping the file elsewhere: that file is the one to change.
    let config = match std::fs::canonicalize(config) {
        Ok(config) => config,
        Err(error) if error.kind() == ErrorKind::NotFound => config.to_owned(),
        Err(error) => return Err(Error::io(config)(error)),
    };
    let include = format!("Include \"{}/*.conf\"", folder.display());
    // Bytes: what the user has written need not be UTF-8.
    let before = match std::fs::read(&config) {
        Ok(before) => before,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Error::io(config)(error)),
    };
    let mut lines = before.split(|byte| *byte == b'\n');
    if lines.any(|line| line.trim_ascii() == include.as_bytes()) {
        return Ok(());
    }
    if let Some(parent) = config.parent() {
        let mut builder = std::fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(parent);
        made.map_err(Error::io(parent))?;
    }
    // First: what follows a `Host` line belongs to that host.
    put(
        &config,
        &[include.as_bytes(), b"\n", before.as_slice()].concat(),
    )
}

/// Replaces a file as a whole; it keeps its mode, and a new one is its owner's alone.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    let mode = std::fs::metadata(path).map_or(0o600, |old| old.permissions().mode() & 0o7777);
    let mut sibling = path.as_os_str().to_owned();
    sibling.push(format!(".updraft-{}", std::process::id()));
    let sibling = std::path::PathBuf::from(sibling);
    let written = || {
        let mut options = std::fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true);
        let mut file = options.mode(0o600).open(&sibling)?;
        file.write_all(bytes)?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        std::fs::rename(&sibling, path)
    };
    written().map_err(|error| {
        let _ = std::fs::remove_file(&sibling); // it may never have been
        Error::io(path)(error)
    })
}

/// Removes the alias of a cluster.
///
/// # Errors
/// [`Error::Io`].
pub fn forget_alias(folder: &Path, cluster: &str) -> Result<()> {
    let file = folder.join(format!("{cluster}.conf"));
    match std::fs::remove_file(&file) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(file)(error)),
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
    #[test]
    fn what_is_not_ours_in_the_configuration_stays_as_it_is() {
        let dir = tempfile::tempdir().expect("folder");
        let (real, link) = (dir.path().join("dotfiles"), dir.path().join("config"));
        let before = b"Host caf\xe9\n  Port 1\n";
        std::fs::write(&real, before).expect("write");
        std::fs::set_permissions(&real, PermissionsExt::from_mode(0o640)).expect("mode");
        std::os::unix::fs::symlink(&real, &link).expect("link");
        let target = SshTarget {
            host: "10.0.0.1".into(),
            ..SshTarget::default()
        };
        let folder = dir.path().join("aliases");
        write_alias(&folder, &link, "a", &target).expect("alias");
        let after = std::fs::read(&real).expect("config");
        assert!(after.ends_with(before) && after.starts_with(b"Include "));
        assert!(link.is_symlink());
        let mode =
            |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&real), 0o640);
        assert_eq!(mode(&folder.join("a.conf")), 0o600);
        // A configuration that was not there is its owner's alone, as is its folder.
        let fresh = dir.path().join("ssh/config");
        write_alias(&folder, &fresh, "a", &target).expect("alias");
        assert_eq!(mode(&fresh), 0o600);
        assert_eq!(mode(fresh.parent().expect("folder")), 0o700);
    }
}
