//! What a person sees: a bar per stage, or plain lines when the output is no terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use updraft::store::Progress;

use crate::events::{Event, StageSummary, finished_line, progress_line};

const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// Shows events and log lines, and keeps the summaries for the closing table.
pub struct Screen {
    bar: Option<ProgressBar>,
    stage: String,
    started: Instant,
    plain_at: Option<Instant>,
    pub summaries: Vec<StageSummary>,
}

impl Screen {
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0));
        Self {
            bar,
            stage: String::new(),
            started: Instant::now(),
            plain_at: None,
            summaries: Vec::new(),
        }
    }

    /// One line of a task's output.
    pub fn line(&mut self, line: &str) {
        match Event::parse(line) {
            Some(Event::Progress(progress)) => self.progress(&progress),
            Some(Event::Finished(summary)) => self.finished(summary),
            None => self.say(&format!("  | {line}")),
        }
    }

    /// A line above the bar.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{line}")),
            None => println!("{line}"),
        }
    }

    pub fn progress(&mut self, progress: &Progress) {
        if progress.stage != self.stage {
            progress.stage.clone_into(&mut self.stage);
            self.started = Instant::now();
            self.plain_at = None;
            if self.bar.is_some() {
                self.bar = Some(new_bar(progress));
            }
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(progress.done);
                bar.set_message(self.rates(progress));
            }
            None if self
                .plain_at
                .is_none_or(|at| at.elapsed() >= PLAIN_INTERVAL) =>
            {
                self.plain_at = Some(Instant::now());
                println!("{}", progress_line(progress));
            }
            None => {}
        }
    }

    /// Takes the bar away, as at the end of a stage.
    pub fn clear(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.stage.clear();
    }

    fn finished(&mut self, summary: StageSummary) {
        self.clear();
        self.say(&finished_line(&summary));
        self.summaries.push(summary);
    }

    /// A stage's own figures, the most telling first, or `1234 rows/s`.
    fn rates(&self, progress: &Progress) -> String {
        let figure =
            |name: &str, show: fn(f64) -> String| progress.metrics.get(name).copied().map(show);
        let figures = [
            figure("loss", |loss| format!("loss {loss:.3}")),
            figure("tokens_per_second", |rate| format!("{rate:.0} tokens/s")),
            figure("learning_rate", |rate| format!("lr {rate:.1e}")),
            figure("grad_norm", |norm| format!("grad norm {norm:.2}")),
            figure("epoch", |epoch| format!("epoch {epoch:.2}")),
        ];
        let figures: Vec<_> = figures.into_iter().flatten().collect();
        if figures.is_empty() {
            let rate = progress.done as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
            return format!("{rate:.0} {}/s", progress.unit);
        }
        figures.join("  ")
    }
}

fn new_bar(progress: &Progress) -> ProgressBar {
    let bar = ProgressBar::new(progress.total.unwrap_or(0)).with_prefix(progress.stage.clone());
    let template = match progress.total {
        Some(_) => "{prefix:12} [{bar:24}] {pos}/{len} eta {eta}  {wide_msg}",
        None => "{prefix:12} {spinner} {pos} {wide_msg}",
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar, // the default style shows the same figures less well
    }
}

/// The closing table.
pub fn table(summaries: &[StageSummary]) -> String {
    let mut table = format!(
        "\n{:<12} {:>8} {:>10} {:>12} {:>12}\n",
        "stage", "time", "rows", "tokens", "written"
    );
    let number = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
    for summary in summaries {
        let written = match summary.reused {
            true => "nothing".to_owned(),
            false => HumanBytes(summary.bytes_written).to_string(),
        };
        table.push_str(&format!(
            "{:<12} {:>6.1} s {:>10} {:>12} {:>12}\n",
            summary.stage,
            summary.seconds,
            number(summary.rows),
            number(summary.tokens),
            written
        ));
    }
    let rejected: u64 = summaries.iter().map(|summary| summary.rejected).sum();
    if rejected > 0 {
        table.push_str(&format!(
            "{rejected} rows were rejected; the manifests list them with their reasons\n"
        ));
    }
    table
}
