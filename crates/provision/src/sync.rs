//! A client's files on a node: the working folder, and the mounts of a task.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use tokio::process::Command;

use crate::error::{BoxError, Error, Result};
use crate::provider::{Endpoint, SshTarget};
use crate::shell::quote;
use crate::task::{FileMount, MountSource, public_part};
use crate::transport::{HostTransport, LogStream, ShellCommand};

/// Where the working folder lies under a node's home, as SkyPilot has it.
pub(crate) const WORKDIR: &str = "sky_workdir";

/// Copies folders to one node: by rsync where both sides have it, else as one tar file.
///
/// What `.skyignore` lists is left out; without one, what `.gitignore` files list. Nothing is deleted
/// on the node, and owners are not copied.
#[derive(Debug, Clone)]
pub struct Syncer {
    endpoint: Option<Endpoint>,
    transport: Arc<dyn HostTransport>,
    rsync: bool,
}

impl Syncer {
    /// Copies to the node at `endpoint`, which `transport` reaches.
    pub fn new(endpoint: Option<Endpoint>, transport: Arc<dyn HostTransport>) -> Self {
        Self {
            endpoint,
            transport,
            rsync: true,
        }
    }

    /// Never uses rsync.
    pub fn without_rsync(self) -> Self {
        Self {
            rsync: false,
            ..self
        }
    }

    /// Copies the contents of the folder `from` to `target` on the node.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no such folder; [`Error::Transport`] if it could not be copied.
    pub async fn folder(&self, from: &Path, target: &str) -> Result<()> {
        if !from.is_dir() {
            let error = std::io::Error::from(std::io::ErrorKind::NotADirectory);
            return Err(Error::io(from)(error));
        }
        if self.rsync && is_here("rsync").await && self.has_rsync().await {
            return self.by_rsync(from, target).await;
        }
        self.by_tar(from, target).await
    }

    async fn has_rsync(&self) -> bool {
        match &self.endpoint {
            Some(Endpoint::Local { .. }) => true,
            Some(Endpoint::Ssh { .. }) => self.on_node("command -v rsync").await.is_ok(),
            None => false,
        }
    }

    async fn by_rsync(&self, from: &Path, target: &str) -> Result<()> {
        let mut command = Command::new("rsync");
        command.args(["--archive", "--compress", "--no-owner", "--no-group"]);
        match from.join(".skyignore") {
            list if list.exists() => command.arg("--exclude-from").arg(list),
            _ => command.args(["--filter", "dir-merge,- .gitignore"]),
        };
        // A slash at the end: the contents, not the folder.
        let mut source = from.as_os_str().to_owned();
        source.push("/");
        command.arg(source);
        self.on_node(&format!("mkdir -p {}", quote(target))).await?;
        match &self.endpoint {
            Some(Endpoint::Local { dir }) => command.arg(dir.join("files").join(target)),
            Some(Endpoint::Ssh { target: login, dir }) => {
                command.arg("--rsh").arg(ssh_command(login));
                let user = login
                    .user
                    .as_ref()
                    .map_or(String::new(), |user| format!("{user}@"));
                let path = match target.strip_prefix('/') {
                    Some(_) => target.to_owned(),
                    None => format!("{dir}/files/{target}"),
                };
                command
                    .arg("--protect-args")
                    .arg(format!("{user}{}:{path}", login.host))
            }
            None => return Err(self.failed("the node has no address")),
        };
        run(command).await.map_err(|said| self.failed(said))
    }

    async fn by_tar(&self, from: &Path, target: &str) -> Result<()> {
        let archive = std::env::temp_dir().join(format!("updraft-{}.tar.gz", unique()));
        let mut command = Command::new("tar");
        command.args(["--create", "--gzip", "--file"]).arg(&archive);
        let list = ignored(from);
        if !from.join(".skyignore").exists() {
            command.arg("--exclude-vcs-ignores"); // those of folders further down
        }
        for pattern in list.lines() {
            command.arg(format!("--exclude={pattern}"));
        }
        command.arg("--directory").arg(from).arg(".");
        let packed = run(command).await.map_err(|said| self.failed(said));
        let sent = async {
            packed?;
            let name = format!(".updraft-sync-{}.tar.gz", unique());
            self.transport.put(&archive, Path::new(&name)).await?;
            let target = quote(target);
            let script = format!(
                "mkdir -p {target} && tar --extract --gzip --no-same-owner --file {name} --directory {target}; code=$?; rm -f {name}; exit $code"
            );
            self.on_node(&script).await
        };
        let result = sent.await;
        let _ = std::fs::remove_file(&archive); // it was never made if packing failed
        result
    }

