//! The node's jobs in SQLite, first in, first out.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use super::peers::{Head, Place};
use crate::error::{Error, Result};
use crate::provider::Lease;

/// A job as it is submitted.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct JobSpec {
    /// A name for people.
    pub name: Option<String>,
    /// Commands before `run`.
    pub setup: Option<String>,
    /// Commands that do the work.
    pub run: Option<String>,
    /// Variables of both; secrets among them.
    pub environment: BTreeMap<String, String>,
    /// Where they run; relative paths are under the node's home.
    pub workdir: Option<String>,
    /// The accelerators it needs of the node's.
    pub gpus: u32,
    /// The job's number on the cluster's head, where this node is not the head.
    pub head: Option<i64>,
    /// How many nodes it is on: its commands begin when all of them are through with its setup.
    #[serde(default)]
    pub nodes: u32,
}

impl fmt::Debug for JobSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobSpec")
            .field("name", &self.name)
            .field("variables", &self.environment.keys())
            .field("gpus", &self.gpus)
            .finish_non_exhaustive()
    }
}

/// Where a job is on its way; SkyPilot's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum QueueStatus {
    /// It waits for its turn.
    Pending,
    /// Its setup runs.
    SettingUp,
    /// Its commands run.
    Running,
    /// They ended with zero.
    Succeeded,
    /// They did not.
    Failed,
    /// Its setup did not.
    FailedSetup,
    /// Its processes were killed from outside, or the node went down under them.
    FailedDriver,
    /// Somebody cancelled it.
    Cancelled,
}

impl QueueStatus {
    /// Whether it will never change again.
    pub fn is_final(self) -> bool {
        !matches!(
            self,
            QueueStatus::Pending | QueueStatus::SettingUp | QueueStatus::Running
        )
    }

    /// The word, as it is stored and printed.
    pub fn word(self) -> &'static str {
        match self {
            QueueStatus::Pending => "PENDING",
            QueueStatus::SettingUp => "SETTING_UP",
            QueueStatus::Running => "RUNNING",
            QueueStatus::Succeeded => "SUCCEEDED",
            QueueStatus::Failed => "FAILED",
            QueueStatus::FailedSetup => "FAILED_SETUP",
            QueueStatus::FailedDriver => "FAILED_DRIVER",
            QueueStatus::Cancelled => "CANCELLED",
        }
    }

    pub(super) fn of(word: &str) -> Option<Self> {
        serde_json::from_value(word.into()).ok()
    }
}

/// A job as it stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRow {
    /// Its number, from 1, in the order of submission.
    pub id: i64,
    /// Its number on the cluster's head: its own, where this node is the head.
    pub head: i64,
    /// Its name.
    pub name: Option<String>,
    /// Where it is.
    pub status: QueueStatus,
    /// The accelerators it needs.
    pub gpus: u32,
    /// When it was submitted, in seconds since 1970.
    pub submitted: i64,
    /// When its processes were started.
    pub started: Option<i64>,
    /// When it ended.
    pub ended: Option<i64>,
    /// The code it ended with.
    pub exit_code: Option<i32>,
}

impl JobRow {
    /// Takes in what the same job is on another node: it is over when it is over on all of them, and
    /// has failed as soon as it has on one.
    pub fn join(&mut self, other: &JobRow) {
        // A job that failed on one node was cancelled on the others because of it.
        let weight = |job: &JobRow| match job.status {
            QueueStatus::Cancelled => 1,
            QueueStatus::Failed | QueueStatus::FailedSetup | QueueStatus::FailedDriver => 2,
            _ => 0,
        };
        if weight(self) > 0 && weight(self) >= weight(other) {
            return;
        }
        if weight(other) > 0 {
            (self.status, self.exit_code, self.ended) =
                (other.status, other.exit_code, other.ended);
        } else if !other.status.is_final() {
            self.status = match self.status.is_final() {
                true => other.status,
                false => self.status,
            };
            (self.exit_code, self.ended) = (None, None);
        } else {
            self.ended = self
                .ended
                .max(other.ended)
                .filter(|_| self.status.is_final());
        }
    }
}

