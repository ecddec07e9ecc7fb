//! Servers that are down, slow, broken or forgetful, and processes that are killed: everything
//! arrives, once.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::ops::RangeInclusive;

use serde_json::Value;
use tokio::runtime::Runtime;
use wiremock::matchers::any;
use wiremock::{Mock, MockServer, ResponseTemplate};

mod fake;

use super::*;
use crate::testing::{records, report};
use fake::{Fake, Fault};

const KEY: &str = "hush-0123456789";
const STEPS: u64 = 130; // more than fit in one request

#[derive(Debug, Clone, Copy, PartialEq)]
enum Which {
    Mlflow,
    Wandb,
}
use Which::{Mlflow, Wandb};

fn pace() -> Pace {
    Pace {
        first_wait: Duration::from_millis(1),
        longest_wait: Duration::from_millis(5),
        request: Duration::from_millis(150),
        heartbeat: Duration::from_secs(60),
        grace: Duration::from_millis(50),
    }
}

fn open(which: Which, address: &str, key: &str, path: &Path) -> Result<RemoteLog> {
    open_run(which, address, key, path, &crate::TrainConfig::default())
}

fn open_run(
    which: Which,
    address: &str,
    key: &str,
    path: &Path,
    settings: &crate::TrainConfig,
) -> Result<RemoteLog> {
    let run = RunInfo::new("a run").with_params(settings);
    let run = run.expect("settings");
    let (name, own, params) = (run.name.clone(), run.key(), run.params);
    let mut log = match which {
        Mlflow => {
            let mut config = MlflowConfig::new(address, "letters");
            config.token = Some(Secret::new(key));
            RemoteLog::open(
                mlflow::Mlflow::new(&config, params)?,
                name,
                own,
                path,
                pace(),
            )?
        }
        Wandb => {
            let mut config = WandbConfig::new(Secret::new(key), "p");
            config.base_url = address.to_owned();
            RemoteLog::open(wandb::Wandb::new(&config, params)?, name, own, path, pace())?
        }
    };
    log.now = || SystemTime::UNIX_EPOCH + Duration::from_secs(1_763_836_800);
    Ok(log)
}

/// Some steps of a run, with an evaluation every ten, and its end after the last.
fn steps(observer: &mut dyn Observer, steps: RangeInclusive<u64>) {
    for record in &records(*steps.end())[*steps.start() as usize - 1..] {
        observer.on_step(&StepStats {
            record,
            total_steps: STEPS,
            tokens_per_second: 10.0,
        });
        if record.step.is_multiple_of(10) {
            observer.on_evaluation(&EvalRecord {
                step: record.step,
                epoch: record.epoch,
                eval_loss: record.loss + 1.0,
                trained_tokens: 1,
            });
        }
    }
    if *steps.end() == STEPS {
        observer.on_end(&report(STEPS));
    }
}

/// What the server must have of the whole run.
fn expected() -> BTreeMap<(String, u64), f64> {
    let mut figures = BTreeMap::new();
    let mut add = |entry: &Entry| {
        for (name, value) in entry.values() {
            assert_eq!(figures.insert((name.to_owned(), entry.step), value), None);
        }
    };
    let now = SystemTime::UNIX_EPOCH;
    for record in &records(STEPS) {
        add(&Entry::of_step(
            &StepStats {
                record,
                total_steps: STEPS,
                tokens_per_second: 10.0,
            },
            now,
        ));
        if record.step.is_multiple_of(10) {
            let eval = EvalRecord {
                step: record.step,
                epoch: record.epoch,
                eval_loss: record.loss + 1.0,
                trained_tokens: 1,
            };
            add(&Entry::of_evaluation(&eval, now));
        }
    }
    add(&Entry::of_end(&report(STEPS), now));
    figures
}

/// A server, the folder of a log and what the server knows.
struct Place {
    runtime: Runtime,
    fake: Fake,
    server: Option<MockServer>,
    folder: tempfile::TempDir,
    address: SocketAddr,
}

