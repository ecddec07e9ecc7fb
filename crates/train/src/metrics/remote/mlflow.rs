//! MLflow's tracking server, over its REST interface.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::http::{Credentials, Failure, Server};
use super::secret::Secret;
use super::sender::Service;
use super::state::Identity;
use crate::Result;
use crate::metrics::entry::{Entry, Kind};

/// A tag that says which log a run belongs to, so that making it twice makes one.
const TAG: &str = "updraft.log";
/// What one request may carry.
const MOST_PARAMS: usize = 100;
/// Older servers take no longer parameter.
const MOST_PARAM_CHARS: usize = 500;

/// Which MLflow server, and who asks.
///
/// Figures bear the names that transformers gives MLflow: `loss`, `learning_rate`, `eval_loss`, …
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MlflowConfig {
    /// Where it is, such as `http://localhost:5000`.
    pub tracking_uri: String,
    /// The experiment that gets the run; made if it is not there.
    pub experiment: String,
    /// A token, if the server wants one.
    pub token: Option<Secret>,
    /// User and password, if it wants those.
    pub login: Option<(String, Secret)>,
}

impl MlflowConfig {
    /// A server that lets everybody in.
    pub fn new(tracking_uri: impl Into<String>, experiment: impl Into<String>) -> Self {
        Self {
            tracking_uri: tracking_uri.into(),
            experiment: experiment.into(),
            token: None,
            login: None,
        }
    }

    /// What MLflow's environment variables say: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`,
    /// `MLFLOW_TRACKING_TOKEN`, `MLFLOW_TRACKING_USERNAME`, `MLFLOW_TRACKING_PASSWORD`. `None`
    /// without the first.
    pub fn from_env() -> Option<Self> {
        Self::from_vars(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let user = var("MLFLOW_TRACKING_USERNAME");
        let password = var("MLFLOW_TRACKING_PASSWORD").map(Secret::new);
        Some(Self {
            tracking_uri: var("MLFLOW_TRACKING_URI")?,
            experiment: var("MLFLOW_EXPERIMENT_NAME").unwrap_or_else(|| "Default".to_owned()),
            token: var("MLFLOW_TRACKING_TOKEN").map(Secret::new),
            login: user.zip(password),
        })
    }
}

/// A run of an MLflow server.
///
/// # Source
/// <https://mlflow.org/docs/latest/api_reference/rest-api.html>
pub(super) struct Mlflow {
    server: Server,
    experiment: String,
    params: Map<String, Value>,
    /// The newest step of each figure the server has; unknown after a failure, which may have been
    /// one of the answer only.
    has: Option<HashMap<String, u64>>,
}

impl Mlflow {
    pub(super) fn new(config: &MlflowConfig, params: Map<String, Value>) -> Result<Self> {
        let credentials = match (&config.login, &config.token) {
            (Some((user, password)), _) => Credentials::Basic {
                user: user.clone(),
                password: password.clone(),
            },
            (None, Some(token)) => Credentials::Bearer(token.clone()),
            (None, None) => Credentials::None,
        };
        Ok(Self {
            server: Server::new(&config.tracking_uri, "MLFLOW_TRACKING_URI", credentials)?,
            experiment: config.experiment.clone(),
            params,
            has: None,
        })
    }

    async fn post(&self, what: [&str; 2], body: &Value) -> Result<Value, Failure> {
        let path = ["api", "2.0", "mlflow", what[0], what[1]];
        self.server.post(&path, body).await
    }

    async fn get(&self, what: [&str; 2], query: (&str, &str)) -> Result<Value, Failure> {
        let path = ["api", "2.0", "mlflow", what[0], what[1]];
        self.server.get(&path, &[query]).await
    }

    /// Finds the experiment, or makes it.
    async fn experiment(&self) -> Result<String, Failure> {
        let by_name = || {
            self.get(
                ["experiments", "get-by-name"],
                ("experiment_name", &self.experiment),
            )
        };
        let found = match by_name().await {
            Err(failure) if code(&failure) == "RESOURCE_DOES_NOT_EXIST" => {
                let new = json!({"name": self.experiment});
                match self.post(["experiments", "create"], &new).await {
                    // Somebody else was faster.
                    Err(failure) if code(&failure) == "RESOURCE_ALREADY_EXISTS" => {
                        by_name().await?
                    }
                    made => return text(&made?, "/experiment_id"),
                }
            }
            found => found?,
        };
        text(&found, "/experiment/experiment_id")
    }

