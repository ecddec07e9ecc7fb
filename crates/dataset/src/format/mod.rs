//! The dialects of training data: the [`Format`] trait and the formats built in.

mod alpaca;
mod columns;
mod message;
mod openai;
mod pairs;
mod preference;
mod sharegpt;
mod text;

use std::fmt::Debug;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::Record;

pub use alpaca::Alpaca;
pub use openai::OpenAi;
pub use pairs::{PromptCompletion, QuestionAnswer};
pub use preference::PreferencePairs;
pub use sharegpt::ShareGpt;
pub use text::Text;

/// A dialect: how rows of one shape become [`Record`]s.
///
/// # Contract
/// - [`name`](Self::name) enters the key of the import stage: change it when the output of
///   [`convert`](Self::convert) changes.
/// - [`detect`](Self::detect) looks at column names and value shapes only, and claims no row of
///   another shape.
/// - `convert` is a pure function; it takes the columns it uses out of the row and leaves the
///   others. It never drops content: what it does not understand is an error.
/// - The reason of an error names what is wrong, for a person who will look at the row.
pub trait Format: Debug + Send + Sync {
    /// The name people choose it by.
    fn name(&self) -> &str;

    /// Whether a row has this format's shape.
    fn detect(&self, row: &Map<String, Value>) -> bool;

    /// Turns a row into a record.
    ///
    /// # Errors
    /// The reason for which the row is rejected.
    fn convert(&self, row: &mut Map<String, Value>) -> Result<Record, String>;
}

/// The formats an import chooses from, the more specific before the more general.
#[derive(Debug, Clone)]
pub struct Formats(Vec<Arc<dyn Format>>);

impl Default for Formats {
    fn default() -> Self {
        Self::built_in("\n")
    }
}

impl Formats {
    /// The built-in formats; Alpaca's `input` follows its `instruction` after `input_separator`.
    pub fn built_in(input_separator: &str) -> Self {
        Self(vec![
            Arc::new(PreferencePairs),
            Arc::new(ShareGpt),
            Arc::new(OpenAi),
            Arc::new(Alpaca::new(input_separator)),
            Arc::new(QuestionAnswer),
            Arc::new(PromptCompletion),
            Arc::new(Text),
        ])
    }

    /// Adds a format that is asked before all others and replaces one of the same name.
    #[must_use]
    pub fn with(mut self, format: Arc<dyn Format>) -> Self {
        self.0.retain(|known| known.name() != format.name());
        self.0.insert(0, format);
        self
    }

    /// The format of this name.
    pub fn get(&self, name: &str) -> Option<&Arc<dyn Format>> {
        self.0.iter().find(|format| format.name() == name)
    }

    /// The names, in the order in which they are asked.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|format| format.name())
    }

    /// The format that claims the most of these rows, the first one of equals.
    pub fn detect(&self, rows: &[&Map<String, Value>]) -> Option<&Arc<dyn Format>> {
        let claims =
            |format: &Arc<dyn Format>| rows.iter().filter(|row| format.detect(row)).count();
        let claimed = self.0.iter().map(|format| (claims(format), format));
        let most = claimed.rev().max_by_key(|(rows, _)| *rows)?;
        (most.0 > 0).then_some(most.1)
    }
}
