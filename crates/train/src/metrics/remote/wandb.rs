//! Weights & Biases, over the two requests of its client: `upsertBucket` makes a run, `file_stream`
//! writes lines of its history.

use serde_json::{Map, Value, json};

use super::http::{Credentials, Failure, Server};
use super::secret::Secret;
use super::sender::Service;
use super::state::Identity;
use crate::Result;
use crate::metrics::entry::{Entry, Kind, tag};

const UPSERT: &str = "\
mutation UpsertBucket($name: String, $project: String, $entity: String, $displayName: String, $config: JSONString) {
  upsertBucket(input: {name: $name, modelName: $project, entityName: $entity, displayName: $displayName, config: $config}) {
    bucket { id name project { name entity { name } } }
  }
}";

/// Which Weights & Biases server and project, and who asks.
///
/// Figures bear the names that transformers gives Weights & Biases: `train/loss`, `eval/loss`, …,
/// over `train/global_step`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WandbConfig {
    /// Where it is: `https://api.wandb.ai`, or a server of one's own.
    pub base_url: String,
    /// The user's key.
    pub api_key: Secret,
    /// The team or user; the key's own if not set.
    pub entity: Option<String>,
    /// The project that gets the run; made if it is not there.
    pub project: String,
}

impl WandbConfig {
    /// The public server.
    pub fn new(api_key: Secret, project: impl Into<String>) -> Self {
        Self {
            base_url: "https://api.wandb.ai".to_owned(),
            api_key,
            entity: None,
            project: project.into(),
        }
    }

    /// What Weights & Biases' environment variables say: `WANDB_API_KEY`, `WANDB_PROJECT`,
    /// `WANDB_ENTITY`, `WANDB_BASE_URL`. `None` without the first.
    pub fn from_env() -> Option<Self> {
        Self::from_vars(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let project = var("WANDB_PROJECT").unwrap_or_else(|| "huggingface".to_owned());
        let mut config = Self::new(Secret::new(var("WANDB_API_KEY")?), project);
        config.entity = var("WANDB_ENTITY");
        if let Some(base_url) = var("WANDB_BASE_URL") {
            config.base_url = base_url;
        }
        Some(config)
    }
}

/// A run of a Weights & Biases server.
///
/// Each line of history has its place, so a line that is sent again lands where it is.
///
/// # Source
/// The public client, `wandb/sdk/internal/internal_api.py` and `core/internal/filestream`.
pub(super) struct Wandb {
    server: Server,
    config: WandbConfig,
    params: Map<String, Value>,
    /// When the run began, in seconds since 1970.
    began: Option<f64>,
    /// The newest of each figure.
    summary: Map<String, Value>,
}

impl Wandb {
    pub(super) fn new(config: &WandbConfig, params: Map<String, Value>) -> Result<Self> {
        let credentials = Credentials::Basic {
            user: "api".to_owned(),
            password: config.api_key.clone(),
        };
        Ok(Self {
            server: Server::new(&config.base_url, "WANDB_BASE_URL", credentials)?,
            config: config.clone(),
            params,
            began: None,
            summary: Map::new(),
        })
    }

    /// The line of history at this place.
    fn line(&mut self, place: u64, entry: &Entry) -> String {
        let began = *self.began.get_or_insert(entry.time);
        let mut line: Map<String, Value> = entry
            .values()
            .map(|(name, value)| (tag(name), value.into()))
            .collect();
        line.insert("train/global_step".to_owned(), entry.step.into());
        line.insert("_step".to_owned(), place.into());
        line.insert("_timestamp".to_owned(), entry.time.into());
        line.insert("_runtime".to_owned(), (entry.time - began).into());
        let text = Value::Object(line.clone()).to_string();
        self.summary.extend(line);
        text
    }

    async fn stream(&self, run: &str, body: &Value) -> Result<(), Failure> {
        let path = ["files"].into_iter().chain(run.split('/'));
        let path: Vec<&str> = path.chain(["file_stream"]).collect();
        self.server.post(&path, body).await.map(drop)
    }

    fn settings(&self) -> String {
        let setting = |(name, value): (&String, &Value)| (name.clone(), json!({"value": value}));
        let settings: Map<String, Value> = self.params.iter().map(setting).collect();
        Value::Object(settings).to_string()
    }
}

impl Service for Wandb {
    fn target(&self) -> String {
        let entity = self.config.entity.as_deref().unwrap_or_default();
        format!(
            "wandb {} {entity} {}",
            self.server.base(),
            self.config.project
        )
    }

    fn recall(&mut self, place: u64, entry: &Entry) {
        self.line(place, entry);
    }

    async fn open(&mut self, identity: &Identity) -> Result<String, Failure> {
        let variables = json!({
            "name": identity.id,
            "displayName": identity.name,
            "project": self.config.project,
            "entity": self.config.entity,
            "config": self.settings(),
        });
        let request = json!({"query": UPSERT, "variables": variables});
        let answer = self.server.post(&["graphql"], &request).await?;
        let refused = |message: &str| Failure::Refused {
            status: 200,
            code: String::new(),
            message: message.to_owned(),
        };
        // GraphQL says no in a successful answer.
        if let Some(message) = answer.pointer("/errors/0/message").and_then(Value::as_str) {
            return Err(refused(message));
        }
        let bucket = answer.pointer("/data/upsertBucket/bucket");
        let text = |pointer: &str| bucket?.pointer(pointer)?.as_str();
        match (
            text("/project/entity/name"),
            text("/project/name"),
            text("/name"),
        ) {
            (Some(entity), Some(project), Some(name)) => Ok(format!("{entity}/{project}/{name}")),
            _ => Err(refused(
                "the answer names no run: is this Weights & Biases?",
            )),
        }
    }

    async fn send(&mut self, run: &str, first: u64, entries: &[Entry]) -> Result<(), Failure> {
        let lines: Vec<String> = entries
            .iter()
            .zip(first..)
            .map(|(entry, place)| self.line(place, entry))
            .collect();
        let summary = Value::Object(self.summary.clone()).to_string();
        let mut body = json!({"files": {
            "wandb-history.jsonl": {"offset": first, "content": lines},
            "wandb-summary.json": {"offset": 0, "content": [summary]},
        }});
        if entries.iter().any(|entry| entry.key().1 == Kind::End) {
            body["complete"] = true.into();
            body["exitcode"] = 0.into();
        }
        self.stream(run, &body).await
    }

    async fn heartbeat(&mut self, run: &str) -> Result<(), Failure> {
        self.stream(run, &json!({"complete": false, "failed": false}))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_wandbs_and_the_key_is_not_printed() {
        assert_eq!(WandbConfig::from_vars(|_| None), None);
        let vars = |name: &str| match name {
            "WANDB_API_KEY" => Some("hush".to_owned()),
            "WANDB_ENTITY" => Some("team".to_owned()),
            _ => None,
        };
        let config = WandbConfig::from_vars(vars).expect("a key");
        assert_eq!(config.base_url, "https://api.wandb.ai");
        assert_eq!(config.entity.as_deref(), Some("team"));
        let printed = format!("{config:?}");
        assert!(
            printed.contains("***") && !printed.contains("hush"),
            "{printed}"
        );
    }
}