impl Place {
    fn down() -> Self {
        // The listener is dropped: nobody listens there until `up`.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        Self {
            runtime: Runtime::new().expect("a runtime"),
            fake: Fake::default(),
            server: None,
            folder: tempfile::tempdir().expect("a folder"),
            address: listener.local_addr().expect("bound"),
        }
    }

    fn up() -> Self {
        let mut place = Self::down();
        place.start();
        place
    }

    fn start(&mut self) {
        let listener = TcpListener::bind(self.address).expect("the port is free");
        let fake = self.fake.clone();
        self.server = Some(self.runtime.block_on(async {
            let server = MockServer::builder().listener(listener).start().await;
            Mock::given(any()).respond_with(fake).mount(&server).await;
            server
        }));
    }

    fn log(&self) -> std::path::PathBuf {
        self.folder.path().join("metrics.jsonl")
    }

    fn open(&self, which: Which) -> RemoteLog {
        open(which, &format!("http://{}", self.address), KEY, &self.log()).expect("a sink")
    }

    /// The server has the whole run, each figure once, in one run.
    #[track_caller]
    fn has_all(&self) {
        let world = self.fake.0.lock().expect("no panic");
        assert_eq!(world.runs.len(), 1);
        let run = world.runs.values().next().expect("one");
        assert_eq!(run.twice, 0, "figures arrived twice");
        assert_eq!(run.figures, expected());
        assert_eq!(run.params["learning_rate"], "0.00005");
        assert!(run.finished);
    }
}

const LONG: Duration = Duration::from_secs(30);

#[test]
fn a_run_arrives_with_its_settings_and_end() {
    for which in [Mlflow, Wandb] {
        let place = Place::up();
        let mut sink = place.open(which);
        steps(&mut sink, 1..=STEPS);
        assert!(sink.flush(LONG), "{which:?}");
        place.has_all();
    }
}

#[test]
fn a_server_that_is_down_and_comes_up_has_everything() {
    for which in [Mlflow, Wandb] {
        let mut place = Place::down();
        let mut sink = place.open(which);
        steps(&mut sink, 1..=STEPS);
        assert!(!sink.flush(Duration::from_millis(20)), "nobody listens");
        place.start();
        assert!(sink.flush(LONG), "{which:?}");
        place.has_all();
    }
}

#[test]
fn whatever_request_fails_and_however_nothing_is_lost_or_counted_twice() {
    let faults = [
        Fault::Status(500),
        Fault::Status(429),
        Fault::Lost,
        Fault::AnswerLost,
    ];
    for which in [Mlflow, Wandb] {
        let requests = {
            let place = Place::up();
            let mut sink = place.open(which);
            steps(&mut sink, 1..=STEPS);
            assert!(sink.flush(LONG));
            place.fake.0.lock().expect("no panic").requests
        };
        for fault in faults {
            for failing in 0..requests {
                let place = Place::up();
                let mut plan = vec![None; failing];
                plan.extend([Some(fault); 2]);
                place.fake.0.lock().expect("no panic").faults = plan.into();
                let mut sink = place.open(which);
                steps(&mut sink, 1..=STEPS);
                assert!(sink.flush(LONG), "{which:?} {fault:?} at {failing}");
                place.has_all();
            }
        }
    }
}

/// A kill leaves the two files as they lie: the log perhaps with a torn line, and `.sent` perhaps
/// from before the last answer. What runs on afterwards repeats the steps behind a checkpoint.
#[test]
fn a_killed_process_goes_on_without_a_gap_or_a_repetition() {
    for which in [Mlflow, Wandb] {
        for forgets_last_answer in [false, true] {
            let place = Place::up();
            let sent = place.log().with_extension("jsonl.sent");
            let mut sink = place.open(which);
            steps(&mut sink, 1..=20);
            assert!(sink.flush(LONG));
            let before = std::fs::read(&sent).expect("there");
            steps(&mut sink, 21..=47);
            assert!(sink.flush(LONG));
            drop(sink);
            if forgets_last_answer {
                std::fs::write(&sent, before).expect("written");
            }
            let mut log = std::fs::read(place.log()).expect("there");
            log.extend(b"{\"step\":48,\"ti");
            std::fs::write(place.log(), log).expect("written");

            let mut sink = place.open(which);
            steps(&mut sink, 31..=STEPS);
            assert!(sink.flush(LONG));
            place.has_all();
        }
    }
}