    /// Finds the log's run, or makes it.
    async fn run(&self, identity: &Identity) -> Result<String, Failure> {
        let experiment = self.experiment().await?;
        let search = json!({
            "experiment_ids": [experiment],
            "filter": format!("tags.`{TAG}` = '{}'", identity.id),
            "max_results": 1,
        });
        let found = self.post(["runs", "search"], &search).await?;
        if let Ok(run) = text(&found, "/runs/0/info/run_id") {
            return Ok(run);
        }
        let run = json!({
            "experiment_id": experiment,
            "run_name": identity.name,
            "start_time": now_millis(),
            "tags": [{"key": TAG, "value": identity.id}, {"key": "mlflow.runName", "value": identity.name}],
        });
        let made = self.post(["runs", "create"], &run).await?;
        text(&made, "/run/info/run_id")
    }

    async fn log_params(&self, run: &str) -> Result<(), Failure> {
        let params: Vec<Value> = self.params.iter().map(param).collect();
        for params in params.chunks(MOST_PARAMS) {
            let batch = json!({"run_id": run, "params": params});
            self.post(["runs", "log-batch"], &batch).await?;
        }
        Ok(())
    }

    /// What of a run the server has.
    async fn what_it_has(&self, run: &str) -> Result<HashMap<String, u64>, Failure> {
        let found = self.get(["runs", "get"], ("run_id", run)).await?;
        let metrics = found.pointer("/run/data/metrics").and_then(Value::as_array);
        let newest = |metric: &Value| {
            let step = &metric["step"]; // Protobuf writes long numbers as strings.
            let step = step.as_u64().or_else(|| step.as_str()?.parse().ok())?;
            Some((metric["key"].as_str()?.to_owned(), step))
        };
        Ok(metrics.into_iter().flatten().filter_map(newest).collect())
    }

    async fn send_new(&mut self, run: &str, entries: &[Entry]) -> Result<(), Failure> {
        let mut has = match self.has.take() {
            Some(has) => has,
            None => self.what_it_has(run).await?,
        };
        let mut metrics = Vec::new();
        for entry in entries {
            for (name, value) in entry.values() {
                if has.get(name).is_some_and(|&newest| entry.step <= newest) {
                    continue;
                }
                has.insert(name.to_owned(), entry.step);
                metrics.push(json!({
                    "key": name, "value": value, "timestamp": millis(entry), "step": entry.step,
                }));
            }
        }
        if !metrics.is_empty() {
            let batch = json!({"run_id": run, "metrics": metrics});
            self.post(["runs", "log-batch"], &batch).await?;
        }
        self.has = Some(has);
        if let Some(end) = entries.iter().find(|entry| entry.key().1 == Kind::End) {
            let end = json!({"run_id": run, "status": "FINISHED", "end_time": millis(end)});
            self.post(["runs", "update"], &end).await?;
        }
        Ok(())
    }
}

impl Service for Mlflow {
    fn target(&self) -> String {
        format!("mlflow {} {}", self.server.base(), self.experiment)
    }

    async fn open(&mut self, identity: &Identity) -> Result<String, Failure> {
        let run = self.run(identity).await?;
        self.log_params(&run).await?;
        Ok(run)
    }

    async fn send(&mut self, run: &str, _: u64, entries: &[Entry]) -> Result<(), Failure> {
        self.send_new(run, entries).await
    }

    /// MLflow never takes a silent run for dead.
    async fn heartbeat(&mut self, _: &str) -> Result<(), Failure> {
        Ok(())
    }
}

fn param((name, value): (&String, &Value)) -> Value {
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let text: String = text.chars().take(MOST_PARAM_CHARS).collect();
    json!({"key": name, "value": text})
}

fn millis(entry: &Entry) -> i64 {
    (entry.time * 1e3).round() as i64
}

fn now_millis() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap_or_default().as_millis() as i64
}

fn code(failure: &Failure) -> &str {
    match failure {
        Failure::Refused { code, .. } => code,
        Failure::Down(_) => "",
    }
}

fn text(answer: &Value, pointer: &str) -> Result<String, Failure> {
    let found = answer.pointer(pointer).and_then(Value::as_str);
    found.map(str::to_owned).ok_or_else(|| Failure::Refused {
        status: 200,
        code: String::new(),
        message: format!("the answer has no {pointer}: is this an MLflow server?"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_mlflows_and_passwords_are_not_printed() {
        assert_eq!(MlflowConfig::from_vars(|_| None), None);
        let vars = |name: &str| match name {
            "MLFLOW_TRACKING_URI" => Some("http://localhost:5000".to_owned()),
            "MLFLOW_TRACKING_USERNAME" => Some("me".to_owned()),
            "MLFLOW_TRACKING_PASSWORD" | "MLFLOW_TRACKING_TOKEN" => Some("hush".to_owned()),
            _ => None,
        };
        let config = MlflowConfig::from_vars(vars).expect("an address");
        assert_eq!(config.experiment, "Default");
        let printed = format!("{config:?}");
        assert!(
            printed.contains("***") && !printed.contains("hush"),
            "{printed}"
        );
        let service = Mlflow::new(&config, Map::new()).expect("an address");
        assert!(!format!("{:?}", service.server).contains("hush"));
    }
}
