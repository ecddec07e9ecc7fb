//! The order of a whole run, known before it starts: windows of examples,
//! their micro-batches, and how many optimizer steps they make.

use serde::{Deserialize, Serialize};

use crate::packing::{best_fit_decreasing, fill_rate};
use crate::source::{ExamplePlan, ExampleSource};
use crate::{Error, Result, TrainConfig};

/// How examples become micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batching {
    /// A micro-batch is this many examples, in order.
    Examples {
        /// Examples per micro-batch.
        batch_size: usize,
    },
    /// A micro-batch is this many rows, each packed with the examples of a
    /// window.
    Packed {
        /// Rows per micro-batch.
        rows: usize,
        /// Tokens per row.
        max_seq_len: u32,
        /// Examples packed together.
        window: usize,
    },
}

impl Batching {
    /// Examples planned together; micro-batches never cross this border.
    pub fn window(&self) -> usize {
        match *self {
            Self::Examples { batch_size } => batch_size,
            Self::Packed { window, .. } => window,
        }
    }

    /// Rows in a micro-batch; without packing a row is one example.
    pub fn rows_per_micro_batch(&self) -> usize {
        match *self {
            Self::Examples { batch_size } => batch_size,
            Self::Packed { rows, .. } => rows,
        }
    }

    /// The rows of one window, as positions in `lengths`: a pure function, so
    /// any worker plans alike.
    pub fn rows(&self, lengths: &[u32]) -> Vec<Vec<usize>> {
        match *self {
            Self::Examples { .. } => (0..lengths.len()).map(|position| vec![position]).collect(),
            Self::Packed { max_seq_len, .. } => best_fit_decreasing(lengths, max_seq_len),
        }
    }
}

/// Where a run stands between two optimizer steps: enough for any later
/// process to continue with the next example.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// The id of the source's plan, which names content and order.
    pub plan: String,
    /// Pass over the data, from zero.
    pub epoch: u64,
    /// Window within the epoch.
    pub window: u64,
    /// Micro-batch within the window.
    pub micro_batch: u64,
    /// Optimizer steps done in the whole run.
    pub step: u64,
}

/// One epoch's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochShape {
    /// Tokens over all examples.
    pub tokens: u64,
    /// Packed rows; without packing, examples.
    pub rows: u64,
    /// Micro-batches.
    pub micro_batches: u64,
    /// Optimizer steps: `ceil(micro_batches / gradient_accumulation_steps)`.
    pub steps: u64,
}

/// The run as planned: pure arithmetic over lengths.
#[derive(Debug, Clone, Copy)]
pub struct RunPlan<'a> {
    source: &'a dyn ExampleSource,
    batching: Batching,
    grad_accum_steps: u64,
    total_steps: u64,
}

impl<'a> RunPlan<'a> {
    /// Plans all epochs of a run and counts its steps.
    ///
    /// # Errors
    /// [`Error::Config`] for settings no run could follow,
    /// [`Error::NothingToLearn`] when no token of the source is trained,
    /// [`Error::EmptyStep`] when none of a step is,
    /// [`Error::TooLong`] when an example does not fit `max_seq_len`,
    /// [`Error::PlanMismatch`] when the source's plan contradicts itself.
    pub fn new(source: &'a dyn ExampleSource, config: &TrainConfig) -> Result<Self> {
        config.validate()?;
        check_plan(source, config)?;
        let mut plan = Self {
            source,
            batching: config.batching(),
            grad_accum_steps: u64::from(config.gradient_accumulation_steps),
            total_steps: 0,
        };
        plan.total_steps = match config.max_steps {
            Some(steps) => steps,
            None => plan.steps_of(config.num_train_epochs),
        };
        plan.check_steps()?;
        Ok(plan)
    }

    /// Checks that each step has a trained token.
    fn check_steps(&self) -> Result<()> {
        let trained = &self.source.plan().trained_tokens;
        if trained.iter().all(|&tokens| tokens > 0) {
            return Ok(()); // Whatever the steps are.
        }
        let mut step = 0;
        for epoch in 0.. {
            let (mut in_step, mut tokens) = (0, 0);
            for window in 0..self.num_windows() {
                let rows = self.window_rows(epoch, window);
                for micro_batch in self.micro_batches(epoch, window) {
                    let of_row = |position: usize| u64::from(trained[rows[position] as usize]);
                    tokens += micro_batch.into_iter().map(of_row).sum::<u64>();
                    in_step += 1;
                    if in_step == self.grad_accum_steps {
                        step = self.check_step(step, tokens)?;
                        (in_step, tokens) = (0, 0);
                    }
                }
            }
            if in_step > 0 {
                step = self.check_step(step, tokens)?;
            }
            if step >= self.total_steps {
                break;
            }
        }
        Ok(())
    }

