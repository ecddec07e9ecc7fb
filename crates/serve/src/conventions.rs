//! What a model's files say about using it, besides weights, template and tokenizer.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::sampling::SamplingDefaults;

/// The sampling settings that `generation_config.json` recommends.
pub(crate) fn sampling(generation_config: Option<&[u8]>) -> serde_json::Result<SamplingDefaults> {
    match generation_config {
        Some(json) => serde_json::from_slice(json),
        None => Ok(SamplingDefaults::default()),
    }
}

/// The ids that the tokenizer puts before a text, as its post-processor says.
pub(crate) fn text_prefix(tokenizer_json: Option<&[u8]>) -> serde_json::Result<Vec<u32>> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        post_processor: Option<PostProcessor>,
    }
    let Some(json) = tokenizer_json else {
        return Ok(Vec::new());
    };
    let file: File = serde_json::from_slice(json)?;
    Ok(file
        .post_processor
        .map_or_else(Vec::new, |post| post.prefix()))
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PostProcessor {
    TemplateProcessing {
        single: Vec<Piece>,
        special_tokens: BTreeMap<String, SpecialToken>,
    },
    Sequence {
        processors: Vec<PostProcessor>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
enum Piece {
    SpecialToken { id: String },
    Sequence {},
}

#[derive(Deserialize)]
struct SpecialToken {
    ids: Vec<u32>,
}

impl PostProcessor {
    fn prefix(&self) -> Vec<u32> {
        match self {
            Self::TemplateProcessing {
                single,
                special_tokens,
            } => {
                let before = single.iter().map_while(|piece| match piece {
                    Piece::SpecialToken { id } => special_tokens.get(id),
                    Piece::Sequence {} => None,
                });
                before.flat_map(|token| token.ids.clone()).collect()
            }
            Self::Sequence { processors } => processors.iter().flat_map(Self::prefix).collect(),
            Self::Other => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_before_the_text_is_its_prefix() {
        let bos = r#"{"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]},
                               "</s>": {"id": "</s>", "ids": [8], "tokens": ["</s>"]}}}"#;
        let byte_level =
            r#"{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false}"#;
        let both = format!(r#"{{"type": "Sequence", "processors": [{byte_level}, {bos}]}}"#);
        for (json, expected) in [(bos, vec![7]), (byte_level, vec![]), (&both, vec![7])] {
            let post: PostProcessor = serde_json::from_str(json).expect("as tokenizers writes it");
            assert_eq!(post.prefix(), expected, "{json}");
        }
    }
}
