//! Imports conversations from anywhere into committed Parquet shards, and prints the manifest.
//!
//! ```sh
//! cargo run --release --example shard_dataset
//! cargo run --release --example shard_dataset -- --source mlabonne/FineTome-100k --store s3://bucket/prefix
//! ```
//!
//! `--source` is a file, a folder, an object-store URL or a Hub dataset; without it, a few rows of
//! its own. `--store` is a folder or a URL, by default `./store`. Also `--config`, `--split`,
//! `--format`, `--limit` and `--raw`, which keeps the rows as they came too. Run it again: nothing
//! is written. Kill it and run it again: it goes on, and prints the same manifest.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use serde_json::json;
use updraft::dataset::source::default_name;
use updraft::dataset::{
    ImportOptions, MemorySource, Source, SourceOptions, import, resolve_source_with,
};
use updraft::store::{CancelToken, Progress, ProgressSink, Store};

#[derive(Debug, Default)]
struct Settings {
    source: Option<String>,
    store: Option<String>,
    from: SourceOptions,
    import: ImportOptions,
}

#[tokio::main]
async fn main() -> Result<()> {
    let settings = settings()?;
    let lines = Lines::default();

    // 1. Ctrl-C asks it to stop; what is written stays, and the next run goes on from there.
    let cancel = CancelToken::new();
    tokio::spawn({
        let cancel = cancel.clone();
        async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                cancel.cancel();
            }
        }
    });

    // 2. What is named is found and pinned: to a commit, an ETag, a hash.
    let (name, source) = match &settings.source {
        Some(spec) => {
            let source: Arc<dyn Source> =
                resolve_source_with(spec, &settings.from, &lines, &cancel).await?;
            (default_name(spec, &settings.from), source)
        }
        None => ("greetings".to_owned(), greetings()?),
    };

    // 3. Rows become shards, with bounded memory; the manifest comes last and makes it finished.
    let store = Store::open(settings.store.as_deref().unwrap_or("./store"))?;
    let stage = import(&store, &name, &*source, &settings.import, &lines, &cancel).await?;

    let done = if stage.reused() {
        "was finished before"
    } else {
        "is finished"
    };
    let end = lines.end();
    writeln!(
        std::io::stderr(),
        "{end}{} {done}",
        store.url_of(&stage.dir())
    )?;
    serde_json::to_writer_pretty(std::io::stdout().lock(), &stage.manifest().await?)?;
    writeln!(std::io::stdout())?;
    Ok(())
}

/// A few rows, so that the example shows something without being given anything.
fn greetings() -> Result<Arc<dyn Source>> {
    let row = |i| json!({ "instruction": "Greet the guest.", "input": format!("guest {i}"), "output": format!("Welcome, guest {i}!") });
    Ok(Arc::new(MemorySource::new(
        "greetings",
        (0..1000).map(row),
    )?))
}

/// Progress as lines on standard error; standard output is the manifest's.
#[derive(Debug, Default)]
struct Lines(AtomicBool);

impl Lines {
    /// What ends the line, if there is one.
    fn end(&self) -> &'static str {
        if self.0.load(Ordering::Relaxed) {
            "\n"
        } else {
            ""
        }
    }
}

impl ProgressSink for Lines {
    fn report(&self, progress: &Progress) {
        let total = progress
            .total
            .map(|total| format!("/{total}"))
            .unwrap_or_default();
        self.0.store(true, Ordering::Relaxed);
        let _ = write!(
            std::io::stderr(),
            "\r{} {}{total} {}  ",
            progress.stage,
            progress.done,
            progress.unit
        );
    }
}

fn settings() -> Result<Settings> {
    use lexopt::prelude::*;

    let mut settings = Settings::default();
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Long("source") => settings.source = Some(args.value()?.string()?),
            Long("store") => settings.store = Some(args.value()?.string()?),
            Long("config") => settings.from.config = Some(args.value()?.string()?),
            Long("split") => settings.from.split = args.value()?.string()?,
            Long("format") => settings.import.format = Some(args.value()?.string()?),
            Long("limit") => settings.import.limit = Some(args.value()?.parse()?),
            Long("raw") => settings.import.keep_raw = true,
            other => bail!(
                "{}; the header of this example lists what it takes",
                other.unexpected()
            ),
        }
    }
    Ok(settings)
}
