//! The reference data, read from where `UPDRAFT_FIXTURES` says.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray as _;
use arrow_array::{Array as _, ArrayRef, StructArray};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use updraft_chat::{ChatFiles, Conversation, Message, Role, TemplateFiles};

/// The folder of reference data; says on standard error why a test skips
/// without it.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn root(test: &str) -> Option<PathBuf> {
    let root = std::env::var_os("UPDRAFT_FIXTURES").map(PathBuf::from);
    if root.is_none() {
        eprintln!("{test}: skipped, UPDRAFT_FIXTURES names no folder of reference data");
    }
    root
}

/// The files of a folder whose names end so, sorted.
pub(crate) fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    files.retain(|path| name(path).ends_with(ending));
    files.sort();
    files
}

pub(crate) fn name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

/// A model folder's chat files.
pub(crate) struct Model {
    tokenizer_json: Vec<u8>,
    tokenizer_config: Option<Vec<u8>>,
}

impl Model {
    pub(crate) fn read(folder: &Path) -> Model {
        let tokenizer_json = folder.join("tokenizer.json");
        Model {
            tokenizer_json: std::fs::read(&tokenizer_json)
                .unwrap_or_else(|error| panic!("{}: {error}", tokenizer_json.display())),
            tokenizer_config: std::fs::read(folder.join("tokenizer_config.json")).ok(),
        }
    }

    /// The files, with another template if one is given.
    pub(crate) fn files<'a>(&'a self, template: Option<&'a str>) -> ChatFiles<'a> {
        ChatFiles {
            tokenizer_json: &self.tokenizer_json,
            template: TemplateFiles {
                chat_template_jinja: template.map(str::as_bytes),
                tokenizer_config: self.tokenizer_config.as_deref(),
                ..TemplateFiles::default()
            },
            ..ChatFiles::default()
        }
    }

    pub(crate) fn tokenizer_json(&self) -> &[u8] {
        &self.tokenizer_json
    }
}

/// One column of a Parquet file, batch by batch.
pub(crate) fn column(path: &Path, column: &str) -> Vec<ArrayRef> {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    ParquetRecordBatchReaderBuilder::try_new(file)
        .and_then(ParquetRecordBatchReaderBuilder::build)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .map(|batch| {
            let batch = batch.expect("a readable batch");
            ArrayRef::clone(batch.column_by_name(column).expect("the column"))
        })
        .collect()
}

/// A column of lists of integers.
pub(crate) fn integers(path: &Path, name: &str) -> Vec<Vec<u32>> {
    use arrow_array::types::UInt32Type;

    let as_u32 = |array: &ArrayRef| -> Vec<u32> {
        macro_rules! from {
            ($kind:ty) => {
                if let Some(array) = array.as_primitive_opt::<$kind>() {
                    return array.values().iter().map(|&value| value as u32).collect();
                }
            };
        }
        from!(UInt32Type);
        from!(arrow_array::types::Int32Type);
        from!(arrow_array::types::Int64Type);
        from!(arrow_array::types::UInt8Type);
        from!(arrow_array::types::Int8Type);
        panic!("not integers: {:?}", array.data_type());
    };
    let lists = |array: &ArrayRef| -> Vec<Vec<u32>> {
        if let Some(list) = array.as_list_opt::<i64>() {
            return list
                .iter()
                .map(|row| as_u32(&row.expect("a row")))
                .collect();
        }
        let list = array.as_list::<i32>();
        list.iter()
            .map(|row| as_u32(&row.expect("a row")))
            .collect()
    };
    column(path, name).iter().flat_map(lists).collect()
}

/// ShareGPT conversations: a list of `from` and `value`.
pub(crate) fn conversations(path: &Path) -> Vec<Conversation> {
    let batches = column(path, "conversations");
    batches
        .iter()
        .flat_map(|batch| batch.as_list::<i32>().iter().collect::<Vec<_>>())
        .map(|turns| {
            let turns = turns.expect("a row");
            let turns: &StructArray = turns.as_struct();
            let strings = |name: &str| -> Vec<String> {
                let column = turns.column_by_name(name).expect("the field");
                match column.as_string_opt::<i32>() {
                    Some(strings) => strings
                        .iter()
                        .map(|s| s.unwrap_or_default().to_owned())
                        .collect(),
                    None => {
                        let strings = column.as_string::<i64>();
                        strings
                            .iter()
                            .map(|s| s.unwrap_or_default().to_owned())
                            .collect()
                    }
                }
            };
            let messages: Vec<Message> = strings("from")
                .into_iter()
                .zip(strings("value"))
                .map(|(from, value)| Message::new(role(&from), value))
                .collect();
            Conversation::new(messages)
        })
        .collect()
}

fn role(from: &str) -> Role {
    match from {
        "human" => Role::User,
        "gpt" => Role::Assistant,
        other => Role::from(other),
    }
}
