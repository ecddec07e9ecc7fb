//! What a row becomes, whatever dialect it was written in.

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

/// A record as the cells of its columns.
pub(crate) type Cells = [Option<String>; COLUMNS.len()];

impl Record {
    /// The cells, with the source's other columns if they are to be kept.
    pub(crate) fn into_cells(
        self,
        columns: Option<&Map<String, Value>>,
    ) -> Result<Cells, serde_json::Error> {
        let (prompt, chosen, rejected, text) = match self {
            Self::Conversation(conversation) => (Some(conversation), None, None, None),
            Self::Preference(Preference {
                prompt,
                chosen,
                rejected,
            }) => (Some(prompt), chosen, rejected, None),
            Self::Text(text) => (None, None, None, Some(text)),
        };
        let prompt = prompt.as_ref();
        let variables = prompt
            .map(|prompt| &prompt.variables)
            .filter(|variables| !variables.is_empty());
        Ok([
            json(prompt.map(|prompt| &prompt.messages))?,
            json(prompt.and_then(|prompt| prompt.tools.as_ref()))?,
            json(prompt.and_then(|prompt| prompt.documents.as_ref()))?,
            json(variables)?,
            json(chosen.as_ref())?,
            json(rejected.as_ref())?,
            text,
            json(columns)?,
        ])
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

fn json<T: Serialize>(value: Option<&T>) -> Result<Option<String>, serde_json::Error> {
    value.map(serde_json::to_string).transpose()
}

fn parse<T: for<'de> Deserialize<'de>>(cell: Option<&str>) -> Result<Option<T>, serde_json::Error> {
    cell.map(serde_json::from_str).transpose()
}
