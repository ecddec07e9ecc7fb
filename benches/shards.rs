//! How many rows and MB per second does an import make of JSONL and of Parquet?
//!
//! Made-up conversations of about 1.5 KB in a local file, through format detection and conversion,
//! into Parquet shards in a local folder, on all cores. The peer streams the same file with
//! `datasets` and writes `to_parquet`, without converting anything:
//!
//! ```sh
//! UPDRAFT_PEERS_VENV=DIR cargo bench --bench shards          # and the peer, in turns: the ratio
//! UPDRAFT_STREAM_GB=20 cargo bench --bench shards -- stream  # peak memory of a long stream
//! ```

#![expect(
    clippy::print_stderr,
    reason = "the ratio and the peak are its results"
)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use criterion::{Criterion, Throughput};
use tokio::runtime::Runtime;
use updraft::dataset::conformance::Generated;
use updraft::dataset::{ImportOptions, Source, SourceOptions, import, resolve_source};
use updraft::store::sink::sink;
use updraft::store::{
    CancelToken, FinishedStage, NoProgress, Progress, ProgressSink, Store, faults,
};

const ROWS: Generated = Generated {
    rows: 60_000,
    row_bytes: 1_500,
};
/// Pairs of ours and the peer's.
const PAIRS: usize = 5;

struct Data {
    folder: tempfile::TempDir,
    runtime: Runtime,
}

