//! The `file_mounts:` section: what is put where on a node.

use super::fields::Fields;
use super::node::{Node, Value};
use crate::error::{Error, Result};

/// One entry of `file_mounts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMount {
    /// The path on the node; relative ones are under the home folder.
    pub target: String,
    /// Where the contents come from.
    pub source: MountSource,
}

/// Where the contents of a mount come from.
#[derive(Clone, PartialEq, Eq)]
pub enum MountSource {
    /// A file or folder of the client.
    Local(String),
    /// A bucket, or a folder of one, copied to the node by its URL.
    Bucket(String),
}

/// The schemes that name an object store, and plain downloads.
const SCHEMES: &[&str] = &[
    "s3", "gs", "gcs", "az", "r2", "cos", "oci", "nebius", "cw", "https", "http", "hf", "tigris",
];

impl MountSource {
    /// A URL or a path.
    pub(crate) fn of(text: &str) -> Self {
        let is_url = text
            .split_once("://")
            .is_some_and(|(scheme, _)| SCHEMES.contains(&scheme));
        if is_url {
            MountSource::Bucket(text.to_owned())
        } else {
            MountSource::Local(text.to_owned())
        }
    }
}

/// Reads the section. Mounting a bucket as a folder is refused; copying it is not.
pub(crate) fn read(node: &Node, refused: &mut Vec<Error>) -> Result<Vec<FileMount>> {
    let Value::Mapping(entries) = &node.value else {
        return Ok(Vec::new());
    };
    let mut mounts = Vec::new();
    for (key, value) in entries {
        let target = key.scalar_text().unwrap_or_default();
        let field = format!("file_mounts.{target}");
        if target.is_empty() {
            return Err(key.invalid("file_mounts", "needs a path on the node as the key"));
        }
        if let Value::String(source) = &value.value {
            mounts.push(FileMount {
                target,
                source: MountSource::of(source),
            });
            continue;
        }
        mounts.extend(storage(value, &field, target, refused)?);
    }
    Ok(mounts)
}

fn storage(
    node: &Node,
    field: &str,
    target: String,
    refused: &mut Vec<Error>,
) -> Result<Option<FileMount>> {
    let (line, column) = (node.line, node.column);
    let mut fields = Fields::of(field, node.clone());
    let named = fields.take("name").is_some();
    let source = fields.take("source");
    if !named
        && source.is_none()
        && fields
            .text("store")?
            .is_none_or(|store| !store.eq_ignore_ascii_case("volume"))
    {
        return Err(node.invalid(field, "needs a source such as s3://bucket, or a name"));
    }
    let mode = fields.text("mode")?.unwrap_or_else(|| "MOUNT".to_owned());
    let text = source.as_ref().and_then(Node::scalar_text);
    match text.as_deref().map(MountSource::of) {
        Some(source @ MountSource::Bucket(_)) if mode.eq_ignore_ascii_case("copy") => {
            Ok(Some(FileMount { target, source }))
        }
        _ => {
            refused.push(Error::Unsupported {
                field: format!("{field} (mode {mode}; use mode: COPY with a bucket's URL)"),
                line,
                column,
            });
            Ok(None)
        }
    }
}
