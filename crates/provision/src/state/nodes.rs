//! Instances in the books: a row before each exists, until its provider says that it is gone.

use std::time::{Duration, SystemTime};

use rusqlite::params;

use super::{State, seconds, time};
use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::InstanceId;

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
    /// Since when its provider has it in lists.
    pub seen: Option<SystemTime>,
    /// Since when it is stopped.
    pub stopped: Option<SystemTime>,
    /// How long it was stopped before.
    pub stopped_before: Duration,
}

impl NodeRow {
    /// How long it has run until `now`: from its creation to its end, less the time it was stopped.
    pub fn ran(&self, now: SystemTime) -> Duration {
        let Some(created) = self.created else {
            return Duration::ZERO;
        };
        let until = self.ended.or(Some(now));
        let until = until.into_iter().chain(self.stopped).min().unwrap_or(now);
        let there = until.duration_since(created).unwrap_or_default();
        there.saturating_sub(self.stopped_before)
    }
}

impl State {
    /// Records that the provider of `offer` is about to be asked for an instance; returns its token.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State); then the provider must not be asked.
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
    /// [`Error::State`](crate::Error::State).
    pub fn created(&self, token: &str, instance: &InstanceId, now: SystemTime) -> Result<()> {
        self.execute(
            "UPDATE nodes SET state = 'live', instance = ?2, created = coalesce(created, ?3) WHERE id = ?1",
            params![row_id(token), instance.0, seconds(now)],
        )
    }

    /// Records that the instance, if there is one, is to be ended.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn set_node(&self, token: &str, state: NodeState) -> Result<()> {
        self.execute(
            "UPDATE nodes SET state = ?2 WHERE id = ?1",
            params![row_id(token), state.word()],
        )
    }

    /// Removes a row whose instance never came to be.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn never_was(&self, token: &str) -> Result<()> {
        self.execute("DELETE FROM nodes WHERE id = ?1", [row_id(token)])
    }

    /// Records the provider's confirmation that the instance is gone.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn ended(&self, token: &str, now: SystemTime) -> Result<()> {
        self.execute(
            "UPDATE nodes SET ended = ?2 WHERE id = ?1 AND ended IS NULL",
            params![row_id(token), seconds(now)],
        )
    }

    /// Records that the provider has the instance in its lists, and whether it is stopped.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn seen(&self, token: &str, is_stopped: bool, now: SystemTime) -> Result<()> {
        let (id, now) = (row_id(token), seconds(now));
        let power = match is_stopped {
            true => "stopped = coalesce(stopped, ?2)",
            false => {
                "stopped_seconds = stopped_seconds + max(0, ?2 - coalesce(stopped, ?2)), stopped = NULL"
            }
        };
        self.execute(
            &format!("UPDATE nodes SET seen = coalesce(seen, ?2), {power} WHERE id = ?1"),
            params![id, now],
        )
    }

    /// The instances that are not confirmed gone, by cluster and rank.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn open_nodes(&self) -> Result<Vec<NodeRow>> {
        self.nodes("ended IS NULL")
    }

    /// Every instance there ever was, for the bill.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State).
    pub fn all_nodes(&self) -> Result<Vec<NodeRow>> {
        self.nodes("created IS NOT NULL")
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
                seen: row.get::<_, Option<i64>>("seen")?.map(time),
                stopped: row.get::<_, Option<i64>>("stopped")?.map(time),
                stopped_before: Duration::from_secs(
                    row.get::<_, i64>("stopped_seconds")?.unsigned_abs(),
                ),
            })
        })
    }

    /// A name that no other row of any state has: owner, cluster, rank, row.
    fn token(&self, cluster: &str, node_rank: u32, id: i64) -> String {
        format!("{}-{cluster}-{node_rank}-{id}", self.owner)
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
