//! Clusters in the books.

use std::time::{Duration, SystemTime};

use rusqlite::{OptionalExtension, Row, params};
use serde::Serialize;

use super::{State, seconds, time};
use crate::error::Result;
use crate::provider::Lease;
use crate::resources::WaitFor;

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

impl State {
    /// Records a cluster, or what a new launch changes of it.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn put_cluster(&self, row: &ClusterRow) -> Result<()> {
        self.execute(
            "INSERT INTO clusters (name, status, task, num_nodes, idle_seconds, down, created, wait_for)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
             ON CONFLICT (name) DO UPDATE SET status = ?2, task = ?3, num_nodes = ?4, idle_seconds = ?5, down = ?6, wait_for = ?8",
            params![
                row.name,
                row.status.word(),
                row.task,
                row.num_nodes,
                row.lease.idle.map(|idle| i64::try_from(idle.as_secs()).unwrap_or(i64::MAX)),
                row.lease.down,
                seconds(row.created),
                wait_word(row.lease.wait_for),
            ],
        )
    }

    /// The cluster of that name.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn cluster(&self, name: &str) -> Result<Option<ClusterRow>> {
        let query = "SELECT * FROM clusters WHERE name = ?1";
        let row = self.db().query_row(query, [name], read_cluster).optional();
        row.map_err(|error| self.failed(error))
    }

    /// Every cluster, by name.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn clusters(&self) -> Result<Vec<ClusterRow>> {
        self.query("SELECT * FROM clusters ORDER BY name", [], read_cluster)
    }

    /// Changes what a cluster does.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn set_status(&self, name: &str, status: ClusterStatus) -> Result<()> {
        self.execute(
            "UPDATE clusters SET status = ?2 WHERE name = ?1",
            params![name, status.word()],
        )
    }

    /// Forgets a cluster, unless it still has instances.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn forget_cluster(&self, name: &str) -> Result<()> {
        self.execute(
            "DELETE FROM clusters WHERE name = ?1 AND NOT EXISTS
             (SELECT 1 FROM nodes WHERE cluster = ?1 AND ended IS NULL)",
            [name],
        )
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
            wait_for: wait_of(&row.get::<_, String>("wait_for")?),
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

fn wait_word(wait_for: WaitFor) -> &'static str {
    match wait_for {
        WaitFor::JobsAndSsh => "jobs_and_ssh",
        WaitFor::Jobs => "jobs",
        WaitFor::None => "none",
    }
}

fn wait_of(word: &str) -> WaitFor {
    match word {
        "jobs" => WaitFor::Jobs,
        "none" => WaitFor::None,
        _ => WaitFor::JobsAndSsh,
    }
}
