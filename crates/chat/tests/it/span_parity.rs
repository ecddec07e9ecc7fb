//! Loss spans of real templates: `{% generation %}` tags against sentinels and
//! markers on the same template without its tags.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;
use updraft_chat::{
    ByteTokenizer, Chat, ChatTemplate, Conversation, LocalTime, LossOptions, Message, Rejection,
    SpanSource, SpecialTokens,
};

use crate::fixtures;

fn chat(source: &str) -> Chat {
    let special = SpecialTokens::new([("bos_token", "<BOS>"), ("eos_token", "<EOS>")]);
    let template = ChatTemplate::new(source, special).expect("a template that parses");
    let mut tokens: Vec<&str> = source
        .match_indices('<')
        .filter_map(|(at, _)| {
            let token = &source[at..=at + source[at..].find('>')?];
            let is_control = token.contains(['|', '｜']) || token.contains("eos");
            (is_control && !token.contains(['\n', '\'', '"', ' ', '{'])).then_some(token)
        })
        .collect();
    tokens.extend(["<BOS>", "<EOS>", "<end_of_turn>", "<turn|>"]);
    tokens.sort_unstable();
    tokens.dedup();
    Chat::new(template, Arc::new(ByteTokenizer::new(tokens))).with_now(LocalTime::from_seconds(0))
}

/// The template without its tags, so that the spans must be found otherwise.
fn without_tags(source: &str) -> String {
    let mut plain = source.to_owned();
    for (tag, with) in [("endgeneration", "endwith"), ("generation", "with")] {
        for space in [" ", "- "] {
            let found = format!("{{%{space}{tag}");
            plain = plain.replace(&found, &format!("{{%{space}{with}"));
        }
    }
    plain
}

/// Where tags say what the assistant writes, what is found without them lies
/// inside; nearly every real conversation is explained one way or another.
#[test]
#[expect(clippy::print_stdout, reason = "the numbers are the point")]
fn span_parity_of_tags_and_sentinels() {
    let Some(root) = fixtures::root("span_parity_of_tags_and_sentinels") else {
        return;
    };
    for path in fixtures::files(&root.join("templates"), ".json") {
        let bytes = std::fs::read(&path).expect("a readable file");
        let file: Value = serde_json::from_slice(&bytes).expect("json");
        let mut found: BTreeMap<String, usize> = BTreeMap::new();
        let (mut compared, mut outside) = (0, Vec::new());
        for case in file["cases"].as_array().expect("cases") {
            let Some(conversation) = conversation(case) else {
                continue;
            };
            let name = case["template"].as_str().expect("a name");
            let source = file["templates"][name].as_str().expect("a template");
            let plain = chat(&without_tags(source)).render_spans(&conversation);
            let kind = match &plain {
                Ok(rendered) => format!("{:?}", rendered.source),
                Err(rejection) => kind(rejection),
            };
            *found.entry(kind).or_default() += 1;
            if let (Ok(plain), Ok(tagged)) = (plain, chat(source).render_spans(&conversation))
                && tagged.source == SpanSource::Generation
            {
                compared += 1;
                let inside = |span: &Range<usize>| {
                    let mut tags = tagged.spans.iter();
                    tags.any(|tag| tag.start <= span.start && span.end <= tag.end)
                };
                if !plain.spans.iter().all(inside) {
                    outside.push(format!("{name} {}", case["case"]));
                }
            }
        }
        println!(
            "{}: {found:?}, {compared} compared with tags",
            fixtures::name(&path)
        );
        assert_eq!(outside, Vec::<String>::new());
    }
}

/// The case's conversation, if transformers renders it and it has an answer.
fn conversation(case: &Value) -> Option<Conversation> {
    let messages: Vec<Message> = serde_json::from_value(case["msgs"].clone()).expect("messages");
    let loss = LossOptions::default();
    let has_answer = messages.iter().any(|message| loss.trains(message));
    (case["ok"] == true && has_answer).then(|| Conversation {
        messages,
        tools: Some(case["tools"].clone()).filter(|tools| !tools.is_null()),
        variables: case["kw"].as_object().expect("kw").clone(),
        ..Conversation::default()
    })
}

fn kind(rejection: &Rejection) -> String {
    let text = format!("{rejection:?}");
    text.split([' ', '(']).next().unwrap_or_default().to_owned()
}