#[test]
fn what_a_dead_server_never_got_is_sent_by_whoever_opens_the_log_again() {
    for which in [Mlflow, Wandb] {
        let mut place = Place::down();
        let mut sink = place.open(which);
        steps(&mut sink, 1..=STEPS);
        drop(sink); // gives up after its grace
        place.start();
        assert!(place.open(which).flush(LONG));
        place.has_all();
    }
}

#[test]
fn a_wrong_key_stops_the_sending_and_not_the_run() {
    for which in [Mlflow, Wandb] {
        let place = Place::up();
        let address = format!("http://{}", place.address);
        let mut sink = open(which, &address, "wrong", &place.log()).expect("a sink");
        steps(&mut sink, 1..=STEPS);
        assert!(!sink.flush(LONG), "refused");
        drop(sink);
        assert!(place.open(which).flush(LONG));
        place.has_all();
    }
}

#[test]
fn a_log_belongs_to_one_server() {
    let place = Place::up();
    drop(place.open(Mlflow));
    let address = format!("http://{}", place.address);
    let error = open(Wandb, &address, KEY, &place.log()).expect_err("MLflow's");
    assert!(
        matches!(error, Error::ForeignMetrics { what: "server", .. }),
        "{error}"
    );
}

/// A second run with another setting, told to use the same file: neither's figures are taken for the
/// other's, though their steps have the same numbers, and each goes on in its own.
#[test]
fn a_run_with_other_settings_is_another_run_beside_the_first() {
    for which in [Mlflow, Wandb] {
        let place = Place::up();
        let address = format!("http://{}", place.address);
        let settings = |learning_rate| crate::TrainConfig {
            learning_rate,
            ..crate::TrainConfig::default()
        };
        let run = |learning_rate| {
            let settings = settings(learning_rate);
            let sink = open_run(which, &address, KEY, &place.log(), &settings);
            sink.expect("a sink")
        };
        for learning_rate in [1e-3, 2e-3] {
            let mut sink = run(learning_rate);
            steps(&mut sink, 1..=40);
            assert!(sink.flush(LONG));
        }
        for learning_rate in [2e-3, 1e-3] {
            let mut sink = run(learning_rate);
            steps(&mut sink, 31..=STEPS);
            assert!(sink.flush(LONG));
        }
        let world = place.fake.0.lock().expect("no panic");
        assert_eq!(world.runs.len(), 2, "{which:?}");
        let mut rates = Vec::new();
        for run in world.runs.values() {
            assert_eq!((run.twice, run.finished), (0, true), "{which:?}");
            assert_eq!(run.figures, expected());
            rates.push(run.params["learning_rate"].clone());
        }
        rates.sort();
        assert_eq!(rates, ["0.001", "0.002"]);
    }
}

#[test]
fn a_redirect_is_not_followed_so_no_other_host_sees_the_key() {
    for which in [Mlflow, Wandb] {
        let (place, elsewhere) = (Place::down(), Place::up());
        let to = format!("http://{}/", elsewhere.address);
        let redirecting = place.runtime.block_on(async {
            let server = MockServer::start().await;
            let answer = ResponseTemplate::new(307).insert_header("location", to.as_str());
            Mock::given(any()).respond_with(answer).mount(&server).await;
            server
        });
        let mut sink = open(which, &redirecting.uri(), KEY, &place.log()).expect("a sink");
        steps(&mut sink, 1..=STEPS);
        assert!(!sink.flush(LONG), "refused");
        assert_eq!(elsewhere.fake.0.lock().expect("no panic").requests, 0);
    }
}

