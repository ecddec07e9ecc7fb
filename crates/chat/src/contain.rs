//! Panics of the engines underneath, as errors.
//!
//! Templates and `tokenizer.json` come from strangers. Where one makes an
//! engine panic, the caller of this crate gets an error, not the panic.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// An engine panicked.
#[derive(Debug, thiserror::Error)]
#[error("the engine failed within itself: {message}")]
pub(crate) struct Panicked {
    message: String,
}

/// Runs an engine. What it works on must not be used again after a panic.
pub(crate) fn contain<T>(engine: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(engine)).map_err(|payload| Panicked {
        message: message(&*payload).to_owned(),
    })
}

fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::contain;

    #[test]
    fn a_panic_is_an_error_with_its_message() {
        assert_eq!(contain(|| 7).ok(), Some(7));
        let zero = std::hint::black_box(0);
        let error = contain(|| 7 % zero).expect_err("a panic");
        assert!(error.to_string().contains("divisor of zero"), "{error}");
    }
}
