//! What strangers may send: text, templates and tokenizer files made to hurt,
//! from a seed, and all that fuzzing has found. Nothing panics, and ids are the
//! oracle's.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use updraft_chat::{
    ByteTokenizer, Chat, ChatTemplate, Conversation, Detokenizer, EncodePolicy, FastTokenizer,
    LocalTime, RenderOptions, SpecialTokens, StableTokenizer, Tokenizer, TokenizerExt as _,
};

use crate::disputed::is_disputed;
use crate::fixtures;

/// Marsaglia's xorshift: the same texts in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }

    fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.roll(of.len())]
    }

    /// A character both engines agree on, below a code point.
    fn char(&mut self, below: usize) -> char {
        loop {
            let c = char::from_u32(self.roll(below) as u32);
            if let Some(c) = c.filter(|&c| !is_disputed(c)) {
                return c;
            }
        }
    }

    fn text(&mut self, control: &[&str]) -> String {
        let mut text = String::new();
        for _ in 0..=self.roll(24) {
            let count = self.roll(6) + 1;
            match self.roll(12) {
                0 => text.extend((0..count).map(|_| self.char(0x11_0000))),
                1 => text.extend((0..count).map(|_| self.char(0x3000))),
                2 => text.extend((0..count).map(|_| self.char(0x80))),
                3 => text.extend((0..count * 3).map(|_| (b'a' + self.roll(26) as u8) as char)),
                4 => text.extend((0..count).map(|_| (b'0' + self.roll(10) as u8) as char)),
                5 => text.extend((0..count).map(|_| {
                    self.pick(&[" ", "\n", "\r\n", "\t", "\u{a0}", "\u{3000}", "\u{85}"])
                })),
                6 => text.push_str(self.pick(control)),
                7 => {
                    // A control token inside a word, or begun within itself.
                    let token = self.pick(control);
                    let cut = (0..=self.roll(token.len() + 1))
                        .rev()
                        .find(|&at| token.is_char_boundary(at))
                        .unwrap_or(0);
                    text.extend(["wor", &token[..cut], token, &token[cut..], "d"]);
                }
                8 => text.extend(
                    (0..count)
                        .map(|_| char::from_u32(0x300 + self.roll(0x70) as u32).unwrap_or('a')),
                ),
                9 => {
                    // Cut characters, as lossy decoding leaves them.
                    let bytes = "é€😀é".as_bytes();
                    let at = self.roll(bytes.len());
                    text.push_str(&String::from_utf8_lossy(
                        &bytes[at..at + self.roll(bytes.len() - at)],
                    ));
                }
                10 => text.push_str(self.pick(&[
                    "▁",
                    "▁▁a",
                    "<0x0A>",
                    "<0xFF>",
                    "Ġ",
                    "<unk>",
                    "'s",
                    "'LL",
                    "👨‍👩‍👧",
                ])),
                _ => text.extend(
                    (0..count)
                        .map(|_| char::from_u32(0x1100 + self.roll(0x100) as u32).unwrap_or('a')),
                ),
            }
        }
        text
    }
}

fn tiny() -> Vec<u8> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny/tokenizer.json");
    std::fs::read(path).expect("the tiny model's tokenizer")
}

/// A SentencePiece vocabulary with byte fallback, as Llama 2 (a normalizer
/// that prepends) or Mistral (a pre-tokenizer) spells it.
fn sentence_piece(newer: bool) -> Vec<u8> {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.entry(token).or_insert(id.into());
    };
    for token in ["<unk>", "<s>", "</s>"] {
        add(token.to_owned());
    }
    for byte in 0..=255 {
        add(format!("<0x{byte:02X}>"));
    }
    for c in ('a'..='z').chain("▁ABC0123.,é日😀".chars()) {
        add(c.to_string());
    }
    let merges = [
        "▁ ▁",
        "▁▁ ▁▁",
        "▁ t",
        "h e",
        "▁t he",
        "a n",
        "an d",
        "▁ and",
        "e r",
        "0 1",
    ];
    for merge in merges {
        add(merge.replace(' ', ""));
    }
    let metaspace = serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    let prepends = serde_json::json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    let special = |id: usize, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    };
    let file = serde_json::json!({
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": if newer { serde_json::Value::Null } else { prepends },
        "pre_tokenizer": if newer { metaspace } else { serde_json::Value::Null },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": merges},
    });
    file.to_string().into_bytes()
}

