//! What the tests share: rows, a chat, a store, and one call per stage.

use serde_json::{Value, json};
use updraft_chat::{ByteTokenizer, Chat, ChatTemplate, SpecialTokens};
use updraft_dataset::{
    ImportOptions, MemorySource, PretokenizeOptions, Result, ShardPlan, Source, import, pretokenize,
};
use updraft_store::{CancelToken, FinishedStage, NoProgress, Store};

/// ChatML over single bytes.
pub(crate) fn chat() -> Chat {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let template =
        ChatTemplate::new(template, SpecialTokens::default()).expect("the template parses");
    let tokenizer = ByteTokenizer::new(["<|im_start|>", "<|im_end|>"]);
    Chat::new(template, std::sync::Arc::new(tokenizer))
}

/// Row `i`, different from every other.
pub(crate) fn row(i: usize) -> Value {
    json!({ "conversations": [{ "from": "human", "value": format!("question {i}") }, { "from": "gpt", "value": "word ".repeat(i % 7 + 1) + &i.to_string() }] })
}

pub(crate) fn source(rows: usize) -> MemorySource {
    MemorySource::new("rows", (0..rows).map(row)).expect("objects")
}

/// Several shards for a few rows.
pub(crate) fn options() -> ImportOptions {
    ImportOptions {
        shards: ShardPlan {
            max_rows: 10,
            ..ShardPlan::default()
        },
        ..ImportOptions::default()
    }
}

pub(crate) async fn import_into(
    store: &Store,
    source: &dyn Source,
    options: &ImportOptions,
) -> Result<FinishedStage> {
    import(
        store,
        "set",
        source,
        options,
        &NoProgress,
        &CancelToken::new(),
    )
    .await
}

pub(crate) async fn pretokenize_into(
    store: &Store,
    standardized: &FinishedStage,
    options: &PretokenizeOptions,
) -> Result<FinishedStage> {
    pretokenize(
        store,
        "tiny",
        "set",
        standardized,
        &chat(),
        options,
        &NoProgress,
        &CancelToken::new(),
    )
    .await
}
