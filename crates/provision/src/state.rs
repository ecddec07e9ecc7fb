//! What was launched, in SQLite: every instance has its row before it exists.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::{InstanceId, Lease};

/// How long another process may hold the database.
const BUSY: Duration = Duration::from_secs(10);

/// A child that was forked while we held a lock holds it too, until it runs its own program: a lock
/// that was just dropped may look taken for some milliseconds.
const LOCK_PAUSE: Duration = Duration::from_millis(10);
const LOCK_PAUSES: u32 = 20;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS owner (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS clusters (
    name TEXT PRIMARY KEY,
    status TEXT NOT NULL,
    task TEXT,
    num_nodes INTEGER NOT NULL,
    idle_seconds INTEGER,
    down INTEGER NOT NULL,
    created INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS nodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    cluster TEXT NOT NULL,
    node_rank INTEGER NOT NULL,
    provider TEXT NOT NULL,
    instance TEXT,
    state TEXT NOT NULL,
    offer TEXT NOT NULL,
    intended INTEGER NOT NULL,
    created INTEGER,
    ended INTEGER
);
CREATE TABLE IF NOT EXISTS services (
    name TEXT PRIMARY KEY,
    spec TEXT NOT NULL
);
";

/// The clusters, instances and services that this owner has launched.
///
/// Calls are short and block; several processes may use one folder.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    owner: String,
    db: Mutex<Connection>,
}

/// What a cluster does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ClusterStatus {
    /// Being launched, or its launch was interrupted.
    Init,
    /// All its nodes run.
    Up,
    /// All its nodes are stopped.
    Stopped,
}

/// A cluster as recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterRow {
    /// Its name.
    pub name: String,
    /// What it does.
    pub status: ClusterStatus,
    /// The name of the task it was last launched with.
    pub task: Option<String>,
    /// How many nodes it has.
    pub num_nodes: u32,
    /// When its nodes end by themselves.
    pub lease: Lease,
    /// When it was first launched.
    pub created: SystemTime,
}

/// Where an instance is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// The provider is about to be asked, or was asked and nobody heard the answer.
    Intended,
    /// The provider has said that it exists.
    Live,
    /// It was given up; if it exists, it is to be ended.
    Abandoned,
    /// It is being ended.
    Ending,
}

/// An instance as recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeRow {
    /// Names it before and after the provider has.
    pub token: String,
    /// Its cluster.
    pub cluster: String,
    /// Its place in the cluster.
    pub node_rank: u32,
    /// Its provider.
    pub provider: String,
    /// The provider's name of it, once known.
    pub instance: Option<InstanceId>,
    /// Where it is on its way.
    pub state: NodeState,
    /// What was taken.
    pub offer: Offer,
    /// When it was decided upon.
    pub intended: SystemTime,
    /// When it came into being.
    pub created: Option<SystemTime>,
    /// When the provider confirmed that it is gone.
    pub ended: Option<SystemTime>,
}

/// Held while one process works on a cluster.
#[derive(Debug)]
pub struct ClusterLock {
    _file: File,
}

