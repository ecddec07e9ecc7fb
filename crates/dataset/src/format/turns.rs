//! Plain turns in Arrow columns, straight to JSON text.
//!
//! Most rows of most datasets are one list of turns, each a role and a text. For those the chat
//! formats need no value for every word: what [`Turns::write`] writes is what converting the row
//! and serializing its messages would, and a row it is not sure of it leaves to that.

use arrow_array::cast::AsArray as _;
use arrow_array::{
    Array, ArrayRef, LargeStringArray, RecordBatch, StringArray, StringViewArray, StructArray,
};
use arrow_schema::DataType;

use super::columns::SIDE_COLUMNS;
use super::message::{CONTENT_KEYS, ROLE_KEYS, plain_role};
use super::sharegpt::CONVERSATION;

/// The column of a batch that holds lists of turns.
pub(crate) struct Turns<'a> {
    lists: Lists<'a>,
    items: &'a StructArray,
    roles: Texts<'a>,
    contents: Texts<'a>,
    /// Fields of a turn that say more than its role and text where they are not null.
    more: Vec<&'a ArrayRef>,
    /// Columns that say more about a row where they are not null.
    beside: Vec<&'a ArrayRef>,
}

enum Lists<'a> {
    Small(&'a arrow_array::ListArray),
    Large(&'a arrow_array::LargeListArray),
}

enum Texts<'a> {
    Small(&'a StringArray),
    Large(&'a LargeStringArray),
    View(&'a StringViewArray),
}

impl<'a> Turns<'a> {
    /// The turns of a batch, if one of its columns, and only one, can hold them.
    pub(crate) fn find(batch: &'a RecordBatch) -> Option<Self> {
        let named = |names: &'static [&str]| {
            let columns = batch.schema_ref().fields().iter().zip(batch.columns());
            columns
                .filter(|(field, _)| {
                    names
                        .iter()
                        .any(|name| field.name().eq_ignore_ascii_case(name))
                })
                .map(|(_, column)| column)
        };
        let column = only(named(&CONVERSATION))?;
        let (lists, items) = match column.data_type() {
            DataType::List(_) => {
                let lists = column.as_list::<i32>();
                (Lists::Small(lists), lists.values())
            }
            DataType::LargeList(_) => {
                let lists = column.as_list::<i64>();
                (Lists::Large(lists), lists.values())
            }
            _ => return None,
        };
        let items = items.as_struct_opt()?;
        let field = |names: &'static [&str]| {
            let fields = items.column_names().into_iter().zip(items.columns());
            fields
                .filter(move |(name, _)| names.contains(name))
                .map(|(_, column)| column)
        };
        let (role, content) = (only(field(&ROLE_KEYS))?, only(field(&CONTENT_KEYS))?);
        let is_more = |column: &&ArrayRef| {
            !std::ptr::eq(*column, role)
                && !std::ptr::eq(*column, content)
                && *column.data_type() != DataType::Null
        };
        Some(Self {
            lists,
            items,
            roles: Texts::of(role)?,
            contents: Texts::of(content)?,
            more: items.columns().iter().filter(is_more).collect(),
            beside: named(&SIDE_COLUMNS)
                .filter(|column| *column.data_type() != DataType::Null)
                .collect(),
        })
    }

    /// Appends a row's messages as JSON; whether they are plain turns. If not, what was appended
    /// is for nothing.
    pub(crate) fn write(&self, row: usize, json: &mut Vec<u8>) -> bool {
        if self.beside.iter().any(|column| column.is_valid(row)) {
            return false;
        }
        let Some(items) = self.lists.items(row).filter(|items| !items.is_empty()) else {
            return false;
        };
        json.push(b'[');
        for (turn, item) in items.enumerate() {
            if turn > 0 {
                json.push(b',');
            }
            if self.write_turn(item, json).is_none() {
                return false;
            }
        }
        json.push(b']');
        true
    }

    fn write_turn(&self, item: usize, json: &mut Vec<u8>) -> Option<()> {
        if self.items.is_null(item) || self.more.iter().any(|column| column.is_valid(item)) {
            return None;
        }
        let role = plain_role(self.roles.get(item)?)?;
        let content = self.contents.get(item)?;
        json.extend_from_slice(b"{\"role\":\"");
        json.extend_from_slice(role.as_str().as_bytes());
        json.extend_from_slice(b"\",\"content\":");
        serde_json::to_writer(&mut *json, content).ok()?;
        json.push(b'}');
        Some(())
    }
}

/// The one item there is.
fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let first = items.next()?;
    items.next().is_none().then_some(first)
}

impl Lists<'_> {
    /// Where a row's items stand; `None` for a null row.
    fn items(&self, row: usize) -> Option<std::ops::Range<usize>> {
        match self {
            Self::Small(lists) => lists.is_valid(row).then(|| {
                let offsets = lists.value_offsets();
                offsets[row] as usize..offsets[row + 1] as usize
            }),
            Self::Large(lists) => lists.is_valid(row).then(|| {
                let offsets = lists.value_offsets();
                offsets[row] as usize..offsets[row + 1] as usize
            }),
        }
    }
}

impl<'a> Texts<'a> {
    fn of(column: &'a ArrayRef) -> Option<Self> {
        match column.data_type() {
            DataType::Utf8 => Some(Self::Small(column.as_string())),
            DataType::LargeUtf8 => Some(Self::Large(column.as_string())),
            DataType::Utf8View => Some(Self::View(column.as_string_view())),
            _ => None,
        }
    }

    fn get(&self, item: usize) -> Option<&'a str> {
        match self {
            Self::Small(texts) => texts.is_valid(item).then(|| texts.value(item)),
            Self::Large(texts) => texts.is_valid(item).then(|| texts.value(item)),
            Self::View(texts) => texts.is_valid(item).then(|| texts.value(item)),
        }
    }
}
