//! Reads ahead: turns the plan and the source into the examples of each
//! optimizer step, on a thread, a few steps before they are needed.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use updraft_chat::Example;

use crate::plan::{Cursor, RunPlan};
use crate::source::{ExampleSource, ExampleStream};
use crate::{Error, Result};

/// Optimizer steps read before they are asked for.
const STEPS_AHEAD: usize = 2;

/// The examples of one optimizer step.
#[derive(Debug, PartialEq)]
pub(crate) struct StepExamples {
    /// The micro-batches.
    pub(crate) micro_batches: Vec<Vec<Example>>,
    /// Where the step after this one starts.
    pub(crate) next: Cursor,
    /// Passes over the data done with this step.
    pub(crate) epoch: f64,
}

/// Runs a [`StepReader`] on its own thread. It ends with the run's last step,
/// with an error, or when the receiver is dropped.
pub(crate) fn read_ahead<'scope>(
    scope: &'scope Scope<'scope, '_>,
    reader: StepReader<'scope>,
) -> Receiver<Result<StepExamples>> {
    let (sender, receiver) = sync_channel(STEPS_AHEAD);
    scope.spawn(move || {
        for step in reader {
            let last = step.is_err();
            if sender.send(step).is_err() || last {
                break;
            }
        }
    });
    receiver
}

/// The steps of a run from a cursor on.
#[derive(Debug)]
pub(crate) struct StepReader<'a> {
    source: &'a dyn ExampleSource,
    plan: RunPlan<'a>,
    cursor: Cursor,
    epoch: Option<OpenEpoch<'a>>,
}

/// The epoch being read.
struct OpenEpoch<'a> {
    stream: ExampleStream<'a>,
    window: VecDeque<Vec<Example>>,
    micro_batches: u64,
    micro_batches_done: u64,
}

impl<'a> StepReader<'a> {
    pub(crate) fn new(source: &'a dyn ExampleSource, plan: RunPlan<'a>, cursor: Cursor) -> Self {
        Self {
            source,
            plan,
            cursor,
            epoch: None,
        }
    }

    fn step(&mut self) -> Result<StepExamples> {
        let mut micro_batches = Vec::new();
        let mut epoch = 0.0;
        while (micro_batches.len() as u64) < self.plan.grad_accum_steps() {
            let (micro_batch, passes) = self.micro_batch()?;
            micro_batches.push(micro_batch);
            epoch = passes;
            if self.epoch.is_none() {
                break; // A step never crosses into the next epoch.
            }
        }
        self.cursor.step += 1;
        Ok(StepExamples {
            micro_batches,
            next: self.cursor.clone(),
            epoch,
        })
    }

    /// The next micro-batch, and the passes over the data done with it.
    fn micro_batch(&mut self) -> Result<(Vec<Example>, f64)> {
        let mut open = match self.epoch.take() {
            Some(open) => open,
            None => self.open_epoch()?,
        };
        if open.window.is_empty() && self.cursor.micro_batch == 0 {
            self.read_window(&mut open)?;
        }
        let nowhere = || Error::ForeignCheckpoint {
            step: self.cursor.step,
            what: "the place in the data",
        };
        let micro_batch = open.window.pop_front().ok_or_else(nowhere)?;
        open.micro_batches_done += 1;
        let passes =
            self.cursor.epoch as f64 + open.micro_batches_done as f64 / open.micro_batches as f64;

        let cursor = &mut self.cursor;
        cursor.micro_batch += 1;
        if open.window.is_empty() {
            (cursor.window, cursor.micro_batch) = (cursor.window + 1, 0);
        }
        if cursor.window == self.plan.num_windows() {
            (cursor.epoch, cursor.window) = (cursor.epoch + 1, 0);
        } else {
            self.epoch = Some(open);
        }
        Ok((micro_batch, passes))
    }

    /// Opens the cursor's epoch at the cursor's micro-batch.
    fn open_epoch(&self) -> Result<OpenEpoch<'a>> {
        let Cursor {
            epoch,
            window,
            micro_batch,
            ..
        } = self.cursor;
        let before: u64 = (0..window)
            .map(|window| self.plan.micro_batches(epoch, window).len() as u64)
            .sum();
        let mut open = OpenEpoch {
            stream: self.source.open(epoch, self.plan.window_start(window))?,
            window: VecDeque::new(),
            micro_batches: self.plan.epoch(epoch).micro_batches,
            micro_batches_done: before + micro_batch,
        };
        self.read_window(&mut open)?;
        open.window
            .drain(..(micro_batch as usize).min(open.window.len()));
        Ok(open)
    }

    /// Reads the cursor's window and deals its examples out to micro-batches.
    fn read_window(&self, open: &mut OpenEpoch<'a>) -> Result<()> {
        let Cursor { epoch, window, .. } = self.cursor;
        let mut examples = Vec::new();
        for row in self.plan.window_rows(epoch, window) {
            let example = open
                .stream
                .next()
                .unwrap_or_else(|| Err(self.mismatch(row, "the stream ended before it")))?;
            self.check(row, &example)?;
            examples.push(Some(example));
        }
        open.window = self
            .plan
            .micro_batches(epoch, window)
            .into_iter()
            .map(|positions| {
                let take = |position: usize| examples[position].take();
                positions.into_iter().filter_map(take).collect()
            })
            .collect();
        Ok(())
    }

    fn check(&self, row: u64, example: &Example) -> Result<()> {
        let plan = self.source.plan();
        if example.input_ids.len() != plan.lengths[row as usize] as usize {
            return Err(self.mismatch(row, "its length"));
        }
        if example.trained_tokens() != plan.trained_tokens[row as usize] {
            return Err(self.mismatch(row, "its trained tokens"));
        }
        Ok(())
    }

    fn mismatch(&self, row: u64, what: &'static str) -> Error {
        Error::PlanMismatch {
            source_id: self.source.plan().id.clone(),
            row,
            what,
        }
    }
}

