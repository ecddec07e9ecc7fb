//! Why training stopped, by what the caller can do next.

use std::path::PathBuf;

use crate::memory::LargestMicroBatch;

/// The error a foreign part (a source, a store) failed with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a training call failed, by what you can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting makes no sense; change it and start again.
    #[error("setting {field} is {value}, but {expected}")]
    Config {
        /// The setting, by its `TrainingArguments` name.
        field: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Not one token of the data counts towards the loss.
    #[error(
        "no token of {source_id} is trained: check the chat template and the assistant messages"
    )]
    NothingToLearn {
        /// The plan's id.
        source_id: String,
    },
    /// One optimizer step found no trained token.
    #[error("step {step} holds no trained token: drop the rows whose loss spans are empty")]
    EmptyStep {
        /// The optimizer step, counted from one.
        step: u64,
    },
    /// An example does not fit.
    #[error(
        "row {row} has {tokens} tokens, more than {limit_name} {limit}: pretokenize with a lower cap"
    )]
    TooLong {
        /// Storage row.
        row: u64,
        /// Its length.
        tokens: u32,
        /// Which limit: `max_seq_len` or the model's context.
        limit_name: &'static str,
        /// The limit.
        limit: u32,
    },
    /// A source yielded something other than its plan said.
    #[error("row {row} of {source_id} does not match its plan ({what}): prepare the data again")]
    PlanMismatch {
        /// The plan's id.
        source_id: String,
        /// Storage row.
        row: u64,
        /// What differs.
        what: &'static str,
    },
    /// A token the model has no embedding for.
    #[error(
        "token {token} is outside the model's vocabulary of {vocab_size}: the data was tokenized for another model"
    )]
    TokenOutOfRange {
        /// The token id.
        token: u32,
        /// How many the model knows.
        vocab_size: usize,
    },
    /// A loss span points outside its example.
    #[error("loss span {start}..{end} lies outside an example of {tokens} tokens")]
    SpanOutOfRange {
        /// First trained token.
        start: u32,
        /// One past the last trained token.
        end: u32,
        /// Length of the example.
        tokens: usize,
    },
    /// The loss left the finite numbers; the last checkpoint is intact.
    #[error("the loss became {loss} at step {step}: lower learning_rate or max_grad_norm")]
    LossNotFinite {
        /// The optimizer step, counted from one.
        step: u64,
        /// NaN or an infinity.
        loss: f64,
    },
    /// The gradient left the finite numbers; the last checkpoint is intact.
    #[error("the gradient norm became {norm} at step {step}: lower learning_rate or max_grad_norm")]
    GradientNotFinite {
        /// The optimizer step, counted from one.
        step: u64,
        /// NaN or an infinity.
        norm: f64,
    },
    /// A parameter left the finite numbers, so no checkpoint of it was written; the last one is
    /// intact.
    #[error(
        "after step {step} a parameter is no longer a finite number: lower learning_rate or max_grad_norm"
    )]
    ParametersNotFinite {
        /// The optimizer step, counted from one.
        step: u64,
    },
    /// The held-out loss left the finite numbers; the last checkpoint is intact.
    #[error(
        "the held-out loss became {loss} after step {step}: lower learning_rate or max_grad_norm"
    )]
    EvalLossNotFinite {
        /// The optimizer step, counted from one.
        step: u64,
        /// NaN or an infinity.
        loss: f64,
    },
    /// A variable that a launcher sets is missing or makes no sense.
    #[error(
        "{variable} {problem}: start the workers with torchrun, SkyPilot or Kubernetes, or set it"
    )]
    Launch {
        /// The variable.
        variable: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The workers of a run did not find each other.
    #[error(
        "the workers did not meet at {master}: start all of them, with one network between them"
    )]
    Rendezvous {
        /// Where the first one listens.
        master: String,
        /// Why.
        source: std::io::Error,
    },
    /// Another worker of the run is gone, or does something else; the last checkpoint is intact.
    #[error("lost worker {rank}: start the workers again, they continue from the last checkpoint")]
    Worker {
        /// Which one.
        rank: usize,
        /// What happened to it.
        source: std::io::Error,
    },
    /// One of the processes that this one started as workers failed.
    #[error("worker {rank} {what}: look at what it said; the others were ended")]
    Process {
        /// Which one.
        rank: usize,
        /// How it ended, or what could not be done with it.
        what: String,
        /// What the system says, if it does.
        source: Option<std::io::Error>,
    },
    /// The workers of a run were started differently.
    #[error("{what} of worker {rank} differs from the first worker's: start all of them alike")]
    WorkersDiffer {
        /// What differs.
        what: &'static str,
        /// The first worker that differs.
        rank: usize,
    },
    /// A tensor given to an optimizer has another size than before.
    #[error("{name} has {actual} elements, expected {expected}")]
    Shape {
        /// Parameter name.
        name: String,
        /// Elements expected.
        expected: usize,
        /// Elements found.
        actual: usize,
    },
    /// A checkpoint belongs to another model, data set or configuration.
    #[error(
        "the checkpoint of step {step} was written by another run ({what} differs): use its settings, or another folder"
    )]
    ForeignCheckpoint {
        /// Its step.
        step: u64,
        /// What differs.
        what: &'static str,
    },
    /// A checkpoint's bytes are not what its manifest says.
    #[error("checkpoint {path} is damaged ({what})")]
    DamagedCheckpoint {
        /// Object path.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// A file written by the export does not give the trained model's logits.
    #[error(
        "{artifact} differs from the trained model by {difference:e}, more than {tolerance:e}: do not use it, report this as a bug"
    )]
    Verification {
        /// `lora_model` or `fused`.
        artifact: &'static str,
        /// Relative distance of the logits.
        difference: f64,
        /// The distance allowed.
        tolerance: f64,
    },
    /// A merged model is not what base and adapter give.
    #[error(
        "{name} of the merged model is not what base and adapter give: do not use it, report this as a bug"
    )]
    WrongMerge {
        /// The tensor, or `config.json`.
        name: String,
    },
    /// The run was asked to stop; a checkpoint of this step was written when
    /// a place for checkpoints was given.
    #[error("cancelled after step {step}")]
    Cancelled {
        /// Optimizer steps done; 0 where it was no run, such as an evaluation or export by itself.
        step: u64,
    },
    /// The run would not fit into memory.
    #[error(
        "training takes about {} MiB and {} MiB are free: {fits}, or set ignore_memory_estimate",
        estimate_bytes >> 20, free_bytes >> 20
    )]
    OutOfMemory {
        /// What the run takes.
        estimate_bytes: u64,
        /// What the system, or the GPU, has left.
        free_bytes: u64,
        /// What would fit.
        fits: LargestMicroBatch,
    },
    /// A GPU's memory ran out in the middle of a run; the last checkpoint is intact.
    #[error(
        "out of GPU memory at {} MiB more: training takes about {} MiB and this process can have {} MiB: {fits}",
        asked_bytes >> 20, estimate_bytes >> 20, available_bytes >> 20
    )]
    GpuOutOfMemory {
        /// What the failed allocation asked for.
        asked_bytes: usize,
        /// What the run takes.
        estimate_bytes: u64,
        /// What this process can have on the GPU, all in all.
        available_bytes: u64,
        /// What would fit.
        fits: LargestMicroBatch,
    },
    /// A file that metrics are written to cannot be used.
    #[error("cannot keep metrics in {}: check its folder and disk", path.display())]
    MetricsFile {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A log of metrics belongs to another run or server.
    #[error("the metrics in {} belong to another {what}: give another file", path.display())]
    ForeignMetrics {
        /// The log.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// The data could not be read.
    #[error("could not read the training data")]
    Source(#[source] BoxError),
    /// The worker thread of a run ended without an answer.
    #[error("the training thread stopped")]
    Thread(#[source] BoxError),
    /// The model refused, with its own reason.
    #[error(transparent)]
    Model(#[from] updraft_model::Error),
    /// The store refused, with its own reason.
    #[error(transparent)]
    Store(#[from] updraft_store::Error),
}

impl Error {
    /// A failure of a data source, boxed.
    pub fn source(error: impl Into<BoxError>) -> Self {
        Self::Source(error.into())
    }

    /// Whether the same call may succeed later without a change.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Store(error) => error.is_retryable(),
            Self::Cancelled { .. } | Self::Worker { .. } | Self::Rendezvous { .. } => true,
            _ => false,
        }
    }
}
