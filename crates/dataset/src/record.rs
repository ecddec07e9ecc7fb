//! What a row becomes, whatever dialect it was written in.

use std::ops::Range;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use updraft_chat::{Conversation, Message};

/// One standardized row.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A conversation to learn from.
    Conversation(Conversation),
    /// A prompt with a better and a worse answer, or only one of them.
    Preference(Preference),
    /// Text without roles, for language modelling.
    Text(String),
}

/// Answers of which one is preferred.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Preference {
    /// What both answers reply to, with its tools and documents.
    pub prompt: Conversation,
    /// The messages of the better answer.
    pub chosen: Option<Vec<Message>>,
    /// The messages of the worse answer.
    pub rejected: Option<Vec<Message>>,
}

impl From<Conversation> for Record {
    fn from(conversation: Conversation) -> Self {
        Self::Conversation(conversation)
    }
}

/// The columns of a standardized shard, in order. Each holds JSON text, except `text` itself.
pub(crate) const COLUMNS: [&str; 8] = [
    "messages",
    "tools",
    "documents",
    "variables",
    "chosen",
    "rejected",
    "text",
    "columns",
];

/// The schema of a standardized shard.
pub(crate) fn schema() -> SchemaRef {
    Arc::new(Schema::new(
        COLUMNS
            .map(|name| Field::new(name, DataType::Utf8, true))
            .to_vec(),
    ))
}

/// Where `messages` and `text` stand among them.
const MESSAGES: usize = 0;
const TEXT: usize = 6;

/// A row's cells, one after the other in a buffer that rows take turns in.
#[derive(Debug, Default)]
pub(crate) struct Cells {
    buffer: Vec<u8>,
    /// Each cell in the buffer.
    cells: [Option<Range<usize>>; COLUMNS.len()],
}

impl Cells {
    /// The cells in the columns' order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Option<&str>> {
        let text = |range: Range<usize>| {
            std::str::from_utf8(&self.buffer[range]).expect("JSON and texts are UTF-8")
        };
        self.cells.iter().map(move |cell| cell.clone().map(text))
    }

    /// Bytes of all cells.
    pub(crate) fn bytes(&self) -> u64 {
        self.cells
            .iter()
            .flatten()
            .map(|cell| cell.len() as u64)
            .sum()
    }

    /// Makes the row one of messages that `write` appends as JSON, unless it says no.
    pub(crate) fn write_messages(&mut self, write: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        self.clear();
        let written = write(&mut self.buffer);
        if written {
            self.cells[MESSAGES] = Some(0..self.buffer.len());
        }
        written
    }

    fn clear(&mut self) {
        self.buffer.clear();
        // One long row must not cost its memory for ever.
        self.buffer.shrink_to(KEPT_BYTES);
        self.cells = Default::default();
    }

    fn put(&mut self, column: usize, value: Option<&impl Serialize>) -> serde_json::Result<()> {
        if let Some(value) = value {
            let start = self.buffer.len();
            serde_json::to_writer(&mut self.buffer, value)?;
            self.cells[column] = Some(start..self.buffer.len());
        }
        Ok(())
    }
}

/// What the buffer of cells may keep between rows.
const KEPT_BYTES: usize = 1 << 20;

impl Record {
    /// Makes `cells` this record's, with the source's other columns if they are to be kept.
    pub(crate) fn write(
        &self,
        columns: Option<&Map<String, Value>>,
        cells: &mut Cells,
    ) -> serde_json::Result<()> {
        cells.clear();
        let (prompt, chosen, rejected) = match self {
            Self::Conversation(conversation) => (Some(conversation), None, None),
            Self::Preference(preference) => (
                Some(&preference.prompt),
                preference.chosen.as_ref(),
                preference.rejected.as_ref(),
            ),
            Self::Text(text) => {
                cells.buffer.extend_from_slice(text.as_bytes());
                cells.cells[TEXT] = Some(0..text.len());
                (None, None, None)
            }
        };
        let variables = prompt
            .map(|prompt| &prompt.variables)
            .filter(|variables| !variables.is_empty());
        cells.put(MESSAGES, prompt.map(|prompt| &prompt.messages))?;
        cells.put(1, prompt.and_then(|prompt| prompt.tools.as_ref()))?;
        cells.put(2, prompt.and_then(|prompt| prompt.documents.as_ref()))?;
        cells.put(3, variables)?;
        cells.put(4, chosen)?;
        cells.put(5, rejected)?;
        cells.put(7, columns)
    }

    /// The record in a row of cells.
    pub(crate) fn from_cells(
        cells: [Option<&str>; COLUMNS.len()],
    ) -> Result<Self, serde_json::Error> {
        let [
            messages,
            tools,
            documents,
            variables,
            chosen,
            rejected,
            text,
            _,
        ] = cells;
        if let Some(text) = text {
            return Ok(Self::Text(text.to_owned()));
        }
        let prompt = Conversation {
            messages: parse(messages)?.unwrap_or_default(),
            tools: parse(tools)?,
            documents: parse(documents)?,
            variables: parse(variables)?.unwrap_or_default(),
        };
        if chosen.is_none() && rejected.is_none() {
            return Ok(Self::Conversation(prompt));
        }
        Ok(Self::Preference(Preference {
            prompt,
            chosen: parse(chosen)?,
            rejected: parse(rejected)?,
        }))
    }
}

fn parse<T: for<'de> Deserialize<'de>>(cell: Option<&str>) -> Result<Option<T>, serde_json::Error> {
    cell.map(serde_json::from_str).transpose()
}