    /// Counts a step, which must have trained tokens if the run gets that far.
    fn check_step(&self, done: u64, tokens: u64) -> Result<u64> {
        match done < self.total_steps && tokens == 0 {
            true => Err(Error::EmptyStep { step: done + 1 }),
            false => Ok(done + 1),
        }
    }

    /// Whether a run of this plan ever stands there.
    pub(crate) fn holds(&self, cursor: &Cursor) -> bool {
        let Cursor {
            epoch,
            window,
            micro_batch,
            step,
            ..
        } = *cursor;
        // Each epoch has a step at least, which bounds the counting below.
        if step > self.total_steps || epoch > step || window >= self.num_windows() {
            return false;
        }
        let micro_batches = |window| self.micro_batches(epoch, window).len() as u64;
        if micro_batch > 0 && micro_batch >= micro_batches(window) {
            return false;
        }
        let before: u64 = (0..epoch).map(|epoch| self.epoch(epoch).steps).sum();
        let within = (0..window).map(micro_batches).sum::<u64>() + micro_batch;
        within.is_multiple_of(self.grad_accum_steps)
            && before + within / self.grad_accum_steps == step
    }

    /// Checks that every example fits a model's context.
    ///
    /// # Errors
    /// [`Error::TooLong`].
    pub fn check_context(&self, max_len: usize) -> Result<()> {
        let limit = u32::try_from(max_len).unwrap_or(u32::MAX);
        check_lengths(self.source.plan(), "the model's context of", limit)
    }

    /// Optimizer steps in the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Before the first step.
    pub fn start(&self) -> Cursor {
        let plan = self.source.plan().id.clone();
        Cursor {
            plan,
            epoch: 0,
            window: 0,
            micro_batch: 0,
            step: 0,
        }
    }

    /// Examples in an epoch.
    pub fn num_examples(&self) -> u64 {
        self.source.plan().lengths.len() as u64
    }

    /// Micro-batches per optimizer step.
    pub fn grad_accum_steps(&self) -> u64 {
        self.grad_accum_steps
    }

    /// Windows in an epoch.
    pub fn num_windows(&self) -> u64 {
        self.num_examples().div_ceil(self.batching.window() as u64)
    }

    /// Index in the epoch's order at which a window begins.
    pub fn window_start(&self, window: u64) -> u64 {
        window * self.batching.window() as u64
    }

    /// The storage rows of a window, in order.
    pub fn window_rows(&self, epoch: u64, window: u64) -> Vec<u64> {
        let start = self.window_start(window);
        let end = self.window_start(window + 1).min(self.num_examples());
        (start..end)
            .map(|index| self.source.row(epoch, index))
            .collect()
    }

    /// The micro-batches of a window, as positions in
    /// [`window_rows`](Self::window_rows).
    pub fn micro_batches(&self, epoch: u64, window: u64) -> Vec<Vec<usize>> {
        self.rows(epoch, window)
            .chunks(self.batching.rows_per_micro_batch())
            .map(<[Vec<usize>]>::concat)
            .collect()
    }

    /// Counts an epoch's rows, micro-batches and steps.
    pub fn epoch(&self, epoch: u64) -> EpochShape {
        let mut shape = EpochShape {
            tokens: self
                .source
                .plan()
                .lengths
                .iter()
                .copied()
                .map(u64::from)
                .sum(),
            rows: 0,
            micro_batches: 0,
            steps: 0,
        };
        for window in 0..self.num_windows() {
            let rows = self.rows(epoch, window).len();
            shape.rows += rows as u64;
            shape.micro_batches += rows.div_ceil(self.batching.rows_per_micro_batch()) as u64;
        }
        shape.steps = shape.micro_batches.div_ceil(self.grad_accum_steps);
        shape
    }

    /// The share of the packed rows that tokens fill, in the first epoch; `None` without packing.
    pub fn fill_rate(&self) -> Option<f64> {
        let Batching::Packed { max_seq_len, .. } = self.batching else {
            return None;
        };
        let EpochShape { tokens, rows, .. } = self.epoch(0);
        Some(fill_rate(tokens, rows, max_seq_len))
    }

    fn rows(&self, epoch: u64, window: u64) -> Vec<Vec<usize>> {
        let lengths = &self.source.plan().lengths;
        let window_rows = self.window_rows(epoch, window);
        let lengths: Vec<u32> = window_rows
            .iter()
            .map(|&row| lengths[row as usize])
            .collect();
        self.batching.rows(&lengths)
    }

    fn steps_of(&self, epochs: f64) -> u64 {
        let whole: u64 = (0..epochs.floor() as u64)
            .map(|epoch| self.epoch(epoch).steps)
            .sum();
        match epochs.fract() {
            0.0 => whole,
            part => whole + (part * self.epoch(epochs.floor() as u64).steps as f64).ceil() as u64,
        }
    }
}

