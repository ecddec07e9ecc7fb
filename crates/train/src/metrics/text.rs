//! A run's figures as lines for people, while it runs and when it is over.

use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

use crate::observer::{Observer, StepStats};
use crate::{EvalRecord, TrainReport};

/// Writes a line for every so many-th step, as transformers logs it, the loss being the mean of the
/// steps since the line before, with the run's speed and how
/// long the rest will take; and one for each evaluation.
///
/// ```text
/// {'loss': 1.2345, 'grad_norm': 0.512, 'learning_rate': 1.8e-4, 'epoch': 0.25}  40/160  2950 tokens/s  0:01:03 left
/// ```
#[derive(Debug)]
pub struct TextLines<W> {
    out: W,
    logging_steps: u64,
    /// When this process began, and after which step.
    began: Option<(Instant, u64)>,
    /// The losses since the last line, and how many they are.
    losses: (f64, u64),
}

impl<W: Write + fmt::Debug + Send> TextLines<W> {
    /// Writes to `out`, such as standard output, after every `logging_steps` steps.
    pub fn new(out: W, logging_steps: u64) -> Self {
        Self {
            out,
            logging_steps: logging_steps.max(1),
            began: None,
            losses: (0.0, 0),
        }
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        // A reader that has gone away must not end the run.
        let _ = writeln!(self.out, "{line}");
    }
}

impl<W: Write + fmt::Debug + Send> Observer for TextLines<W> {
    fn on_step(&mut self, stats: &StepStats<'_>) {
        let record = stats.record;
        // The first step's own time is not known.
        let (began, after) = *self.began.get_or_insert((Instant::now(), record.step));
        let (step, total) = (record.step, stats.total_steps);
        self.losses = (self.losses.0 + record.loss, self.losses.1 + 1);
        if !step.is_multiple_of(self.logging_steps) && step != total {
            return;
        }
        let rest = match step - after {
            0 => String::new(),
            done => {
                let left = total.saturating_sub(step) as f64 / done as f64;
                format!("  {} left", clock(began.elapsed().mul_f64(left)))
            }
        };
        let (sum, steps) = std::mem::take(&mut self.losses);
        let (loss, norm, epoch) = (sum / steps as f64, record.grad_norm, record.epoch);
        let (rate, speed) = (record.learning_rate, stats.tokens_per_second);
        self.line(format_args!(
            "{{'loss': {loss:.4}, 'grad_norm': {norm:.3}, 'learning_rate': {rate:.3e}, 'epoch': {epoch:.2}}}  \
             {step}/{total}  {speed:.0} tokens/s{rest}"
        ));
    }

    fn on_evaluation(&mut self, eval: &EvalRecord) {
        let (loss, perplexity, epoch) = (eval.eval_loss, eval.perplexity(), eval.epoch);
        self.line(format_args!(
            "{{'eval_loss': {loss:.4}, 'eval_perplexity': {perplexity:.3}, 'epoch': {epoch:.2}}}"
        ));
    }

    fn on_end(&mut self, report: &TrainReport) {
        self.line(format_args!("{report}"));
    }
}

/// The closing statistics as a table, as `Trainer.log_metrics` of transformers prints them.
impl fmt::Display for TrainReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "***** train metrics *****")?;
        let mut row = |name: &str, value: &str| write!(f, "\n  {name:<24} = {value:>12}");
        row("epoch", &format!("{:.2}", self.epoch))?;
        if let Some(eval) = &self.eval {
            row("eval_loss", &format!("{:.4}", eval.eval_loss))?;
        }
        row("train_loss", &format!("{:.4}", self.train_loss))?;
        row("train_runtime", &clock(self.train_runtime))?;
        if let Some(fill) = self.packing_fill_rate {
            row("packing_fill_rate", &format!("{:.1}%", 100.0 * fill))?;
        }
        for (name, value) in [
            ("train_samples_per_second", self.train_samples_per_second),
            ("train_steps_per_second", self.train_steps_per_second),
            ("train_tokens_per_second", self.train_tokens_per_second),
        ] {
            row(name, &format!("{value:.3}"))?;
        }
        row(
            "useful_gflops",
            &format!("{:.1}", self.flops_per_second / 1e9),
        )?;
        if let Some(mfu) = self.mfu {
            row("mfu", &format!("{:.1}%", 100.0 * mfu))?;
        }
        for (name, bytes) in [
            ("peak_memory", self.peak_memory_bytes),
            ("peak_gpu_memory", self.peak_gpu_memory_bytes),
        ] {
            if let Some(bytes) = bytes {
                row(name, &format!("{} MiB", bytes >> 20))?;
            }
        }
        Ok(())
    }
}

/// `0:02:03.45`
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, hundredths) =
        (seconds / 3600, seconds / 60 % 60, time.subsec_millis() / 10);
    format!("{hours}:{minutes:02}:{:02}.{hundredths:02}", seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{records, report};

    #[test]
    fn lines_come_every_so_many_steps_and_after_the_last() {
        let mut out = Vec::new();
        let mut lines = TextLines::new(&mut out, 4);
        for record in &records(10) {
            lines.on_step(&StepStats {
                record,
                total_steps: 10,
                tokens_per_second: 1234.4,
            });
        }
        let text = String::from_utf8(out).expect("text");
        let steps: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split("  ").nth(1))
            .collect();
        assert_eq!(steps, ["4/10", "8/10", "10/10"]);
        assert!(
            text.lines()
                .all(|line| line.contains("1234 tokens/s  0:00:00")),
            "{text}"
        );
        let mean = |records: &[crate::StepRecord]| {
            let sum: f64 = records.iter().map(|record| record.loss).sum();
            sum / records.len() as f64
        };
        let records = records(10);
        for (line, steps) in text.lines().zip([0..4, 4..8, 8..10]) {
            let loss = format!("{{'loss': {:.4}, ", mean(&records[steps]));
            assert!(line.starts_with(&loss), "{line} has not {loss}");
        }
    }

    #[test]
    fn the_statistics_are_a_table() {
        let packed = TrainReport {
            packing_fill_rate: Some(0.985),
            ..report(8)
        };
        let text = packed.to_string();
        let expected = "\
***** train metrics *****
  epoch                    =         1.00
  train_loss               =       1.2500
  train_runtime            =   0:00:02.00
  packing_fill_rate        =        98.5%
  train_samples_per_second =        8.000
  train_steps_per_second   =        4.000
  train_tokens_per_second  =      384.000
  useful_gflops            =          1.0
  mfu                      =        50.0%
  peak_memory              =     1024 MiB";
        assert_eq!(text, expected);
        let long = Duration::from_millis(3_723_450);
        assert_eq!(clock(long), "1:02:03.45");
    }
}
