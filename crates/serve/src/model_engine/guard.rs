//! Work that may fail or panic without taking the thread with it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{BoxError, one_line};

/// Why guarded work did not end well.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: String,
    /// Whether it was a panic: what the work was changing may be broken.
    pub(super) panicked: bool,
}

/// Does the work, and makes a failure of a panic. The caller repairs what the work changed.
pub(super) fn guard<T>(work: impl FnOnce() -> Result<T, BoxError>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Failure {
            cause: one_line(error.as_ref()),
            panicked: false,
        }),
        Err(panic) => Err(Failure {
            cause: format!("panicked: {}", message(panic.as_ref())),
            panicked: true,
        }),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}