impl Data {
    /// The JSONL file. The Parquet one has its columns and is made by the peer's own writer; without
    /// a peer it is left out.
    fn make() -> Self {
        let data = Self {
            folder: tempfile::tempdir().expect("a folder"),
            runtime: Runtime::new().expect("a runtime"),
        };
        let file = std::fs::File::create(data.path("rows.jsonl")).expect("created");
        let mut file = std::io::BufWriter::new(file);
        for index in 0..ROWS.rows {
            writeln!(file, "{}", ROWS.row(index)).expect("written");
        }
        file.flush().expect("written");
        data
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn source(&self, name: &str) -> std::sync::Arc<impl Source + use<>> {
        let path = self.path(name);
        let spec = path.to_str().expect("UTF-8");
        self.runtime
            .block_on(resolve_source(spec, &SourceOptions::default()))
            .expect("the file")
    }

    /// Imports into a fresh folder, so that nothing is found finished.
    fn import(&self, source: &dyn Source) -> FinishedStage {
        let folder = tempfile::tempdir_in(self.folder.path()).expect("a folder");
        let store = Store::open(folder.path().to_str().expect("UTF-8")).expect("opened");
        let stage = self.run(&store, source);
        assert_eq!(stage.counts()["rows"], ROWS.rows);
        stage
    }

    fn run(&self, store: &Store, source: &dyn Source) -> FinishedStage {
        let (options, cancel) = (ImportOptions::default(), CancelToken::new());
        let running = import(store, "rows", source, &options, &NoProgress, &cancel);
        self.runtime.block_on(running).expect("imported")
    }
}

fn main() {
    if let Some(gb) = std::env::var("UPDRAFT_STREAM_GB")
        .ok()
        .and_then(|gb| gb.parse().ok())
    {
        return stream(gb);
    }
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    let data = Data::make();
    // With `--test`, which only asks whether it runs, the peer stays out of it.
    let is_test = std::env::args().any(|arg| arg == "--test");
    let peer = std::env::var_os("UPDRAFT_PEERS_VENV").filter(|_| !is_test);
    let peer = peer.map(PathBuf::from);
    let parquet = peer
        .as_ref()
        .map(|venv| run_peer(venv, &data.path("rows.jsonl"), &data.path("rows.parquet")));
    let names: &[&str] = if parquet.is_some() {
        &["rows.jsonl", "rows.parquet"]
    } else {
        &["rows.jsonl"]
    };
    for name in names {
        bench(&mut criterion, &data, name);
        if let Some(venv) = &peer {
            compare(&data, venv, name);
        }
    }
    finished_costs_one_get(&data);
    criterion.final_summary();
}

fn bench(criterion: &mut Criterion, data: &Data, name: &str) {
    let source = data.source(name);
    let bytes = std::fs::metadata(data.path("rows.jsonl"))
        .expect("there")
        .len();
    let mut group = criterion.benchmark_group("shards");
    group.throughput(Throughput::ElementsAndBytes {
        elements: ROWS.rows,
        bytes,
    });
    group.bench_function(name, |bencher| bencher.iter(|| data.import(&*source)));
    group.finish();
}

/// Ours and the peer's in turns; the median of the ratios.
fn compare(data: &Data, venv: &Path, name: &str) {
    let source = data.source(name);
    let mut ratios: Vec<f64> = (0..PAIRS)
        .map(|_| {
            let start = Instant::now();
            data.import(&*source);
            let ours = start.elapsed().as_secs_f64();
            run_peer(venv, &data.path(name), &data.path("peer.parquet")) / ours
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let (low, median, high) = (ratios[0], ratios[PAIRS / 2], ratios[PAIRS - 1]);
    eprintln!(
        "shards/{name}: {median:.2}x datasets streaming + to_parquet ({low:.2} to {high:.2})"
    );
}

/// Seconds that the peer says it took.
fn run_peer(venv: &Path, from: &Path, to: &Path) -> f64 {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/shards.py");
    let output = Command::new(venv.join("bin/python"))
        .arg(script)
        .arg(from)
        .arg(to)
        .output()
        .expect("the peer starts");
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let result: Option<serde_json::Value> = out
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok());
    let seconds = result
        .and_then(|result| (result["rows"] == ROWS.rows).then(|| result["seconds"].as_f64())?);
    seconds.unwrap_or_else(|| panic!("{out}{}", String::from_utf8_lossy(&output.stderr)))
}

/// What a rerun costs is a promise, not a figure.
fn finished_costs_one_get(data: &Data) {
    let (store, source) = (Store::memory(), data.source("rows.jsonl"));
    data.run(&store, &*source);
    let (counted, calls) = faults::count(&store);
    assert!(data.run(&counted, &*source).reused());
    assert_eq!((calls.reads(), calls.total()), (1, 1));
}

/// The resident memory at every event, in KB.
#[derive(Debug, Default)]
struct Samples(std::sync::Mutex<Vec<u64>>);

impl ProgressSink for Samples {
    fn report(&self, _: &Progress) {
        let mut samples = self.0.lock().expect("no panic while it is held");
        samples.extend(status("VmRSS"));
    }
}

fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Imports this many GB, made as they are read, into a store that forgets them.
fn stream(gb: f64) {
    let source = Generated {
        rows: (gb * 1e9 / 1_500.0) as u64,
        row_bytes: 1_500,
    };
    let (samples, start) = (Samples::default(), Instant::now());
    let options = ImportOptions::default();
    let cancel = CancelToken::new();
    let store = sink();
    let running = import(&store, "stream", &source, &options, &samples, &cancel);
    let stage = Runtime::new()
        .expect("a runtime")
        .block_on(running)
        .expect("imported");
    let seconds = start.elapsed().as_secs_f64();
    let samples = samples.0.into_inner().expect("no panic");
    let tenths = samples.chunks(samples.len().div_ceil(10).max(1));
    let peaks: Vec<u64> = tenths
        .map(|part| part.iter().max().map_or(0, |kb| kb >> 10))
        .collect();
    let rows = stage.counts()["rows"];
    eprintln!(
        "stream: {gb} GB, {rows} rows in {seconds:.0} s ({:.0} MB/s)",
        gb * 1e3 / seconds
    );
    eprintln!(
        "peak {} MB; of each tenth of the stream, in MB: {peaks:?}",
        status("VmHWM").unwrap_or(0) >> 10
    );
}
