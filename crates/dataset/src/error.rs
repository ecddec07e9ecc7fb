//! What can go wrong between a source and a reader, cut by what the caller can do next.

/// A cause from below, kept for the chain.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What this crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a dataset could not be imported, tokenized or read.
///
/// A bad *row* is never an error: it is a reject, counted and listed in the manifest. Only
/// [`Error::TooManyRejects`] turns rejects into an error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source names nothing.
    #[error(
        "{spec} does not exist: give a file, a folder, an object-store URL or a Hub dataset as owner/name"
    )]
    NotFound {
        /// What was asked for.
        spec: String,
    },
    /// The source exists but holds no file we read.
    #[error("{spec} holds no data file: expected {expected}")]
    NoDataFiles {
        /// What was asked for.
        spec: String,
        /// The endings or the split that were looked for.
        expected: String,
    },
    /// A file's name says nothing about its format.
    #[error(
        "{file} has an unknown format: rename it to one of .jsonl .ndjson .json .parquet .arrow .csv .tsv .txt, each but Parquet also as .gz or .zst"
    )]
    UnknownFile {
        /// The file.
        file: String,
    },
    /// There was not one row.
    #[error("{what} has no rows: {hint}")]
    Empty {
        /// The source or the stage.
        what: String,
        /// What to look at next.
        hint: String,
    },
    /// No format claims the rows, or the one asked for does not exist.
    #[error(
        "no format fits {what} (columns: {columns}): name one of {known}, or pass your own Format"
    )]
    UnknownFormat {
        /// The format asked for, or where the rows came from.
        what: String,
        /// The columns of the first row.
        columns: String,
        /// The names of the formats at hand.
        known: String,
    },
    /// More rows were rejected than the options allow.
    #[error("{rejected} of {rows} rows rejected, above the limit of {percent}%; the first is {first}: mend the data or raise max_reject_rate", percent = limit * 100.0)]
    TooManyRejects {
        /// Rejected rows so far.
        rejected: u64,
        /// Rows seen so far.
        rows: u64,
        /// The limit, as a share of the rows.
        limit: f64,
        /// File, position and reason of the first rejected row.
        first: String,
    },
    /// A setting makes no sense.
    #[error("{option} {problem}")]
    InvalidOption {
        /// The setting.
        option: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A source could not be read; trying again may help.
    #[error("cannot read {file}")]
    Read {
        /// The file or object.
        file: String,
        /// Why.
        source: BoxError,
    },
    /// Bytes are not what they claim to be; trying again cannot help.
    #[error("{file} is damaged: {problem}")]
    Corrupt {
        /// The file or object.
        file: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The program itself failed: a task panicked or a value of ours could not be written.
    #[error("a background task failed: run again to continue, and report this if it stays")]
    Internal(#[source] BoxError),
    /// The object store or the Hub refused or failed, or the caller cancelled.
    #[error(transparent)]
    Store(#[from] updraft_store::Error),
}

impl Error {
    pub(crate) fn read(file: impl Into<String>, source: impl Into<BoxError>) -> Self {
        Self::Read {
            file: file.into(),
            source: source.into(),
        }
    }

    pub(crate) fn internal(source: impl Into<BoxError>) -> Self {
        Self::Internal(source.into())
    }

    pub(crate) fn corrupt(file: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Corrupt {
            file: file.into(),
            problem: problem.into(),
        }
    }
}
