//! What was launched, in SQLite: every instance has its row before it exists.

mod clusters;
mod nodes;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, Row, TransactionBehavior, params};

use crate::error::{Error, Result};
pub use clusters::{ClusterRow, ClusterStatus};
pub use nodes::{NodeRow, NodeState};

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
    created INTEGER NOT NULL,
    wait_for TEXT NOT NULL DEFAULT 'jobs_and_ssh'
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
    ended INTEGER,
    seen INTEGER,
    stopped INTEGER,
    stopped_seconds INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS services (
    name TEXT PRIMARY KEY,
    spec TEXT NOT NULL
);
";

/// The columns that a file of an earlier version lacks.
const GROWN: [(&str, &str); 3] = [
    ("seen", "INTEGER"),
    ("stopped", "INTEGER"),
    ("stopped_seconds", "INTEGER NOT NULL DEFAULT 0"),
];

/// The clusters, instances and services that this owner has launched.
///
/// Calls are short and block; several processes may use one folder.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    owner: String,
    db: Mutex<Connection>,
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
    /// [`Error::Io`] if the folder cannot be made, [`Error::State`](crate::Error::State) if the file is no database.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        let locks = dir.join("locks");
        std::fs::create_dir_all(&locks).map_err(Error::io(&locks))?;
        let failed = |source: rusqlite::Error| Error::State {
            path: dir.clone(),
            source: source.into(),
        };
        let mut db = Connection::open(dir.join("state.db")).map_err(failed)?;
        db.busy_timeout(BUSY).map_err(failed)?;
        db.pragma_update(None, "journal_mode", "WAL")
            .map_err(failed)?;
        // An intent must be on the disk before the provider is asked.
        db.pragma_update(None, "synchronous", "FULL")
            .map_err(failed)?;
        db.execute_batch(SCHEMA).map_err(failed)?;
        grow(&mut db).map_err(failed)?;
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
    /// [`Error::Busy`] if another holds it; [`Error::NoSuchCluster`] for what cannot be a name.
    pub fn lock(&self, cluster: &str) -> Result<ClusterLock> {
        if cluster.is_empty() || cluster.starts_with('.') || cluster.contains(['/', '\0']) {
            return Err(Error::NoSuchCluster {
                name: cluster.to_owned(),
            });
        }
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

    /// Records a service, or its new version.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn put_service(&self, name: &str, spec: &serde_json::Value) -> Result<()> {
        self.execute(
            "INSERT INTO services VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET spec = ?2",
            params![name, spec.to_string()],
        )
    }

    /// The services by name.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn services(&self) -> Result<Vec<(String, serde_json::Value)>> {
        self.query("SELECT name, spec FROM services ORDER BY name", [], |row| {
            let text: String = row.get(1)?;
            Ok((row.get(0)?, serde_json::from_str(&text).unwrap_or_default()))
        })
    }

    /// Forgets a service.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn forget_service(&self, name: &str) -> Result<()> {
        self.execute("DELETE FROM services WHERE name = ?1", [name])
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

/// Adds the columns that are missing; another process may do the same at this moment.
fn grow(db: &mut Connection) -> rusqlite::Result<()> {
    let known = "SELECT count(*) FROM pragma_table_info('nodes') WHERE name = ?1";
    let lacks = |db: &Connection, name: &str| {
        db.query_row(known, [name], |row| row.get(0))
            .map(|count: i64| count == 0)
    };
    for (name, kind) in GROWN {
        if lacks(db, name)? {
            let change = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            if lacks(&change, name)? {
                change.execute(&format!("ALTER TABLE nodes ADD COLUMN {name} {kind}"), [])?;
            }
            change.commit()?;
        }
    }
    Ok(())
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn time(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds.unsigned_abs())
}