fn check_plan(source: &dyn ExampleSource, config: &TrainConfig) -> Result<()> {
    let plan = source.plan();
    let mismatch = |row: usize, what| Error::PlanMismatch {
        source_id: plan.id.clone(),
        row: row as u64,
        what,
    };
    if plan.lengths.len() != plan.trained_tokens.len() {
        let row = plan.lengths.len().min(plan.trained_tokens.len());
        return Err(mismatch(
            row,
            "lengths and trained tokens are not equally many",
        ));
    }
    check_lengths(plan, "max_seq_len", config.max_seq_len)?;
    for (row, (&tokens, &trained)) in plan.lengths.iter().zip(&plan.trained_tokens).enumerate() {
        if trained > tokens.saturating_sub(1) {
            return Err(mismatch(
                row,
                "more trained tokens than tokens with one before them",
            ));
        }
    }
    if plan.trained_tokens.iter().all(|&trained| trained == 0) {
        return Err(Error::NothingToLearn {
            source_id: plan.id.clone(),
        });
    }
    Ok(())
}

fn check_lengths(plan: &ExamplePlan, limit_name: &'static str, limit: u32) -> Result<()> {
    match plan.lengths.iter().position(|&tokens| tokens > limit) {
        Some(row) => {
            let tokens = plan.lengths[row];
            Err(Error::TooLong {
                row: row as u64,
                tokens,
                limit_name,
                limit,
            })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;
    use crate::testing::example;

    fn source(lengths: &[usize]) -> MemorySource {
        MemorySource::new(
            "lengths",
            lengths.iter().map(|&tokens| example(tokens)).collect(),
        )
    }

    fn steps(examples: usize, config: &TrainConfig) -> u64 {
        let source = source(&vec![4; examples]);
        RunPlan::new(&source, config).expect("a plan").total_steps()
    }

    #[test]
    fn steps_are_counted_as_the_trainer_of_transformers_counts() {
        let config = TrainConfig {
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 4,
            ..Default::default()
        };
        // 21 examples are 11 micro-batches are 3 steps, three times.
        assert_eq!(steps(21, &config), 9);
        let half_more = TrainConfig {
            num_train_epochs: 1.5,
            ..config.clone()
        };
        assert_eq!(steps(21, &half_more), 5);
        let fixed = TrainConfig {
            max_steps: Some(60),
            ..config
        };
        assert_eq!(steps(21, &fixed), 60);
    }

    #[test]
    fn packed_micro_batches_hold_each_example_once() {
        let lengths: Vec<usize> = (0..100).map(|i| 2 + (i * 37) % 60).collect();
        let source = source(&lengths).shuffled(5);
        let config = TrainConfig {
            packing: true,
            max_seq_len: 64,
            packing_window: 32,
            per_device_train_batch_size: 2,
            ..Default::default()
        };
        let plan = RunPlan::new(&source, &config).expect("a plan");
        let mut seen = Vec::new();
        let mut micro_batches = 0;
        for window in 0..plan.num_windows() {
            let rows = plan.window_rows(3, window);
            for micro_batch in plan.micro_batches(3, window) {
                micro_batches += 1;
                seen.extend(micro_batch.iter().map(|&position| rows[position]));
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<u64>>());
        assert_eq!(plan.epoch(3).micro_batches, micro_batches);
        let shape = plan.epoch(0);
        let fill = shape.tokens as f64 / (shape.rows * 64) as f64;
        assert_eq!(plan.fill_rate(), Some(fill));
        assert!(fill > 0.9 && fill <= 1.0, "{fill}");
        let unpacked = TrainConfig {
            packing: false,
            ..config
        };
        let unpacked = RunPlan::new(&source, &unpacked).expect("a plan");
        assert_eq!(unpacked.fill_rate(), None);
    }

    #[test]
    fn what_cannot_be_trained_is_refused_before_the_first_step() {
        let config = TrainConfig {
            max_seq_len: 8,
            ..Default::default()
        };
        let long = source(&[4, 9]);
        let error = RunPlan::new(&long, &config).expect_err("too long");
        assert!(
            matches!(
                error,
                Error::TooLong {
                    row: 1,
                    tokens: 9,
                    limit: 8,
                    ..
                }
            ),
            "{error}"
        );

        let mut untrained = example(4);
        untrained.loss_spans.clear();
        let untrained = MemorySource::new("untrained", vec![untrained]);
        let error = RunPlan::new(&untrained, &config).expect_err("no trained token");
        assert!(matches!(error, Error::NothingToLearn { .. }), "{error}");
    }
}
