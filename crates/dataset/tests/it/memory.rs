//! Memory does not grow with the dataset: a generated stream into a store that forgets it.
//!
//! The peak is that of a process, so the test starts itself anew and looks at that one.
//! `UPDRAFT_STREAM_MB` makes the stream longer.

use std::process::Command;
use std::sync::Mutex;

use updraft_dataset::conformance::Generated;
use updraft_dataset::{ImportOptions, ShardPlan, import};
use updraft_store::sink::sink;
use updraft_store::{CancelToken, Progress, ProgressSink};

/// Set in the process that imports, to how many MB.
const CHILD: &str = "UPDRAFT_MEMORY_CHILD_MB";
const ROW_BYTES: usize = 2_000;
/// Smaller than the default, so that a short stream has many shards too.
const SHORT_SHARD_BYTES: u64 = 8 << 20;
/// From here on a stream has many shards of the default size.
const LONG_MB: u64 = 1_000;
/// DESIGN's budget is 512; the test's own process takes its part.
const BUDGET_KB: u64 = 512 << 10;

/// A line of `/proc/self/status` in KB: `VmHWM`, `VmRSS`; `None` where there is no such file.
fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The resident memory at every event.
#[derive(Debug, Default)]
struct Samples(Mutex<Vec<u64>>);

impl ProgressSink for Samples {
    fn report(&self, _: &Progress) {
        let mut samples = self.0.lock().expect("no panic while it is held");
        samples.extend(status("VmRSS"));
    }
}

#[tokio::test]
#[expect(clippy::print_stdout, reason = "the parent reads it")]
async fn child() {
    let Some(mb) = std::env::var(CHILD)
        .ok()
        .and_then(|mb| mb.parse::<u64>().ok())
    else {
        return; // Only the parent's start means it.
    };
    let source = Generated {
        rows: (mb << 20) / ROW_BYTES as u64,
        row_bytes: ROW_BYTES,
    };
    let samples = Samples::default();
    let mut shards = ShardPlan::default();
    if mb < LONG_MB {
        shards.max_bytes = SHORT_SHARD_BYTES;
    }
    let options = ImportOptions {
        shards,
        ..ImportOptions::default()
    };
    let imported = import(
        &sink(),
        "endless",
        &source,
        &options,
        &samples,
        &CancelToken::new(),
    )
    .await
    .expect("imported");
    assert_eq!(imported.counts()["rows"], source.rows);
    let samples = samples.0.into_inner().expect("no panic");
    let peak = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
    let (first, second) = samples.split_at(samples.len() / 2);
    println!(
        "peaks {} {} {}",
        peak(first),
        peak(second),
        status("VmHWM").unwrap_or(0)
    );
}

/// The peaks of the stream's first half, its second half, and the whole process, in KB.
fn peaks(mb: u64) -> [u64; 3] {
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "memory::child", "--nocapture"])
        .env(CHILD, mb.to_string())
        .output()
        .expect("started");
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = out
        .lines()
        .find_map(|line| Some(line.split_once("peaks ")?.1));
    let line = line.unwrap_or_else(|| panic!("{out}\n{}", String::from_utf8_lossy(&output.stderr)));
    let mut numbers = line
        .split(' ')
        .map(|number| number.parse().expect("a number"));
    std::array::from_fn(|_| numbers.next().expect("three"))
}

#[test]
#[expect(
    clippy::print_stderr,
    reason = "a skipped test says so, and the figure is wanted"
)]
fn a_longer_stream_needs_no_more_memory() {
    if status("VmHWM").is_none() {
        eprintln!("skipped: no /proc/self/status here");
        return;
    }
    let mb = std::env::var("UPDRAFT_STREAM_MB")
        .ok()
        .and_then(|mb| mb.parse().ok())
        .unwrap_or(160);
    let [first, second, peak] = peaks(mb);
    eprintln!(
        "{mb} MB: peak {} MB, in the first half {} MB, in the second {} MB",
        peak >> 10,
        first >> 10,
        second >> 10
    );
    assert!(peak < BUDGET_KB, "a peak of {peak} KB");
    // Flat: were the second half kept, it would add more than its own size.
    let allowed = if mb < LONG_MB { 48 << 10 } else { 128 << 10 };
    assert!(second < first + allowed, "{second} KB after {first} KB");
}