impl State {
    /// Opens the state in `dir`, making both if need be.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be made, [`Error::State`] if the file is no database.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        let locks = dir.join("locks");
        std::fs::create_dir_all(&locks).map_err(Error::io(&locks))?;
        let failed = |source: rusqlite::Error| Error::State {
            path: dir.clone(),
            source: source.into(),
        };
        let db = Connection::open(dir.join("state.db")).map_err(failed)?;
        db.busy_timeout(BUSY).map_err(failed)?;
        db.pragma_update(None, "journal_mode", "WAL")
            .map_err(failed)?;
        // An intent must be on the disk before the provider is asked.
        db.pragma_update(None, "synchronous", "FULL")
            .map_err(failed)?;
        db.execute_batch(SCHEMA).map_err(failed)?;
        let fresh = "INSERT INTO owner SELECT lower(hex(randomblob(4))) WHERE NOT EXISTS (SELECT 1 FROM owner)";
        db.execute(fresh, []).map_err(failed)?;
        let owner = db
            .query_row("SELECT id FROM owner", [], |row| row.get(0))
            .map_err(failed)?;
        Ok(Self {
            dir,
            owner,
            db: Mutex::new(db),
        })
    }

    /// The folder it lies in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Tells this state's instances from those of others on the same account.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// Takes the cluster for this process, until the lock is dropped or the process ends.
    ///
    /// # Errors
    /// [`Error::Busy`] if another holds it.
    pub fn lock(&self, cluster: &str) -> Result<ClusterLock> {
        let path = self.dir.join("locks").join(cluster);
        let file = File::create(&path).map_err(Error::io(&path))?;
        let mut pauses = LOCK_PAUSES;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(ClusterLock { _file: file }),
                Err(TryLockError::WouldBlock) if pauses > 0 => {
                    pauses -= 1;
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Busy {
                        name: cluster.to_owned(),
                    });
                }
                Err(TryLockError::Error(error)) => return Err(Error::io(path)(error)),
            }
        }
    }

    /// Records a cluster, or what a new launch changes of it.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn put_cluster(&self, row: &ClusterRow) -> Result<()> {
        self.execute(
            "INSERT INTO clusters VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
             ON CONFLICT (name) DO UPDATE SET status = ?2, task = ?3, num_nodes = ?4, idle_seconds = ?5, down = ?6",
            params![
                row.name,
                row.status.word(),
                row.task,
                row.num_nodes,
                row.lease.idle.map(|idle| i64::try_from(idle.as_secs()).unwrap_or(i64::MAX)),
                row.lease.down,
                seconds(row.created),
            ],
        )
    }

    /// The cluster of that name.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn cluster(&self, name: &str) -> Result<Option<ClusterRow>> {
        let query = "SELECT * FROM clusters WHERE name = ?1";
        let row = self.db().query_row(query, [name], read_cluster).optional();
        row.map_err(|error| self.failed(error))
    }

    /// Every cluster, by name.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn clusters(&self) -> Result<Vec<ClusterRow>> {
        self.query("SELECT * FROM clusters ORDER BY name", [], read_cluster)
    }

    /// Changes what a cluster does.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn set_status(&self, name: &str, status: ClusterStatus) -> Result<()> {
        self.execute(
            "UPDATE clusters SET status = ?2 WHERE name = ?1",
            params![name, status.word()],
        )
    }

    /// Forgets a cluster, unless it still has instances.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn forget_cluster(&self, name: &str) -> Result<()> {
        self.execute(
            "DELETE FROM clusters WHERE name = ?1 AND NOT EXISTS
             (SELECT 1 FROM nodes WHERE cluster = ?1 AND ended IS NULL)",
            [name],
        )
    }

    /// Records that the provider of `offer` is about to be asked for an instance; returns its token.
    ///
    /// # Errors
    /// [`Error::State`]; then the provider must not be asked.
    pub fn intend(
        &self,
        cluster: &str,
        node_rank: u32,
        offer: &Offer,
        now: SystemTime,
    ) -> Result<String> {
        let text = serde_json::to_string(offer).map_err(|error| Error::State {
            path: self.dir.clone(),
            source: error.into(),
        })?;
        let db = self.db();
        db.execute(
            "INSERT INTO nodes (cluster, node_rank, provider, state, offer, intended) VALUES (?1, ?2, ?3, 'intended', ?4, ?5)",
            params![cluster, node_rank, offer.provider, text, seconds(now)],
        )
        .map_err(|error| self.failed(error))?;
        Ok(self.token(cluster, node_rank, db.last_insert_rowid()))
    }

    /// Records the provider's answer.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn created(&self, token: &str, instance: &InstanceId, now: SystemTime) -> Result<()> {
        self.execute(
            "UPDATE nodes SET state = 'live', instance = ?2, created = coalesce(created, ?3) WHERE id = ?1",
            params![row_id(token), instance.0, seconds(now)],
        )
    }

    /// Records that the instance, if there is one, is to be ended.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn set_node(&self, token: &str, state: NodeState) -> Result<()> {
        self.execute(
            "UPDATE nodes SET state = ?2 WHERE id = ?1",
            params![row_id(token), state.word()],
        )
    }

    /// Removes a row whose instance never came to be.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn never_was(&self, token: &str) -> Result<()> {
        self.execute("DELETE FROM nodes WHERE id = ?1", [row_id(token)])
    }

    /// Records the provider's confirmation that the instance is gone.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn ended(&self, token: &str, now: SystemTime) -> Result<()> {
        self.execute(
            "UPDATE nodes SET ended = ?2 WHERE id = ?1 AND ended IS NULL",
            params![row_id(token), seconds(now)],
        )
    }

    /// The instances that are not confirmed gone, by cluster and rank.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn open_nodes(&self) -> Result<Vec<NodeRow>> {
        self.nodes("ended IS NULL")
    }

    /// Every instance there ever was, for the bill.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn all_nodes(&self) -> Result<Vec<NodeRow>> {
        self.nodes("created IS NOT NULL")
    }

    /// Records a service, or its new version.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn put_service(&self, name: &str, spec: &serde_json::Value) -> Result<()> {
        self.execute(
            "INSERT INTO services VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET spec = ?2",
            params![name, spec.to_string()],
        )
    }

    /// The services by name.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn services(&self) -> Result<Vec<(String, serde_json::Value)>> {
        self.query("SELECT name, spec FROM services ORDER BY name", [], |row| {
            let text: String = row.get(1)?;
            Ok((row.get(0)?, serde_json::from_str(&text).unwrap_or_default()))
        })
    }

    /// Forgets a service.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn forget_service(&self, name: &str) -> Result<()> {
        self.execute("DELETE FROM services WHERE name = ?1", [name])
    }

    fn nodes(&self, which: &str) -> Result<Vec<NodeRow>> {
        let query = format!("SELECT * FROM nodes WHERE {which} ORDER BY cluster, node_rank, id");
        self.query(&query, [], |row| {
            let (id, cluster, node_rank) = (
                row.get("id")?,
                row.get::<_, String>("cluster")?,
                row.get("node_rank")?,
            );
            let offer: String = row.get("offer")?;
            let offer = serde_json::from_str(&offer).map_err(|error| {
                rusqlite::Error::FromSqlConversionFailure(
                    0,
                    rusqlite::types::Type::Text,
                    error.into(),
                )
            })?;
            Ok(NodeRow {
                token: self.token(&cluster, node_rank, id),
                cluster,
                node_rank,
                provider: row.get("provider")?,
                instance: row.get::<_, Option<String>>("instance")?.map(InstanceId),
                state: NodeState::of(&row.get::<_, String>("state")?),
                offer,
                intended: time(row.get("intended")?),
                created: row.get::<_, Option<i64>>("created")?.map(time),
                ended: row.get::<_, Option<i64>>("ended")?.map(time),
            })
        })
    }

    /// A name that no other row of any state has: owner, cluster, rank, row.
    fn token(&self, cluster: &str, node_rank: u32, id: i64) -> String {
        format!("{}-{cluster}-{node_rank}-{id}", self.owner)
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, source: rusqlite::Error) -> Error {
        Error::State {
            path: self.dir.clone(),
            source: source.into(),
        }
    }

    fn execute(&self, sql: &str, params: impl rusqlite::Params) -> Result<()> {
        let done = self.db().execute(sql, params);
        done.map(drop).map_err(|error| self.failed(error))
    }

    fn query<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let db = self.db();
        let rows = db
            .prepare(sql)
            .and_then(|mut statement| statement.query_map(params, read)?.collect());
        rows.map_err(|error| self.failed(error))
    }
}

