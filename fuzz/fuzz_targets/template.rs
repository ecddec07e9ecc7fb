//! Any text as a chat template.

#![no_main]

use std::sync::{Arc, Once};

use libfuzzer_sys::fuzz_target;
use updraft_chat::{
    ByteTokenizer, Chat, ChatTemplate, Conversation, LocalTime, RenderOptions, SpecialTokens,
};

const CONVERSATION: &str = r#"{
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2+2?"}, {"type": "image", "url": "x"}]},
        {"role": "assistant", "content": null, "reasoning_content": "a tool", "tool_calls":
            [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [2.5, null]}}}]},
        {"role": "tool", "name": "add", "tool_call_id": "1", "content": "4"},
        {"role": "assistant", "content": "<think>it said</think> 4 é"}
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    "documents": [{"title": "t", "text": "x"}],
    "variables": {"enable_thinking": true, "n": 3}
}"#;

static QUIET: Once = Once::new();

fuzz_target!(|source: &str| {
    // A panic of the engine that we contain is no find; one that leaves us is.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| ())));
    let special = SpecialTokens::new([("bos_token", "<s>"), ("eos_token", "</s>")]);
    let Ok(template) = ChatTemplate::new(source, special) else {
        return;
    };
    let _ = (template.divergences(), template.variables());
    let conversation: Conversation = serde_json::from_str(CONVERSATION).unwrap();
    let now = Some(LocalTime::from_seconds(0));
    for continues in [false, true] {
        let options = RenderOptions {
            add_generation_prompt: !continues,
            continue_final_message: continues,
            now,
            ..RenderOptions::default()
        };
        let _ = template.render(&conversation, &options);
    }
    let tokenizer = ByteTokenizer::new(["<s>", "</s>"]);
    let chat = Chat::new(template, Arc::new(tokenizer)).with_now(now);
    if let Ok(rendered) = chat.render_spans(&conversation) {
        let mut from = 0;
        for span in &rendered.spans {
            assert!(from <= span.start && span.start <= span.end, "{:?}", rendered.spans);
            assert!(rendered.text.get(span.clone()).is_some(), "{span:?}");
            from = span.end;
        }
    }
    if let Ok(example) = chat.example(&conversation) {
        assert!(example.trained_tokens() > 0);
        assert!(example.loss_spans.last().unwrap().end as usize <= example.len());
    }
});