/// A started job that may still run, for the runner.
pub(super) struct Started {
    pub(super) id: i64,
    pub(super) boot: String,
    pub(super) attempt: i64,
    pub(super) cancel: bool,
}

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT,
    status TEXT NOT NULL,
    gpus INTEGER NOT NULL,
    submitted INTEGER NOT NULL,
    started INTEGER,
    ended INTEGER,
    exit_code INTEGER,
    boot TEXT,
    attempt INTEGER NOT NULL DEFAULT 0,
    cancel INTEGER NOT NULL DEFAULT 0,
    head INTEGER
);
CREATE INDEX IF NOT EXISTS unfinished ON jobs (id) WHERE ended IS NULL;
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
";

/// The jobs of one node, in a folder.
#[derive(Debug)]
pub struct Queue {
    dir: PathBuf,
    db: Connection,
}

impl Queue {
    /// Opens the queue in `dir`, making it if need be.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::State`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        std::fs::create_dir_all(dir.join("jobs")).map_err(Error::io(&dir))?;
        let failed = |source: rusqlite::Error| Error::State {
            path: dir.clone(),
            source: source.into(),
        };
        let db = Connection::open(dir.join("queue.db")).map_err(failed)?;
        db.busy_timeout(Duration::from_secs(30)).map_err(failed)?;
        db.pragma_update(None, "journal_mode", "WAL")
            .map_err(failed)?;
        db.pragma_update(None, "synchronous", "NORMAL")
            .map_err(failed)?;
        db.execute_batch(SCHEMA).map_err(failed)?;
        Ok(Self { dir, db })
    }

    /// Adds a job and returns its number. What it runs is written before its row.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::State`]; then there is no job.
    pub fn submit(&self, spec: &JobSpec, now: i64) -> Result<i64> {
        let transaction = self
            .db
            .unchecked_transaction()
            .map_err(|e| self.failed(e))?;
        self.db
            .execute(
                "INSERT INTO jobs (name, status, gpus, submitted, head) VALUES (?1, 'PENDING', ?2, ?3, ?4)",
                params![spec.name, spec.gpus, now, spec.head],
            )
            .map_err(|e| self.failed(e))?;
        let id = self.db.last_insert_rowid();
        super::wrapper::write(&self.job_dir(id), spec, id)?;
        self.release()?; // the files are there; from here on the job keeps the node
        transaction.commit().map_err(|e| self.failed(e))?;
        Ok(id)
    }

    /// Every job, by number.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn jobs(&self) -> Result<Vec<JobRow>> {
        self.query("SELECT * FROM jobs ORDER BY id", [], read_job)
    }

    /// The jobs that another node may still ask about.
    pub(super) fn recent(&self) -> Result<Vec<JobRow>> {
        let sql = "SELECT * FROM jobs WHERE ended IS NULL OR id > (SELECT max(id) FROM jobs) - 200";
        self.query(sql, [], read_job)
    }

    /// One job.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn job(&self, id: i64) -> Result<Option<JobRow>> {
        let row = self
            .db
            .query_row("SELECT * FROM jobs WHERE id = ?1", [id], read_job);
        row.optional().map_err(|e| self.failed(e))
    }

    /// Cancels one job, by its number on the head, or all; a waiting one at once, a running one as soon as the agent has seen
    /// it. Returns how many there were to cancel.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn cancel(&self, id: Option<i64>, now: i64) -> Result<usize> {
        let waiting: Vec<i64> = self.query(
            "UPDATE jobs SET status = 'CANCELLED', ended = ?2 WHERE status = 'PENDING' AND (?1 IS NULL OR coalesce(head, id) = ?1) RETURNING id",
            params![id, now],
            |row| row.get(0),
        )?;
        for id in &waiting {
            // No wrapper will come to take its variables away.
            let _ = std::fs::remove_file(self.job_dir(*id).join("env"));
        }
        let running = self.db.execute(
            "UPDATE jobs SET cancel = 1 WHERE ended IS NULL AND (?1 IS NULL OR coalesce(head, id) = ?1)",
            params![id],
        );
        Ok(waiting.len() + running.map_err(|e| self.failed(e))?)
    }

    /// The file that a job's output goes to.
    pub fn log(&self, id: i64) -> PathBuf {
        self.job_dir(id).join("run.log")
    }

    /// When the node ends by itself, and when it was last busy.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn lease(&self) -> Result<Option<Lease>> {
        let text = self.setting("lease")?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// Changes when the node ends by itself; the time counts from now.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn set_lease(&self, lease: &Lease, now: i64) -> Result<()> {
        let text = serde_json::to_string(lease).unwrap_or_default();
        self.set("lease", &text)?;
        self.touch(now)
    }

    pub(super) fn last_active(&self) -> Result<Option<i64>> {
        Ok(self
            .setting("last_active")?
            .and_then(|text| text.parse().ok()))
    }

    pub(super) fn touch(&self, now: i64) -> Result<()> {
        self.set("last_active", &now.to_string())
    }

    /// Keeps the node from being idle for so long: its client brings files, and says so again. Another
    /// client that is to be waited for longer is.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn hold(&self, until: i64) -> Result<()> {
        let sql = "INSERT INTO settings VALUES ('held_until', ?1) ON CONFLICT (name) DO UPDATE
             SET value = max(CAST(value AS INTEGER), CAST(?1 AS INTEGER))";
        let done = self.db.execute(sql, [until.to_string()]);
        done.map(drop).map_err(|e| self.failed(e))
    }

    /// Ends every hold.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn release(&self) -> Result<()> {
        self.set("held_until", "0")
    }

    pub(super) fn is_held(&self, now: i64) -> Result<bool> {
        let until = self
            .setting("held_until")?
            .and_then(|text| text.parse().ok());
        Ok(until.is_some_and(|until: i64| now < until))
    }

    /// The place of this node among those of its cluster; none where it is alone.
    pub(super) fn place(&self) -> Result<Option<Place>> {
        let text = self.setting("place")?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// Makes this node the head of its cluster: its agent will listen at `bind`. A head stays what it
    /// was made at first, so that the others find it again.
    ///
    /// # Errors
    /// [`Error::State`]; [`Error::Io`] if there is no free port.
    pub fn lead(&self, bind: IpAddr) -> Result<Head> {
        if let Some(Place::Head { head, .. }) = self.place()? {
            return Ok(head);
        }
        let bound = TcpListener::bind((bind, 0)).and_then(|bound| bound.local_addr());
        let port = bound.map_err(Error::io("a free port"))?.port();
        let secret = self
            .db
            .query_row("SELECT lower(hex(randomblob(16)))", [], |row| row.get(0))
            .map_err(|e| self.failed(e))?;
        let head = Head { port, secret };
        let place = Place::Head {
            bind,
            head: head.clone(),
        };
        self.set("place", &serde_json::to_string(&place).unwrap_or_default())?;
        Ok(head)
    }

    /// Makes this node one that follows the head of its cluster.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn follow(&self, place: &Place) -> Result<()> {
        self.set("place", &serde_json::to_string(place).unwrap_or_default())
    }

    /// The oldest waiting job.
    pub(super) fn next(&self) -> Result<Option<(i64, u32)>> {
        let query = "SELECT id, gpus FROM jobs WHERE status = 'PENDING' ORDER BY id LIMIT 1";
        let next = self
            .db
            .query_row(query, [], |row| Ok((row.get(0)?, row.get(1)?)));
        next.optional().map_err(|e| self.failed(e))
    }

    /// Takes a waiting job for this boot; `None` if it was cancelled in this moment. Returns the
    /// number of the attempt.
    pub(super) fn claim(&self, id: i64, boot: &str, now: i64) -> Result<Option<i64>> {
        let claimed = self.db.query_row(
            "UPDATE jobs SET status = 'SETTING_UP', boot = ?2, started = ?3, attempt = attempt + 1
             WHERE id = ?1 AND status = 'PENDING' RETURNING attempt",
            params![id, boot, now],
            |row| row.get(0),
        );
        claimed.optional().map_err(|e| self.failed(e))
    }

    /// Puts a job back whose processes never came to be.
    pub(super) fn unclaim(&self, id: i64) -> Result<()> {
        let sql =
            "UPDATE jobs SET status = 'PENDING', started = NULL WHERE id = ?1 AND ended IS NULL";
        let done = self.db.execute(sql, [id]);
        done.map(drop).map_err(|e| self.failed(e))
    }

    /// The jobs that have been started and have no final status.
    pub(super) fn started(&self) -> Result<Vec<Started>> {
        let sql = "SELECT id, boot, attempt, cancel FROM jobs WHERE ended IS NULL AND status != 'PENDING' ORDER BY id";
        self.query(sql, [], |row| {
            Ok(Started {
                id: row.get(0)?,
                boot: row.get(1)?,
                attempt: row.get(2)?,
                cancel: row.get(3)?,
            })
        })
    }

    /// Records that a job has gone on to its commands.
    pub(super) fn running(&self, id: i64) -> Result<()> {
        let sql = "UPDATE jobs SET status = 'RUNNING' WHERE id = ?1 AND status = 'SETTING_UP'";
        let done = self.db.execute(sql, [id]);
        done.map(drop).map_err(|e| self.failed(e))
    }

    /// Gives a job its final status; a job that has one keeps it.
    pub(super) fn finish(
        &self,
        id: i64,
        status: QueueStatus,
        exit_code: Option<i32>,
        now: i64,
    ) -> Result<()> {
        let done = self.db.execute(
            "UPDATE jobs SET status = ?2, exit_code = ?3, ended = ?4 WHERE id = ?1 AND ended IS NULL",
            params![id, status.word(), exit_code, now],
        );
        done.map(drop).map_err(|e| self.failed(e))
    }

    pub(super) fn job_dir(&self, id: i64) -> PathBuf {
        self.dir.join("jobs").join(id.to_string())
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether its folder is still there: a node that was taken down has none.
    pub(super) fn is_there(&self) -> bool {
        self.dir.join("queue.db").exists()
    }

    pub(super) fn setting(&self, name: &str) -> Result<Option<String>> {
        let query = "SELECT value FROM settings WHERE name = ?1";
        let value = self.db.query_row(query, [name], |row| row.get(0));
        value.optional().map_err(|e| self.failed(e))
    }

    pub(super) fn set(&self, name: &str, value: &str) -> Result<()> {
        let sql =
            "INSERT INTO settings VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = ?2";
        let done = self.db.execute(sql, params![name, value]);
        done.map(drop).map_err(|e| self.failed(e))
    }

    fn query<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let rows = self
            .db
            .prepare(sql)
            .and_then(|mut statement| statement.query_map(params, read)?.collect());
        rows.map_err(|e| self.failed(e))
    }

    fn failed(&self, source: rusqlite::Error) -> Error {
        Error::State {
            path: self.dir.clone(),
            source: source.into(),
        }
    }
}

