//! One standardized row to examples: rendered, encoded, fitted into the sequence length.

use serde::{Deserialize, Serialize};
use updraft_chat::{Chat, Conversation, Example, Rejection, TokenizerExt as _};

use super::PretokenizeOptions;
use super::work::Work;
use crate::Record;
use crate::record::{COLUMNS, Preference};

/// What happens to an example longer than `max_seq_len`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overflow {
    /// Its row is a reject.
    Reject,
    /// Its end is cut off; a row of which nothing trained is left is a reject.
    #[default]
    Truncate,
    /// It becomes several examples; those with nothing trained are left out.
    Split,
}

/// Makes examples of rows, the same on any thread.
#[derive(Debug)]
pub(super) struct Tokenize {
    chat: Chat,
    max_seq_len: Option<usize>,
    overflow: Overflow,
    /// What the stage has spent so far.
    pub(super) work: Work,
}

/// A row's examples.
#[derive(Debug)]
pub(super) struct Tokenized {
    pub(super) examples: Vec<Example>,
    pub(super) truncated: bool,
    pub(super) split: bool,
}

/// Why a row gives no examples.
#[derive(Debug)]
pub(super) enum Unfit {
    /// The row is a reject, for this reason.
    Row(String),
    /// The template asks for the date, and there is none: the fault of the options.
    NoDate,
}

impl From<String> for Unfit {
    fn from(reason: String) -> Self {
        Self::Row(reason)
    }
}

impl From<Rejection> for Unfit {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::Failed(updraft_chat::Error::NoClock { .. }) => Self::NoDate,
            rejection => Self::Row(chain(&rejection)),
        }
    }
}

impl Tokenize {
    pub(super) fn new(chat: Chat, options: &PretokenizeOptions) -> Self {
        Self {
            chat,
            max_seq_len: options.max_seq_len.map(|len| len as usize),
            overflow: options.overflow,
            work: Work::default(),
        }
    }

    /// The examples of a row's cells, or why there are none.
    pub(super) fn row(&self, cells: [Option<&str>; COLUMNS.len()]) -> Result<Tokenized, Unfit> {
        let record = self.work.read.time(|| Record::from_cells(cells));
        let record = record.map_err(|err| format!("not a standardized row: {err}"))?;
        let example = self.work.tokenize.time(|| self.example(record))?;
        Ok(self.fit(example)?)
    }

    fn example(&self, record: Record) -> Result<Example, Unfit> {
        Ok(match record {
            Record::Conversation(conversation) => self.chat.example(&conversation)?,
            Record::Preference(preference) => self.chat.example(&preferred(preference)?)?,
            Record::Text(text) => self.text(&text)?,
        })
    }

    /// Every token of a text, and the end-of-sequence token after it.
    fn text(&self, text: &str) -> Result<Example, String> {
        let tokenizer = self.chat.tokenizer();
        let mut input_ids = tokenizer.encode(text).map_err(|err| chain(&err))?;
        let eos = self
            .chat
            .template()
            .special_tokens()
            .get("eos_token")
            .and_then(|token| tokenizer.token_to_id(token));
        input_ids.extend(eos);
        let end = u32::try_from(input_ids.len()).map_err(|_| "more than 2^32 tokens")?;
        Ok(Example {
            input_ids,
            loss_spans: std::iter::once(0..end).collect(),
        })
    }

    fn fit(&self, example: Example) -> Result<Tokenized, String> {
        let len = example.len();
        let Some(max) = self.max_seq_len.filter(|&max| len > max) else {
            return trained(vec![example], false, false);
        };
        match self.overflow {
            Overflow::Reject => Err(format!("{len} tokens, more than max_seq_len {max}")),
            Overflow::Truncate => trained(vec![example.window(0..max)], true, false),
            Overflow::Split => {
                let windows = (0..len)
                    .step_by(max)
                    .map(|start| example.window(start..len.min(start + max)));
                trained(
                    windows
                        .filter(|window| window.trained_tokens() > 0)
                        .collect(),
                    false,
                    true,
                )
            }
        }
    }
}

fn trained(examples: Vec<Example>, truncated: bool, split: bool) -> Result<Tokenized, String> {
    match examples.iter().map(Example::trained_tokens).sum() {
        0 if truncated => Err("nothing to train on within max_seq_len".to_owned()),
        0 => Err("nothing to train on".to_owned()),
        _ => Ok(Tokenized {
            examples,
            truncated,
            split,
        }),
    }
}

/// The conversation that imitates the better answer, and trains on that answer only.
fn preferred(preference: Preference) -> Result<Conversation, String> {
    let chosen = preference
        .chosen
        .ok_or("only a rejected answer: nothing to imitate")?;
    let mut conversation = preference.prompt;
    for message in &mut conversation.messages {
        message.weight = Some(0.0);
    }
    conversation.messages.extend(chosen);
    Ok(conversation)
}

/// An error and its causes in one line.
fn chain(err: &dyn std::error::Error) -> String {
    let mut line = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        line.push_str(": ");
        line.push_str(&err.to_string());
        cause = err.source();
    }
    line
}
