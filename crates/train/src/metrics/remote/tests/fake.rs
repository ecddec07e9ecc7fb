//! Both services behind one address, answering as the real ones do, or not at all.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value, json};
use wiremock::{Request, Respond, ResponseTemplate};

use super::KEY;

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    /// It is answered with this status and does nothing.
    Status(u16),
    /// It does nothing and takes too long.
    Lost,
    /// It does what it asks, and the answer takes too long.
    AnswerLost,
}

/// What a server knows: each run's figures by name and step, and whether it is finished.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) runs: BTreeMap<String, Run>,
    pub(super) faults: VecDeque<Option<Fault>>,
    pub(super) requests: usize,
}

#[derive(Debug, Default)]
pub(super) struct Run {
    pub(super) log: String,
    pub(super) params: BTreeMap<String, String>,
    pub(super) figures: BTreeMap<(String, u64), f64>,
    pub(super) twice: usize,
    pub(super) finished: bool,
    pub(super) history: Vec<Value>,
}

/// Both services behind one address, answering as the real ones do.
#[derive(Debug, Clone, Default)]
pub(super) struct Fake(pub(super) Arc<Mutex<World>>);

impl Respond for Fake {
    fn respond(&self, request: &Request) -> ResponseTemplate {
        let world = &mut *self.0.lock().expect("no panic");
        world.requests += 1;
        let fault = world.faults.pop_front().flatten();
        let late = std::time::Duration::from_secs(60);
        match fault {
            Some(Fault::Status(status)) => return ResponseTemplate::new(status),
            Some(Fault::Lost) => return ResponseTemplate::new(200).set_delay(late),
            Some(Fault::AnswerLost) | None => {}
        }
        let authorized = request.headers.get("authorization");
        let expected = format!("Bearer {KEY}");
        // "api:hush-0123456789"
        let basic = "Basic YXBpOmh1c2gtMDEyMzQ1Njc4OQ==";
        let allowed = authorized.is_some_and(|value| *value == expected || value == basic);
        let answer = if allowed {
            world.answer(request)
        } else {
            ResponseTemplate::new(401).set_body_json(json!({"message": "who are you?"}))
        };
        match fault {
            Some(Fault::AnswerLost) => answer.set_delay(late),
            _ => answer,
        }
    }
}

impl World {
    fn answer(&mut self, request: &Request) -> ResponseTemplate {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let path = request.url.path().trim_start_matches("/api/2.0/mlflow");
        let answer = match path {
            "/experiments/get-by-name" => {
                let missing = json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"});
                return ResponseTemplate::new(404).set_body_json(missing);
            }
            "/experiments/create" => json!({"experiment_id": "7"}),
            "/runs/search" => {
                let filter = body["filter"].as_str().expect("a filter");
                let found = self.runs.iter().find(|(_, run)| filter.contains(&run.log));
                match found {
                    Some((id, _)) => json!({"runs": [{"info": {"run_id": id}}]}),
                    None => json!({}),
                }
            }
            "/runs/create" => {
                let id = format!("run-{}", self.runs.len());
                let log = body["tags"][0]["value"].as_str().expect("a tag").to_owned();
                self.runs.entry(id.clone()).or_default().log = log;
                json!({"run": {"info": {"run_id": id}}})
            }
            "/runs/get" => {
                let id = request.url.query().expect("an id").replace("run_id=", "");
                let mut newest = BTreeMap::new();
                for (name, step) in self.runs[&id].figures.keys() {
                    newest.insert(name, step);
                }
                let metrics: Vec<Value> = newest
                    .iter()
                    .map(|(name, step)| json!({"key": name, "step": step.to_string()}))
                    .collect();
                json!({"run": {"data": {"metrics": metrics}}})
            }
            "/runs/log-batch" => {
                let run = self.mlflow_run(&body);
                for param in body["params"].as_array().into_iter().flatten() {
                    let text = |name: &str| param[name].as_str().expect("text").to_owned();
                    run.params.insert(text("key"), text("value"));
                }
                let metrics = body["metrics"].as_array().into_iter().flatten();
                assert!(metrics.clone().count() <= 1000);
                for metric in metrics {
                    let key = metric["key"].as_str().expect("text").to_owned();
                    let key = (key, metric["step"].as_u64().expect("a step"));
                    let value = metric["value"].as_f64().expect("a number");
                    run.twice += usize::from(run.figures.insert(key, value).is_some());
                }
                json!({})
            }
            "/runs/update" => {
                self.mlflow_run(&body).finished = body["status"] == "FINISHED";
                json!({})
            }
            "/graphql" => {
                let variables = &body["variables"];
                let name = variables["name"].as_str().expect("a name");
                let run = self.runs.entry(format!("team/p/{name}")).or_default();
                let config = variables["config"].as_str().expect("settings");
                let config: Map<String, Value> = serde_json::from_str(config).expect("JSON");
                for (name, value) in config {
                    run.params.insert(name, value["value"].to_string());
                }
                let project = json!({"name": "p", "entity": {"name": "team"}});
                json!({"data": {"upsertBucket": {"bucket": {"name": name, "project": project}}}})
            }
            path => {
                let run = path
                    .trim_start_matches("/files/")
                    .trim_end_matches("/file_stream");
                self.runs.get_mut(run).expect("a run").stream(&body);
                json!({"exitcode": null, "limits": {}})
            }
        };
        ResponseTemplate::new(200).set_body_json(answer)
    }

    fn mlflow_run(&mut self, body: &Value) -> &mut Run {
        let id = body["run_id"].as_str().expect("an id");
        self.runs.get_mut(id).expect("a run")
    }
}

impl Run {
    /// Writes lines where the request says, as `file_stream` does.
    fn stream(&mut self, body: &Value) {
        self.finished |= body["complete"] == true;
        let history = &body["files"]["wandb-history.jsonl"];
        let offset = history["offset"].as_u64().unwrap_or_default() as usize;
        assert!(offset <= self.history.len(), "a gap before {offset}");
        for (line, place) in history["content"]
            .as_array()
            .into_iter()
            .flatten()
            .zip(offset..)
        {
            let line = serde_json::from_str(line.as_str().expect("text")).expect("JSON");
            self.history.truncate(place.max(offset));
            self.history.push(line);
        }
        self.figures.clear();
        self.twice = 0;
        for (line, place) in self.history.iter().zip(0u64..) {
            assert_eq!(line["_step"], place);
            let step = line["train/global_step"].as_u64().expect("a step");
            for (name, value) in line.as_object().expect("an object") {
                if name.starts_with('_') || name == "train/global_step" {
                    continue;
                }
                let value = value.as_f64().expect("a number");
                let name = name.replace("train/train_", "train_");
                let name = name.replace("train/", "").replace("eval/", "eval_");
                self.twice += usize::from(self.figures.insert((name, step), value).is_some());
            }
        }
    }
}
