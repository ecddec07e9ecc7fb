//! The list of one's own machines, in the words of SkyPilot's `ssh_node_pools.yaml`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::provider::SshTarget;
use crate::resources::Accelerator;

/// One machine.
#[derive(Debug, Clone, PartialEq)]
pub struct SshHost {
    /// The pool it belongs to: the region of its offers.
    pub pool: String,
    /// How to log in.
    pub target: SshTarget,
    /// What it carries.
    pub accelerator: Option<Accelerator>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pool {
    user: Option<String>,
    port: Option<u16>,
    identity_file: Option<String>,
    known_hosts: Option<String>,
    accelerators: Option<String>,
    hosts: Vec<Host>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Host {
    Name(String),
    Full(Full),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Full {
    ip: String,
    user: Option<String>,
    port: Option<u16>,
    identity_file: Option<String>,
    known_hosts: Option<String>,
    accelerators: Option<String>,
}

/// Reads the machines of a file: pools by name, each with its hosts; a host's own word beats its
/// pool's.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Hosts`] if it does not say what it must.
pub fn read(path: &Path) -> Result<Vec<SshHost>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let wrong = |problem: String| Error::Hosts {
        path: path.to_owned(),
        problem,
    };
    let pools: std::collections::BTreeMap<String, Pool> = serde_saphyr::from_str(&text)
        .map_err(|error| wrong(error.without_snippet().to_string()))?;
    let mut hosts = Vec::new();
    for (pool, settings) in pools {
        for host in settings.hosts {
            let host = match host {
                Host::Name(ip) => Full {
                    ip,
                    user: None,
                    port: None,
                    identity_file: None,
                    known_hosts: None,
                    accelerators: None,
                },
                Host::Full(full) => full,
            };
            let file = |own: Option<String>, pools: &Option<String>| -> Option<PathBuf> {
                own.or_else(|| pools.clone()).map(|text| from_home(&text))
            };
            let accelerators = host.accelerators.or_else(|| settings.accelerators.clone());
            hosts.push(SshHost {
                pool: pool.clone(),
                target: SshTarget {
                    host: host.ip,
                    port: host.port.or(settings.port),
                    user: host.user.or_else(|| settings.user.clone()),
                    identity_file: file(host.identity_file, &settings.identity_file),
                    known_hosts: file(host.known_hosts, &settings.known_hosts),
                },
                accelerator: accelerators
                    .map(|text| accelerator(&text))
                    .transpose()
                    .map_err(wrong)?,
            });
        }
    }
    Ok(hosts)
}

fn from_home(text: &str) -> PathBuf {
    match (text.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(text),
    }
}

fn accelerator(text: &str) -> std::result::Result<Accelerator, String> {
    let (name, count) = text.split_once(':').unwrap_or((text, "1"));
    match count.trim().parse() {
        Ok(count) if count > 0 => Ok(Accelerator::new(name.trim(), count)),
        _ => Err(format!(
            "accelerators `{text}` must be a name and a number, such as A100:8"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_own_word_beats_its_pools() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("hosts.yaml");
        let text = "lab:\n  user: me\n  accelerators: L4:2\n  hosts:\n    - 10.0.0.1\n    - {ip: 10.0.0.2, user: you, port: 2222}\n";
        std::fs::write(&path, text).expect("write");
        let hosts = read(&path).expect("hosts");
        assert_eq!(hosts[0].target.user.as_deref(), Some("me"));
        assert_eq!(hosts[1].target.user.as_deref(), Some("you"));
        assert_eq!(hosts[1].target.port, Some(2222));
        assert_eq!(hosts[1].accelerator, Some(Accelerator::new("L4", 2)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("hosts.yaml");
        for text in [
            "lab: {}\n",
            "lab: {hosts: [a], accelerators: 'L4:x'}\n",
            "lab: {host: [a]}\n",
        ] {
            std::fs::write(&path, text).expect("write");
            assert!(matches!(read(&path), Err(Error::Hosts { .. })), "{text}");
        }
    }
}