/// The same run with all sinks, their servers down, and with none: the same adapter.
#[test]
fn sinks_without_a_server_change_nothing_about_training() {
    use candle_core::{DType, Device};
    use updraft_model::{Adapter, Architecture, Decoder, LoraConfig, Threads, tiny};

    let model = tiny::config(Architecture::Qwen2);
    let weights = tiny::weights(&model, 1);
    let threads = Threads::single();
    let decoder = Decoder::load(&model, &weights, DType::F32, &Device::Cpu, &threads);
    let decoder = decoder.expect("the tiny model");
    let source = crate::MemorySource::new("memory", (4..12).map(crate::testing::example).collect());
    let config = crate::TrainConfig {
        max_steps: Some(6),
        learning_rate: 1e-2,
        ..Default::default()
    };
    let adapter = || Adapter::init(&LoraConfig::default(), &model, 7, &Device::Cpu).expect("one");
    let trainer = || crate::Trainer::new(&decoder, adapter(), &source, config.clone());
    let bits = |trainer: crate::Trainer<'_>| {
        let values = trainer.into_parts().0.values().expect("f32");
        values
            .iter()
            .map(|value| value.to_bits())
            .collect::<Vec<_>>()
    };

    let mut alone = trainer().expect("a run");
    alone.run().expect("trained");
    let place = Place::down();
    let path = |name: &str| place.folder.path().join(name);
    let address = format!("http://{}", place.address);
    let mut watched = trainer()
        .expect("a run")
        .with_observer(super::super::JsonLines::open(path("log")).expect("a file"))
        .with_observer(super::super::TensorBoard::open(path("tb")).expect("a folder"))
        .with_observer(open(Mlflow, &address, KEY, &path("mlflow")).expect("a sink"))
        .with_observer(open(Wandb, &address, KEY, &path("wandb")).expect("a sink"));
    watched.run().expect("trained");
    assert_eq!(bits(watched), bits(alone));
    for log in ["log", "mlflow", "wandb"] {
        let log = std::fs::read_to_string(path(log)).expect("there");
        assert_eq!(log.lines().count(), 7, "six steps and the end");
    }
}

/// Set `UPDRAFT_TEST_MLFLOW` to the address of a real server, such as `mlflow server` starts.
#[test]
#[expect(clippy::print_stderr, reason = "a test that skips says why")]
fn a_real_mlflow_server_has_a_run_that_was_killed_once() {
    let Ok(address) = std::env::var("UPDRAFT_TEST_MLFLOW") else {
        return eprintln!("skipped: UPDRAFT_TEST_MLFLOW is not set");
    };
    let folder = tempfile::tempdir().expect("a folder");
    let (path, sent) = (folder.path().join("log"), folder.path().join("log.sent"));
    let long = Duration::from_secs(60);
    let open = || {
        let config = MlflowConfig::new(&address, "updraft tests");
        let run = RunInfo::new("killed once").with_params(&crate::TrainConfig::default());
        let run = run.expect("settings");
        RemoteLog::mlflow(&config, run, &path).expect("a sink")
    };
    let mut sink = open();
    steps(&mut sink, 1..=20);
    assert!(sink.flush(long));
    let before = std::fs::read(&sent).expect("there");
    steps(&mut sink, 21..=47);
    assert!(sink.flush(long));
    drop(sink);
    std::fs::write(&sent, before).expect("written");
    let mut sink = open();
    steps(&mut sink, 31..=STEPS);
    assert!(sink.flush(long));

    let state: Value = serde_json::from_slice(&std::fs::read(&sent).expect("there")).expect("JSON");
    let run = state["run"].as_str().expect("a run");
    let server = http::Server::new(&address, "UPDRAFT_TEST_MLFLOW", http::Credentials::None);
    let server = server.expect("an address");
    let runtime = Runtime::new().expect("a runtime");
    let get = |what: [&str; 2], query: &[(&str, &str)]| {
        let path = ["api", "2.0", "mlflow", what[0], what[1]];
        runtime
            .block_on(server.get(&path, query))
            .expect("an answer")
    };
    let mut found = BTreeMap::new();
    let names: std::collections::BTreeSet<String> =
        expected().into_keys().map(|(name, _)| name).collect();
    for name in names {
        let query = [
            ("run_id", run),
            ("metric_key", name.as_str()),
            ("max_results", "1000"),
        ];
        let history = get(["metrics", "get-history"], &query);
        for metric in history["metrics"].as_array().expect("figures") {
            let step = metric["step"].as_u64().unwrap_or_default();
            let value = metric["value"].as_f64().expect("a number");
            assert_eq!(
                found.insert((name.clone(), step), value),
                None,
                "{name} twice"
            );
        }
    }
    assert_eq!(found, expected());
    let run = get(["runs", "get"], &[("run_id", run)]);
    assert_eq!(run["run"]["info"]["status"], "FINISHED");
    let params = run["run"]["data"]["params"].as_array().expect("settings");
    assert!(
        params
            .iter()
            .any(|param| param["key"] == "learning_rate" && param["value"] == "0.00005")
    );
}
