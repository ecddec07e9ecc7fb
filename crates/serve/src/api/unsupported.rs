//! Fields that would change the answer if we knew how. They are refused, because an answer that
//! silently ignores them would be wrong.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::json::JsonBody;
use crate::error::{Error, Result};

/// Defines a struct of fields that must be absent or null, and its check.
macro_rules! refused {
    ($($field:ident),* $(,)?) => {
        #[derive(Debug, Deserialize)]
        struct Refused { $(#[serde(default)] $field: Option<IgnoredAny>),* }

        impl Refused {
            fn first(&self) -> Option<&'static str> {
                $(if self.$field.is_some() { return Some(stringify!($field)); })*
                None
            }
        }
    };
}

refused!(
    audio,
    chat_template,
    functions,
    grammar,
    guided_choice,
    guided_grammar,
    guided_json,
    guided_regex,
    logits_processors,
    prompt_embeds,
    suffix,
    use_beam_search,
    web_search_options,
);

/// Fields of which some values are harmless.
#[derive(Debug, Deserialize)]
struct Conditional {
    #[serde(default)]
    tools: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    tool_choice: Option<serde_json::Value>,
}

fn unsupported(field: &str) -> Result<()> {
    let message = format!("`{field}` is not supported by this server; leave it out");
    Err(Error::invalid(field, message))
}

/// Refuses what we cannot honour in any API.
pub(crate) fn refuse_fields(body: &JsonBody) -> Result<()> {
    match body.read::<Refused>()?.first() {
        Some(field) => unsupported(field),
        None => Ok(()),
    }
}

/// Refuses what we cannot honour, tools among it as completions have them.
pub(crate) fn refuse(body: &JsonBody) -> Result<()> {
    refuse_fields(body)?;
    let fields: Conditional = body.read()?;
    let choice = fields
        .tool_choice
        .as_ref()
        .filter(|choice| !choice.is_null());
    let is_none = choice.is_some_and(|choice| choice == "none");
    match &fields.tools {
        Some(tools) if tools.is_empty() => {
            let message = "`tools` is empty; leave it out or name a tool";
            return Err(Error::invalid("tools", message));
        }
        Some(_) if !is_none => return unsupported("tools"),
        None if choice.is_some() && !is_none => {
            let message = "`tool_choice` needs `tools`";
            return Err(Error::invalid("tool_choice", message));
        }
        _ => {}
    }
    Ok(())
}
