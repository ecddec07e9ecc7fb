//! Where the command's state lies, and the providers it has.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use updraft::provision::agent::AgentBinary;
use updraft::provision::providers::local::LocalProvider;
use updraft::provision::providers::ssh::{SshProvider, read_hosts};
use updraft::provision::{Catalog, Engine, Error, Provider, State};

/// The folder of the state: `UPDRAFT_HOME`, or `.updraft` in the user's home.
pub(crate) fn home() -> PathBuf {
    std::env::var_os("UPDRAFT_HOME").map_or_else(|| user_home().join(".updraft"), PathBuf::from)
}

pub(crate) fn user_home() -> PathBuf {
    std::env::home_dir().unwrap_or_else(|| PathBuf::from("."))
}

/// This machine, and those listed in `ssh.yaml` or, as SkyPilot has it, `~/.sky/ssh_node_pools.yaml`.
pub(crate) fn engine() -> Result<Engine, Error> {
    let home = home();
    let state = Arc::new(State::open(&home)?);
    let mut providers: Vec<Arc<dyn Provider>> =
        vec![Arc::new(LocalProvider::new(home.join("instances"))?)];
    let lists = [
        home.join("ssh.yaml"),
        user_home().join(".sky/ssh_node_pools.yaml"),
    ];
    if let Some(list) = lists.iter().find(|list| list.exists()) {
        providers.push(Arc::new(SshProvider::new(read_hosts(list)?)));
    }
    Ok(Engine::new(state, providers))
}

/// This program is the agent too.
pub(crate) fn agent() -> Result<AgentBinary, Error> {
    let program = std::env::current_exe().map_err(|source| Error::Io {
        path: "this program".into(),
        source,
    })?;
    AgentBinary::new(program, "agent")
}

/// The prices of clouds: the table of the crate, the files that SkyPilot has fetched.
pub(crate) fn catalog() -> Result<Catalog, Error> {
    let mut catalog = Catalog::built_in();
    let folder = user_home().join(".sky/catalogs/v8");
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let cloud = entry.file_name().to_string_lossy().into_owned();
        if let Some(text) = read(&entry.path().join("vms.csv")) {
            catalog = catalog.merged(Catalog::from_csv(&cloud, &text)?.into_offers());
        }
    }
    Ok(catalog)
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}
