//! A value that must not be printed.

use std::fmt;

/// A value whose `Debug` prints stars, so that it cannot reach a log by accident.
///
/// ```
/// let token = updraft_provision::Secret::new("hf_abc".to_owned());
/// assert_eq!(format!("{token:?}"), "***");
/// assert_eq!(token.expose(), "hf_abc");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<T>(T);

impl<T> Secret<T> {
    /// Hides `value`.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The value, for the one place that must send it.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