impl Iterator for StepReader<'_> {
    type Item = Result<StepExamples>;

    fn next(&mut self) -> Option<Self::Item> {
        (self.cursor.step < self.plan.total_steps()).then(|| self.step())
    }
}

impl std::fmt::Debug for OpenEpoch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenEpoch")
            .field("window", &self.window.len())
            .field("micro_batches", &self.micro_batches)
            .field("micro_batches_done", &self.micro_batches_done)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TrainConfig;
    use crate::source::MemorySource;
    use crate::testing::example;

    fn source() -> MemorySource {
        let examples = (0..23).map(|i| example(2 + (i * 7) % 11)).collect();
        MemorySource::new("read", examples).shuffled(9)
    }

    fn configs() -> [TrainConfig; 2] {
        let fixed = TrainConfig {
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 3,
            num_train_epochs: 3.0,
            max_seq_len: 16,
            packing_window: 8,
            ..Default::default()
        };
        [
            TrainConfig {
                packing: true,
                ..fixed.clone()
            },
            fixed,
        ]
    }

    fn read(
        source: &MemorySource,
        config: &TrainConfig,
        cursor: Option<Cursor>,
    ) -> Vec<StepExamples> {
        let plan = RunPlan::new(source, config).expect("a plan");
        let cursor = cursor.unwrap_or_else(|| plan.start());
        StepReader::new(source, plan, cursor)
            .collect::<Result<_>>()
            .expect("steps")
    }

    #[test]
    fn any_cursor_continues_with_the_same_steps() {
        let source = source();
        for config in configs() {
            let all = read(&source, &config, None);
            for done in 0..all.len() {
                let rest = read(&source, &config, Some(all[done].next.clone()));
                assert_eq!(rest, all[done + 1..], "after step {}", done + 1);
            }
        }
    }

    #[test]
    fn each_epoch_holds_every_token_once_and_ends_whole() {
        let source = source();
        let tokens: usize = source
            .plan()
            .lengths
            .iter()
            .map(|&tokens| tokens as usize)
            .sum();
        for config in configs() {
            let steps = read(&source, &config, None);
            let read: usize = steps
                .iter()
                .flat_map(|step| step.micro_batches.iter().flatten())
                .map(|example| example.input_ids.len())
                .sum();
            assert_eq!(read, 3 * tokens);
            let last = steps.last().expect("steps");
            assert_eq!((last.epoch, last.next.epoch, last.next.window), (3.0, 3, 0));
        }
    }

    #[test]
    fn a_cursor_that_is_nowhere_in_the_plan_is_an_error() {
        let source = source();
        for config in configs() {
            let plan = RunPlan::new(&source, &config).expect("a plan");
            let all = read(&source, &config, None);
            assert!(plan.holds(&plan.start()));
            assert!(all.iter().all(|step| plan.holds(&step.next)));
            let there = all[0].next.clone();
            let moved = |change: fn(&mut Cursor)| {
                let mut cursor = there.clone();
                change(&mut cursor);
                cursor
            };
            let nowhere = [
                moved(|cursor| cursor.micro_batch = 99),
                moved(|cursor| (cursor.window, cursor.micro_batch) = (99, 0)),
            ];
            for cursor in nowhere {
                assert!(!plan.holds(&cursor), "{cursor:?}");
                let step = StepReader::new(&source, plan, cursor).next();
                let error = step.expect("not over").expect_err("nowhere");
                assert!(matches!(error, Error::ForeignCheckpoint { .. }), "{error}");
            }
            // Where it would train nothing and say that it did.
            assert!(!plan.holds(&moved(|cursor| cursor.step = 0)));
            let mut over = there.clone();
            over.step = plan.total_steps();
            assert!(!plan.holds(&over));
            over.step += 1;
            assert!(!plan.holds(&over));
        }
    }

    #[test]
    fn a_source_that_breaks_its_word_is_an_error() {
        #[derive(Debug)]
        struct Liar(MemorySource);
        impl ExampleSource for Liar {
            fn plan(&self) -> &crate::ExamplePlan {
                self.0.plan()
            }
            fn row(&self, epoch: u64, index: u64) -> u64 {
                self.0.row(epoch, index)
            }
            fn open(&self, epoch: u64, index: u64) -> Result<ExampleStream<'_>> {
                let whole = self.0.open(epoch, index)?;
                Ok(Box::new(whole.take(3)))
            }
        }
        let liar = Liar(source());
        let config = TrainConfig {
            per_device_train_batch_size: 4,
            ..Default::default()
        };
        let plan = RunPlan::new(&liar, &config).expect("a plan");
        let error = StepReader::new(&liar, plan, plan.start())
            .next()
            .expect("a step")
            .expect_err("short");
        assert!(matches!(error, Error::PlanMismatch { .. }), "{error}");
    }
}