fn read_job(row: &Row<'_>) -> rusqlite::Result<JobRow> {
    let status: String = row.get("status")?;
    Ok(JobRow {
        id: row.get("id")?,
        head: row.get::<_, Option<i64>>("head")?.unwrap_or(row.get("id")?),
        name: row.get("name")?,
        status: QueueStatus::of(&status).unwrap_or(QueueStatus::FailedDriver),
        gpus: row.get("gpus")?,
        submitted: row.get("submitted")?,
        started: row.get("started")?,
        ended: row.get("ended")?,
        exit_code: row.get("exit_code")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_of_several_nodes_is_over_with_the_last_and_failed_with_the_first() {
        use QueueStatus::{Cancelled, Failed, Pending, Running, Succeeded};
        for (head, other, both) in [
            (Succeeded, Succeeded, Succeeded),
            (Succeeded, Running, Running),
            (Succeeded, Pending, Pending),
            (Running, Succeeded, Running),
            (Running, Failed, Failed),
            (Succeeded, Failed, Failed),
            (Failed, Running, Failed),
            (Cancelled, Succeeded, Cancelled),
            (Cancelled, Failed, Failed),
            (Failed, Cancelled, Failed),
        ] {
            let row = |status: QueueStatus, ended: i64| JobRow {
                id: 1,
                head: 1,
                name: None,
                status,
                gpus: 0,
                submitted: 0,
                started: None,
                ended: status.is_final().then_some(ended),
                exit_code: status.is_final().then_some(i32::from(status == Failed)),
            };
            let mut joined = row(head, 5);
            joined.join(&row(other, 7));
            assert_eq!(joined.status, both, "{head:?} and {other:?}");
            assert_eq!(joined.ended.is_some(), both.is_final());
            assert_eq!(joined.exit_code == Some(1), both == Failed);
        }
    }
}