/// The tokenizers every test has, and the genuine ones where there are any.
fn tokenizers() -> Vec<(String, Vec<u8>)> {
    let mut found = vec![
        ("tiny".to_owned(), tiny()),
        ("llama 2's kind".to_owned(), sentence_piece(false)),
        ("mistral's kind".to_owned(), sentence_piece(true)),
    ];
    if let Some(root) = fixtures::root("genuine tokenizers") {
        for folder in fixtures::files(&root.join("tokenizers"), "") {
            let bytes = std::fs::read(folder.join("tokenizer.json")).expect("a tokenizer");
            found.push((fixtures::name(&folder).to_owned(), bytes));
        }
    }
    found
}

#[test]
fn hostile_text_parity_with_the_oracle() {
    for (name, json) in tokenizers() {
        let fast = FastTokenizer::from_json(&json).expect("fast");
        let stable = StableTokenizer::from_json(&json).expect("stable");
        let special: Vec<&str> = fast
            .vocabulary()
            .special_tokens()
            .map(|(_, token)| token)
            .collect();
        let mut dice = Dice(0x5EED);
        let mut texts: Vec<String> = (0..150).map(|_| dice.text(&special)).collect();
        let end = special[0];
        // A megabyte without a border; the oracle is slow with large vocabularies.
        let long = if json.len() < 1 << 20 {
            1 << 20
        } else {
            1 << 16
        };
        texts.push("x".repeat(long) + end);
        texts.push("é日".repeat(1 << 13) + end);
        for text in &texts {
            for policy in [EncodePolicy::Parity, EncodePolicy::Sanitized] {
                let (mut ids, mut expected) = (Vec::new(), Vec::new());
                fast.encode_into(text, policy, &mut ids).expect("ids");
                stable
                    .encode_into(text, policy, &mut expected)
                    .expect("ids");
                assert!(
                    ids == expected,
                    "{name} {policy:?} {:?}",
                    text.chars().take(300).collect::<String>()
                );
                let ends = fast.token_ends(text, &ids);
                assert!(ends.is_sorted() && ends.len() == ids.len());
                assert_eq!(ends.last().copied().unwrap_or(0), text.len());
            }
        }
    }
}

/// Any ids at all, as a model that was never trained samples them.
#[test]
fn any_ids_are_decoded_alike_at_once_and_in_a_stream() {
    for (name, json) in tokenizers() {
        let tokenizer: Arc<dyn Tokenizer> =
            Arc::new(FastTokenizer::from_json(&json).expect("fast"));
        let mut dice = Dice(0x1D5);
        for _ in 0..200 {
            let ids: Vec<u32> = (0..dice.roll(40))
                .map(|_| dice.roll(tokenizer.vocab_size() + 3) as u32)
                .collect();
            let mut stream = Detokenizer::new(Arc::clone(&tokenizer)).with_special_tokens();
            let mut text = String::new();
            for &id in &ids {
                text += stream.push(id);
            }
            text += stream.finish();
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(|&id| stream.bytes(id))
                .copied()
                .collect();
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{name} {ids:?}");
        }
    }
}

const PIECES: [&str; 48] = [
    "{% for m in messages %}",
    "{% for m in tools %}",
    "{% for k, v in messages[0].items() %}",
    "{% endfor %}",
    "{% if add_generation_prompt %}",
    "{% if m.tool_calls %}",
    "{% elif x is defined %}",
    "{% else %}",
    "{% endif %}",
    "{% generation %}",
    "{%- endgeneration -%}",
    "{{ m.content }}",
    "{{ m['role'] }}",
    "{{ m }}",
    "{{ messages }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ m.content[1:-1] }}",
    "{{ m.content.split('</think>')[-1] }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ (m.content | trim) + bos_token }}",
    "{% set ns = namespace(x=0) %}",
    "{% set ns.x = ns.x + 1 %}",
    "{% set x %}",
    "{% endset %}",
    "{{ ns.x // 0 }}",
    "{% macro f(a) %}",
    "{% endmacro %}",
    "{{ f(1) }}",
    "{{ loop.cycle() }}",
    "{{ loop.length }}",
    "{% break %}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%d %b %Y %') }}",
    "{{ range(99) | list }}",
    "{{ 'x' * 99999999 }}",
    "{{ -9223372036854775808 // -1 }}",
    "{{ 2 ** 999 }}",
    "{{ '%s' % 1 }}",
    "{{ 'é'[0:1] ~ '\\u00e9' }}",
    "{{ messages[::-1][99] }}",
    "{# comment",
    "#}",
    "{% raw %}",
    "{% endraw %}",
    "<|im_start|>",
    "\r\n",
    "{%",
    "}}",
];

