//! This machine as a provider: an instance is a folder, and the processes started in it.

mod transport;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::capability::StopStart;
use crate::error::{Error, Result};
use crate::groups::{self, replace};
use crate::offer::Offer;
use crate::provider::{
    CreateRequest, Endpoint, Guards, Instance, InstanceId, InstanceState, Provider,
};
pub use transport::LocalTransport;

/// The file that marks an instance as stopped; its agent writes it too.
const STOPPED: &str = "stopped";

/// How long the processes of a terminated instance may take to end by themselves.
const GRACE: Duration = Duration::from_secs(5);

/// Instances that are processes on this machine.
///
/// Every instance is a folder under `root` with a record of itself and of the process groups that
/// run in it, so that another process, or this one after a crash, finds and ends what was started.
#[derive(Debug, Clone)]
pub struct LocalProvider {
    root: PathBuf,
}

/// What `instance.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    cluster: String,
    token: String,
    /// Tags for people.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

impl LocalProvider {
    /// Keeps its instances under `root`, which is made when the first is created.
    ///
    /// # Errors
    /// [`Error::Io`] if `root` cannot be made absolute.
    pub fn new(root: impl AsRef<Path>) -> Result<Self> {
        let root = std::path::absolute(root.as_ref()).map_err(Error::io(root.as_ref()))?;
        Ok(Self { root })
    }

    /// What is free where the instances are, or will be.
    fn disk_gib(&self) -> Option<f64> {
        let there = self.root.ancestors().find(|folder| folder.exists())?;
        let disk = rustix::fs::statvfs(there).ok()?;
        Some(disk.f_bavail as f64 * disk.f_frsize as f64 / (1024.0 * 1024.0 * 1024.0))
    }

    fn dir(&self, id: &InstanceId) -> PathBuf {
        self.root.join(&id.0)
    }

    fn read(&self, id: &InstanceId) -> Result<Instance> {
        let path = self.dir(id).join("instance.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            // A file beside the folders is not an instance either.
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Err(Error::NoSuchInstance { id: id.to_string() });
            }
            Err(error) => return Err(Error::io(path)(error)),
        };
        let record: Record =
            serde_json::from_slice(&bytes).map_err(|error| Error::io(path)(error.into()))?;
        Ok(Instance {
            id: id.clone(),
            token: record.token,
            cluster: record.cluster,
            labels: record.labels,
            state: match self.dir(id).join(STOPPED).exists() {
                true => InstanceState::Stopped,
                false => InstanceState::Running,
            },
            endpoint: Some(Endpoint::Local { dir: self.dir(id) }),
            usd_per_hour: 0.0,
        })
    }
}

#[async_trait]
impl Provider for LocalProvider {
    fn name(&self) -> &'static str {
        "local"
    }

    fn guards(&self) -> Guards {
        Guards {
            free: true,
            ..Guards::default()
        }
    }

    /// The folder is the truth.
    fn settles(&self) -> Duration {
        Duration::ZERO
    }

    async fn offers(&self) -> Result<Vec<Offer>> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(vec![Offer {
            provider: self.name().to_owned(),
            instance_type: "localhost".to_owned(),
            region: "local".to_owned(),
            zone: None,
            cpus: cpus as f64,
            memory_gib: memory_gib().unwrap_or(0.0),
            disk_gib: self.disk_gib(),
            accelerator: None,
            spot: false,
            usd_per_hour: 0.0,
        }])
    }

    async fn create(&self, request: &CreateRequest) -> Result<Instance> {
        let id = InstanceId(file_name(&request.token)?);
        let dir = self.dir(&id);
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let record = Record {
            cluster: request.cluster.clone(),
            labels: request.labels.clone(),
            token: request.token.clone(),
        };
        let path = dir.join("instance.json");
        if !path.exists() {
            let text = serde_json::to_vec_pretty(&record)
                .map_err(|error| Error::io(&path)(error.into()))?;
            replace(&path, &text)?;
        }
        self.read(&id)
    }

    async fn describe(&self, id: &InstanceId) -> Result<Instance> {
        self.read(id)
    }

    async fn list_owned(&self, _near: Option<&Offer>) -> Result<Vec<Instance>> {
        let entries = match std::fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(&self.root)(error)),
        };
        let mut instances = Vec::new();
        for entry in entries {
            let name = entry.map_err(Error::io(&self.root))?.file_name();
            match self.read(&InstanceId(name.to_string_lossy().into_owned())) {
                Ok(instance) => instances.push(instance),
                Err(Error::NoSuchInstance { .. }) => {} // a folder that is not ours
                Err(error) => return Err(error),
            }
        }
        instances.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(instances)
    }

    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        let dir = self.dir(id);
        match self.read(id) {
            Ok(_) => {}
            Err(Error::NoSuchInstance { .. }) => return Ok(()),
            Err(error) => return Err(error),
        }
        groups::end_all(&dir, GRACE).await?;
        // The record goes last: an interrupted terminate still lists the instance.
        for name in ["groups", "files"] {
            let path = dir.join(name);
            match std::fs::remove_dir_all(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io(path)(error));
                }
                _ => {}
            }
        }
        match std::fs::remove_dir_all(&dir) {
            // Another client, or the instance itself, has ended it in this moment.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result.map_err(Error::io(dir)),
        }
    }

    fn stop_start(&self) -> Option<&dyn StopStart> {
        Some(self)
    }
}

#[async_trait]
impl StopStart for LocalProvider {
    async fn stop(&self, id: &InstanceId) -> Result<()> {
        // The marker goes first: an interrupted stop is a stopped instance to be stopped again.
        self.read(id)?;
        let marker = self.dir(id).join(STOPPED);
        replace(&marker, b"")?;
        groups::end_all(&self.dir(id), GRACE).await
    }

    async fn start(&self, id: &InstanceId) -> Result<Instance> {
        self.read(id)?;
        let marker = self.dir(id).join(STOPPED);
        match std::fs::remove_file(&marker) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(marker)(error)),
            _ => self.read(id),
        }
    }
}

/// A token as a file name: what is not a letter, digit or hyphen would let it leave the folder.
fn file_name(token: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if token.is_empty() || !token.chars().all(plain) {
        return Err(Error::InvalidTask {
            what: format!("cluster name `{token}` must be letters, digits, `-` and `_`"),
        });
    }
    Ok(token.to_owned())
}

/// The machine's memory, from the first line of `/proc/meminfo`.
fn memory_gib() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib: f64 = text
        .lines()
        .next()?
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()?;
    Some(kib / (1024.0 * 1024.0))
}

#[cfg(test)]
mod tests;