fn read_cluster(row: &Row<'_>) -> rusqlite::Result<ClusterRow> {
    let status: String = row.get("status")?;
    Ok(ClusterRow {
        name: row.get("name")?,
        status: match status.as_str() {
            "up" => ClusterStatus::Up,
            "stopped" => ClusterStatus::Stopped,
            _ => ClusterStatus::Init,
        },
        task: row.get("task")?,
        num_nodes: row.get("num_nodes")?,
        lease: Lease {
            idle: row
                .get::<_, Option<i64>>("idle_seconds")?
                .map(|seconds| Duration::from_secs(seconds.unsigned_abs())),
            down: row.get("down")?,
        },
        created: time(row.get("created")?),
    })
}

impl ClusterStatus {
    fn word(self) -> &'static str {
        match self {
            ClusterStatus::Init => "init",
            ClusterStatus::Up => "up",
            ClusterStatus::Stopped => "stopped",
        }
    }
}

impl NodeState {
    fn word(self) -> &'static str {
        match self {
            NodeState::Intended => "intended",
            NodeState::Live => "live",
            NodeState::Abandoned => "abandoned",
            NodeState::Ending => "ending",
        }
    }

    fn of(word: &str) -> Self {
        match word {
            "live" => NodeState::Live,
            "abandoned" => NodeState::Abandoned,
            "ending" => NodeState::Ending,
            _ => NodeState::Intended,
        }
    }
}

/// The row a token ends with.
fn row_id(token: &str) -> i64 {
    let last = token.rsplit('-').next();
    last.and_then(|id| id.parse().ok()).unwrap_or(-1)
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn time(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds.unsigned_abs())
}