fn check_template(source: &str) {
    let special = SpecialTokens::new([("bos_token", "<s>"), ("eos_token", "</s>")]);
    let Ok(template) = ChatTemplate::new(source, special) else {
        return;
    };
    let conversation: Conversation = serde_json::from_str(
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
            {"role": "tool", "content": "4"}, {"role": "assistant", "content": "<think>é</think> 4 é"}],
            "tools": [{"name": "add"}]}"#,
    )
    .expect("a conversation");
    let now = Some(LocalTime::from_seconds(0));
    let options = RenderOptions {
        continue_final_message: true,
        now,
        ..RenderOptions::default()
    };
    let _ = template.render(&conversation, &options);
    let chat = Chat::new(template, Arc::new(ByteTokenizer::new(["<s>", "</s>"]))).with_now(now);
    if let Ok(example) = chat.example(&conversation) {
        assert!(example.trained_tokens() > 0, "{source}");
        let last = example.loss_spans.last().map_or(0, |span| span.end);
        assert!(last as usize <= example.len(), "{source}");
    }
}

#[test]
fn hostile_templates_end_in_a_text_or_an_error() {
    let mut dice = Dice(0x7E41);
    for _ in 0..200 {
        let pieces: Vec<&str> = (0..dice.roll(12)).map(|_| dice.pick(&PIECES)).collect();
        check_template(&pieces.concat());
    }
    for path in found("template") {
        check_template(&std::fs::read_to_string(path).expect("text"));
    }
}

fn check_tokenizer_json(bytes: &[u8]) {
    let Ok(tokenizer) = FastTokenizer::from_json(bytes) else {
        return;
    };
    for text in [
        "",
        "Hello, <|im_end|> world 123\n",
        "é日本\u{1F600}e\u{301}",
    ] {
        let mut ids = Vec::new();
        if tokenizer
            .encode_into(text, EncodePolicy::Parity, &mut ids)
            .is_ok()
        {
            let ends = tokenizer.token_ends(text, &ids);
            assert!(ends.is_sorted() && ends.len() == ids.len());
            let _ = tokenizer.decode(&ids);
        }
    }
}

/// A small tokenizer's file with bytes changed, cut and moved about.
#[test]
fn hostile_tokenizer_files_end_in_a_tokenizer_or_an_error() {
    let mut dice = Dice(0x70CE);
    for original in [tiny(), sentence_piece(false), sentence_piece(true)] {
        for _ in 0..60 {
            let mut bytes = original.clone();
            for _ in 0..=dice.roll(4) {
                let at = dice.roll(bytes.len());
                match dice.roll(4) {
                    0 => {
                        let changed = dice.roll(8);
                        bytes[at] = b"09\"{]- \xFF"[changed];
                    }
                    1 => bytes.truncate(at.max(1)),
                    2 => drop(bytes.drain(at..(at + dice.roll(40)).min(bytes.len()))),
                    _ => {
                        let copied = bytes[at..(at + dice.roll(40)).min(bytes.len())].to_vec();
                        let to = dice.roll(bytes.len());
                        bytes.splice(to..to, copied);
                    }
                }
            }
            check_tokenizer_json(&bytes);
        }
    }
    for path in found("tokenizer_json") {
        check_tokenizer_json(&std::fs::read(path).expect("bytes"));
    }
}

/// What fuzzing has found, kept.
fn found(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/found")
        .join(target);
    let files = fixtures::files(&folder, "");
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
}
