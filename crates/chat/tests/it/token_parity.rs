//! Token ids and assistant masks against transformers, whole files at a time.

use std::path::{Path, PathBuf};

use updraft_chat::{
    Chat, Conversation, EncodePolicy, FastTokenizer, RenderOptions, StableTokenizer, Tokenizer as _,
};

use crate::fixtures::{self, Model};

/// `conv20k.qwen2.5.ids.parquet` is the set `conv20k` by the model `qwen2.5`.
fn parts<'a>(path: &'a Path, ending: &str) -> (&'a str, &'a str) {
    let stem = fixtures::name(path).trim_end_matches(ending);
    stem.split_once('.').expect("<set>.<model><ending>")
}

/// The conversations of a set; a shorter set is the beginning of the long one.
fn conversations(golden: &Path, set: &str) -> Vec<Conversation> {
    let own = golden.join(format!("{set}.parquet"));
    let path = if own.exists() {
        own
    } else {
        golden.join("conv20k.parquet")
    };
    fixtures::conversations(&path)
}

/// TRL's training template for a model: `trl/qwen2_5_training.jinja`.
fn training_template(root: &Path, model: &str) -> String {
    let name = format!("trl/{}_training.jinja", model.replace(['.', '-'], "_"));
    fixtures::files(&root.join("templates"), ".json")
        .iter()
        .find_map(|path| {
            let bytes = std::fs::read(path).ok()?;
            let file: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
            file["templates"][&name].as_str().map(str::to_owned)
        })
        .unwrap_or_else(|| panic!("no fixture holds the template {name}"))
}

#[expect(clippy::print_stdout, reason = "the numbers are the point")]
fn report(path: &Path, rows: &[Vec<u32>]) {
    let tokens: usize = rows.iter().map(Vec::len).sum();
    let name = fixtures::name(path);
    println!("{name}: {tokens} tokens of {} rows identical", rows.len());
}

fn golden(root: &Path) -> PathBuf {
    root.join("golden")
}

#[test]
fn token_id_parity_with_transformers() {
    let Some(root) = fixtures::root("token_id_parity_with_transformers") else {
        return;
    };
    for path in fixtures::files(&golden(&root), ".ids.parquet") {
        let (set, model) = parts(&path, ".ids.parquet");
        let model = Model::read(&root.join("tokenizers").join(model));
        let chat = Chat::from_files(&model.files(None)).expect("a chat model");
        let expected = fixtures::integers(&path, "input_ids");
        let conversations = conversations(&golden(&root), set);
        assert!(!expected.is_empty() && conversations.len() >= expected.len());
        for (row, (conversation, ids)) in conversations.iter().zip(&expected).enumerate() {
            let found = chat.prompt(conversation, &RenderOptions::default());
            assert_eq!(&found.expect("ids"), ids, "row {row} of {}", path.display());
        }
        report(&path, &expected);
    }
}

#[test]
fn assistant_mask_parity_with_transformers() {
    let Some(root) = fixtures::root("assistant_mask_parity_with_transformers") else {
        return;
    };
    for path in fixtures::files(&golden(&root), ".mask.parquet") {
        let (set, model) = parts(&path, ".mask.parquet");
        let template = training_template(&root, model);
        let model = Model::read(&root.join("tokenizers").join(model));
        let chat = Chat::from_files(&model.files(Some(&template))).expect("a chat model");
        let ids = fixtures::integers(&path, "input_ids");
        let masks = fixtures::integers(&path, "assistant_mask");
        let conversations = conversations(&golden(&root), set);
        assert!(!masks.is_empty() && conversations.len() >= masks.len());
        for (row, conversation) in conversations.iter().take(masks.len()).enumerate() {
            let example = match chat.example(conversation) {
                Ok(example) => example,
                Err(rejection) => {
                    panic!("row {row} of {} is rejected: {rejection}", path.display())
                }
            };
            let mut mask = vec![0; example.input_ids.len()];
            for span in &example.loss_spans {
                mask[span.start as usize..span.end as usize].fill(1);
            }
            assert_eq!(
                example.input_ids,
                ids[row],
                "row {row} of {}",
                path.display()
            );
            assert_eq!(mask, masks[row], "row {row} of {}", path.display());
        }
        report(&path, &masks);
    }
}

/// Both engines, both policies, on real text and on text made to hurt.
#[test]
fn engine_parity() {
    let Some(root) = fixtures::root("engine_parity") else {
        return;
    };
    let mut texts = hostile_texts();
    texts.extend(
        conversations(&golden(&root), "conv20k")
            .iter()
            .step_by(40)
            .flat_map(|conversation| &conversation.messages)
            .flat_map(|message| {
                message
                    .content
                    .texts()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            }),
    );
    let folders = std::fs::read_dir(root.join("tokenizers")).expect("tokenizers");
    for folder in folders.flatten() {
        let model = Model::read(&folder.path());
        let fast = FastTokenizer::from_json(model.tokenizer_json()).expect("fast");
        let stable = StableTokenizer::from_json(model.tokenizer_json()).expect("stable");
        for policy in [EncodePolicy::Parity, EncodePolicy::Sanitized] {
            for text in &texts {
                let (mut found, mut expected) = (Vec::new(), Vec::new());
                fast.encode_into(text, policy, &mut found)
                    .expect("fast ids");
                stable
                    .encode_into(text, policy, &mut expected)
                    .expect("stable ids");
                assert_eq!(
                    found,
                    expected,
                    "{policy:?} {:?} {text:?}",
                    folder.file_name()
                );
            }
        }
    }
}

fn hostile_texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "",
        " ",
        "   ",
        "\n\n\n",
        "a",
        " a",
        "a ",
        "<|im_start|>",
        "x<|im_end|>y",
        "<|im_<|im_end|>end|>",
        "<|endoftext|><|endoftext|>",
        "</s><s>[INST] x [/INST]",
        "<s>",
        "<unk>",
        "e\u{301}\u{301}",
        "\u{1100}\u{1161}\u{11a8}",
        "\u{212b}\u{2126}",
        "\u{0958}\u{fb1d}",
        "\u{feff}\u{200d}\u{200b}",
        "👨‍👩‍👧‍👦🏴‍☠️",
        "\0\u{1}\u{7f}",
        "\u{fffd}\u{ffff}\u{10ffff}",
        "日本語のテキスト",
        "мир و ۱۲۳ १२३",
        "don't DON'T we'LL ’s",
        "1234567890 12 345",
        "\t\tif x:\r\n\r\n    pass\u{a0}\u{3000}",
        "▁▁ ▁a",
        "<0x0A><0xFF>",
    ]
    .map(str::to_owned)
    .into();
    texts.push("a".repeat(100_000));
    texts.push(" ".repeat(10_000));
    texts.push("ab ".repeat(20_000));
    texts.push("é".repeat(5_000));
    texts.push("<|im_end|>".repeat(500));
    texts
}
