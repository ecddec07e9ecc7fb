//! The dialects of training data: the [`Format`] trait and the formats built in.

mod alpaca;
mod columns;
mod message;
mod openai;
mod pairs;
mod preference;
mod sharegpt;
mod text;
mod train;
mod turns;

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
pub(crate) use turns::Turns;

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
pub struct Formats(Vec<Known>);

#[derive(Debug, Clone)]
struct Known {
    format: Arc<dyn Format>,
    /// Whether it is one of ours that take a list of turns as [`Turns`] does.
    plain_turns: bool,
}

impl Known {
    fn new(format: impl Format + 'static) -> Self {
        Self {
            format: Arc::new(format),
            plain_turns: false,
        }
    }

    fn of_turns(format: impl Format + 'static) -> Self {
        Self {
            plain_turns: true,
            ..Self::new(format)
        }
    }
}

impl Default for Formats {
    fn default() -> Self {
        Self::built_in("\n")
    }
}

impl Formats {
    /// The built-in formats; Alpaca's `input` follows its `instruction` after `input_separator`.
    pub fn built_in(input_separator: &str) -> Self {
        Self(vec![
            Known::new(PreferencePairs),
            Known::of_turns(ShareGpt),
            Known::of_turns(OpenAi),
            Known::new(Alpaca::new(input_separator)),
            Known::new(QuestionAnswer),
            Known::new(PromptCompletion),
            Known::new(Text),
        ])
    }

    /// Adds a format that is asked before all others and replaces one of the same name.
    #[must_use]
    pub fn with(mut self, format: Arc<dyn Format>) -> Self {
        self.0.retain(|known| known.format.name() != format.name());
        let plain_turns = false;
        self.0.insert(
            0,
            Known {
                format,
                plain_turns,
            },
        );
        self
    }

    /// The format of this name.
    pub fn get(&self, name: &str) -> Option<&Arc<dyn Format>> {
        self.known(name).map(|known| &known.format)
    }

    /// Whether the format of this name converts plain turns as [`Turns`] does.
    pub(crate) fn takes_plain_turns(&self, name: &str) -> bool {
        self.known(name).is_some_and(|known| known.plain_turns)
    }

    fn known(&self, name: &str) -> Option<&Known> {
        self.0.iter().find(|known| known.format.name() == name)
    }

    /// The names, in the order in which they are asked.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|known| known.format.name())
    }

    /// The format that claims the most of these rows, the first one of equals.
    pub fn detect(&self, rows: &[&Map<String, Value>]) -> Option<&Arc<dyn Format>> {
        let claims =
            |format: &Arc<dyn Format>| rows.iter().filter(|row| format.detect(row)).count();
        let formats = self.0.iter().map(|known| &known.format);
        let claimed = formats.map(|format| (claims(format), format));
        let most = claimed.rev().max_by_key(|(rows, _)| *rows)?;
        (most.0 > 0).then_some(most.1)
    }
}