    /// Runs a script in the node's home.
    async fn on_node(&self, script: &str) -> Result<()> {
        let command = ShellCommand {
            script: script.to_owned(),
            ..ShellCommand::default()
        };
        let mut process = self.transport.start(&command).await?;
        let mut said = Vec::new();
        while let Some(line) = process.lines.recv().await {
            if line.stream == LogStream::Stderr {
                said.push(line.text);
            }
        }
        match process.control.wait().await?.success() {
            true => Ok(()),
            false => Err(self.failed(said.join("; "))),
        }
    }

    fn failed(&self, source: impl Into<BoxError>) -> Error {
        Error::Transport {
            host: self.transport.host(),
            source: source.into(),
        }
    }
}

/// Puts a task's mounts on a node.
///
/// # Errors
/// [`Error::InvalidTask`] for an absolute path on this machine's own provider, which would write
/// outside the instance; [`Error::Io`] or [`Error::Transport`] for what could not be copied.
pub async fn mount_files(syncer: &Syncer, base: &Path, mounts: &[FileMount]) -> Result<()> {
    for mount in mounts {
        let target = mount.target.strip_prefix("~/").unwrap_or(&mount.target);
        let is_local = matches!(syncer.endpoint, Some(Endpoint::Local { .. }));
        if is_local && (target.starts_with('/') || target.split('/').any(|part| part == "..")) {
            return Err(Error::InvalidTask {
                what: format!(
                    "file mount `{target}` would write outside the instance on this machine; use a path under ~/"
                ),
            });
        }
        match &mount.source {
            MountSource::Bucket(url) => fetch(syncer, url, target).await?,
            MountSource::Local(source) => {
                let source = client_path(source, base);
                if source.is_dir() {
                    syncer.folder(&source, target).await?;
                } else {
                    syncer
                        .transport
                        .put(&source, &PathBuf::from(target))
                        .await?;
                }
            }
        }
    }
    Ok(())
}

/// A path of the client's as a task file writes it.
pub(crate) fn client_path(path: &str, base: &Path) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => base.join(path),
    }
}

/// Copies a bucket or a file of the net, by the node's own tool for it.
async fn fetch(syncer: &Syncer, url: &str, target: &str) -> Result<()> {
    let (from, to) = (quote(url), quote(target));
    let script = match url.split_once("://").map(|(scheme, _)| scheme) {
        Some("https" | "http") => {
            format!(
                "mkdir -p \"$(dirname {to})\" && curl --fail --silent --show-error --location --output {to} {from}"
            )
        }
        Some("s3") => format!("mkdir -p {to} && aws s3 sync --only-show-errors {from} {to}"),
        Some("gs" | "gcs") => {
            format!("mkdir -p {to} && gcloud storage rsync --recursive {from} {to}")
        }
        _ => {
            return Err(Error::InvalidTask {
                what: format!(
                    "file mount from `{}`: copy it in `setup`; only s3, gs and https are copied for you",
                    public_part(url)
                ),
            });
        }
    };
    syncer.on_node(&script).await
}

/// `ssh` with the target's key and pinned host keys, as rsync calls it.
fn ssh_command(target: &SshTarget) -> String {
    let mut words = "ssh -o StrictHostKeyChecking=yes -o BatchMode=yes".to_owned();
    if let Some(port) = target.port {
        words.push_str(&format!(" -p {port}"));
    }
    if let Some(identity) = &target.identity_file {
        words.push_str(&format!(" -i {}", quote(&identity.to_string_lossy())));
    }
    if let Some(known_hosts) = &target.known_hosts {
        let option = format!("UserKnownHostsFile={}", known_hosts.display());
        words.push_str(&format!(" -o {}", quote(&option)));
    }
    words
}

async fn is_here(program: &str) -> bool {
    let mut command = Command::new(program);
    command
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().await.is_ok_and(|status| status.success())
}

/// The patterns of the folder's own list, without the slashes that tar does not understand.
fn ignored(folder: &Path) -> String {
    let list = std::fs::read_to_string(folder.join(".skyignore"))
        .or_else(|_| std::fs::read_to_string(folder.join(".gitignore")))
        .unwrap_or_default();
    let lines = list.lines().map(str::trim);
    let patterns = lines.filter(|line| !line.is_empty() && !line.starts_with(['#', '!']));
    let plain: Vec<_> = patterns
        .map(|pattern| match pattern.strip_prefix('/') {
            Some(anchored) => format!("./{}", anchored.trim_end_matches('/')),
            None => pattern.trim_end_matches('/').to_owned(),
        })
        .collect();
    plain.join("\n")
}

/// Runs a program; its last words are the error.
async fn run(mut command: Command) -> std::result::Result<(), String> {
    let output = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await;
    let output = output.map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// A name that no other call of any process uses now.
fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}
