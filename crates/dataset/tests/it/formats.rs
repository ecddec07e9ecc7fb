//! The built-in formats: each dialect's row and what it becomes, and the promises of a format.

use serde_json::{Value, json};
use updraft_dataset::format::{
    Alpaca, OpenAi, PreferencePairs, PromptCompletion, QuestionAnswer, ShareGpt, Text,
};
use updraft_dataset::{Formats, Record, format_tests};

format_tests!(
    sharegpt,
    ShareGpt,
    [
        json!({ "conversations": [{ "from": "human", "value": "a" }, { "from": "gpt", "value": "b" }], "system": "s", "tools": "[]" }),
        json!({ "conversations": [{ "user": "a", "assistant": "b" }] }),
    ]
);
format_tests!(
    openai,
    OpenAi,
    [
        json!({ "messages": [{ "role": "developer", "content": "s" }, { "role": "user", "content": [{ "type": "text", "text": "a" }] }, { "role": "assistant", "content": "b", "weight": 0 }] }),
    ]
);
format_tests!(
    alpaca,
    Alpaca::new("\n"),
    [
        json!({ "instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]] }),
        json!({ "INSTRUCTION": "a", "RESPONSE": "b" }),
    ]
);
format_tests!(
    question_answer,
    QuestionAnswer,
    [json!({ "question": "a", "answer": "b" })]
);
format_tests!(
    prompt_completion,
    PromptCompletion,
    [
        json!({ "prompt": "a", "completion": "b" }),
        json!({ "prompt": [{ "role": "user", "content": "a" }], "response": [{ "role": "assistant", "content": "b" }] }),
    ]
);
format_tests!(
    preference,
    PreferencePairs,
    [
        json!({ "prompt": "a", "chosen": "b", "rejected": "c" }),
        json!({ "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c" }),
        json!({ "messages": [{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b" }], "label": false }),
    ]
);
format_tests!(text, Text, [json!({ "text": "a" })]);

/// A row, the format that claims it, and the conversation it becomes, as JSON.
#[expect(
    clippy::needless_pass_by_value,
    reason = "reads better where it is called"
)]
fn check(row: Value, format: &str, expected: Value) {
    let Value::Object(mut row) = row else {
        panic!("not an object")
    };
    let formats = Formats::default();
    let found = formats.detect(&[&row]).expect("a format claims the row");
    assert_eq!(found.name(), format, "{row:?}");
    let record = found.convert(&mut row).expect("a record");
    let Record::Conversation(conversation) = record else {
        panic!("{record:?} is no conversation")
    };
    assert_eq!(serde_json::to_value(conversation).expect("JSON"), expected);
}

#[test]
fn sharegpt_roles_become_the_four() {
    check(
        json!({ "conversations": [
            { "from": "system", "value": "s" }, { "from": "human", "value": "a" },
            { "from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": [1, 2.0]}}" },
            { "from": "observation", "value": "3" }, { "from": "gpt", "value": "b" },
        ], "tools": "[{\"name\": \"f\", \"parameters\": {}}]", "id": "1" }),
        "sharegpt",
        json!({ "messages": [
            { "role": "system", "content": "s" }, { "role": "user", "content": "a" },
            { "role": "assistant", "content": null, "tool_calls": [{ "type": "function", "function": { "name": "f", "arguments": { "x": [1, 2.0] } } }] },
            { "role": "tool", "content": "3" }, { "role": "assistant", "content": "b" },
        ], "tools": [{ "type": "function", "function": { "name": "f", "parameters": {} } }] }),
    );
    check(
        json!({ "messages": [{ "user": "a", "assistant": "b" }, { "user": "c", "assistant": "d" }], "system": "s" }),
        "sharegpt",
        json!({ "messages": [{ "role": "system", "content": "s" }, { "role": "user", "content": "a" }, { "role": "assistant", "content": "b" }, { "role": "user", "content": "c" }, { "role": "assistant", "content": "d" }] }),
    );
}

#[test]
fn openai_parts_calls_reasoning_and_weights_travel() {
    check(
        json!({ "messages": [
            { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "value": "b" }] },
            { "role": "assistant", "content": null, "thinking": "t", "train": false, "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } }] },
            { "role": "tool", "tool_call_id": "1", "name": "f", "content": "3" },
            { "role": "assistant", "content": [{ "type": "reasoning", "value": "r" }, { "type": "text", "value": "c" }], "weight": 1 },
        ], "documents": [{ "title": "d" }], "chat_template_kwargs": { "enable_thinking": true } }),
        "openai",
        json!({ "messages": [
            { "role": "user", "content": "ab" },
            { "role": "assistant", "content": null, "reasoning_content": "t", "weight": 0.0, "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } }] },
            { "role": "tool", "tool_call_id": "1", "name": "f", "content": "3" },
            { "role": "assistant", "content": "c", "reasoning_content": "r", "weight": 1.0 },
        ], "documents": [{ "title": "d" }], "variables": { "enable_thinking": true } }),
    );
    check(
        json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "value": "1.jpg" }, { "type": "text", "value": "a" }] }, { "role": "assistant", "content": "b" }] }),
        "openai",
        json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "1.jpg" } }, { "type": "text", "text": "a" }] }, { "role": "assistant", "content": "b" }] }),
    );
}

#[test]
fn pairs_become_two_turns() {
    let two = |question: &str| json!({ "messages": [{ "role": "user", "content": question }, { "role": "assistant", "content": "b" }] });
    check(
        json!({ "instruction": "a", "input": "", "output": "b" }),
        "alpaca",
        two("a"),
    );
    check(
        json!({ "instruction": "a", "input": "i", "response": "b" }),
        "alpaca",
        two("a\ni"),
    );
    check(
        json!({ "INSTRUCTION": "a", "RESPONSE": "b" }),
        "alpaca",
        two("a"),
    );
    check(
        json!({ "question": "a", "answer": "b", "extra": 1 }),
        "question-answer",
        two("a"),
    );
    check(
        json!({ "prompt": "a", "completion": "b" }),
        "prompt-completion",
        two("a"),
    );
    check(
        json!({ "prompt": "a", "generation": [{ "role": "assistant", "content": "b" }] }),
        "prompt-completion",
        two("a"),
    );
}

/// The texts of prompt, chosen and rejected.
fn check_preference(row: Value, expected: [&[&str]; 3]) {
    let Value::Object(mut row) = row else {
        panic!("not an object")
    };
    let formats = Formats::default();
    let found = formats.detect(&[&row]).expect("a format claims the row");
    assert_eq!(found.name(), "preference");
    let Ok(Record::Preference(preference)) = found.convert(&mut row) else {
        panic!("{row:?} is a preference")
    };
    let messages = [
        Some(preference.prompt.messages),
        preference.chosen,
        preference.rejected,
    ];
    for (messages, expected) in messages.into_iter().zip(expected) {
        let texts: Vec<String> = messages
            .unwrap_or_default()
            .iter()
            .flat_map(|message| {
                message
                    .content
                    .texts()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(texts, expected);
    }
}

#[test]
fn preferences_share_their_prompt() {
    let user = |text: &str| json!({ "role": "user", "content": text });
    let bot = |text: &str| json!({ "role": "assistant", "content": text });
    check_preference(
        json!({ "prompt": "a", "chosen": "b", "rejected": "c" }),
        [&["a"], &["b"], &["c"]],
    );
    check_preference(
        json!({ "conversations": [{ "from": "human", "value": "a" }], "chosen": { "from": "gpt", "value": "b" }, "rejected": { "from": "gpt", "value": "c" } }),
        [&["a"], &["b"], &["c"]],
    );
    check_preference(
        json!({ "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")] }),
        [&["a"], &["b"], &["c"]],
    );
    check_preference(
        json!({ "prompt": "a", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")] }),
        [&["a"], &["b"], &["c"]],
    );
    check_preference(
        json!({ "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:" }),
        [&["a", "b", "c"], &["d"], &[""]],
    );
    check_preference(
        json!({ "messages": [user("a"), bot("b")], "label": true }),
        [&["a"], &["b"], &[]],
    );
    check_preference(
        json!({ "prompt": "a", "completion": "b", "label": false }),
        [&["a"], &[], &["b"]],
    );
}

/// The format of this name refuses the row for this reason.
fn check_reason(format: &str, row: Value, reason: &str) {
    let Value::Object(mut row) = row else {
        panic!("not an object")
    };
    let formats = Formats::default();
    assert_eq!(
        formats.get(format).expect("known").convert(&mut row),
        Err(reason.to_owned())
    );
}

#[test]
fn reasons_name_what_is_wrong() {
    check_reason(
        "sharegpt",
        json!({ "conversations": [{ "from": "human", "value": "a" }, { "from": "narrator", "value": "b" }] }),
        "message 1 has the unknown role \"narrator\"",
    );
    check_reason("sharegpt", json!({ "conversations": [] }), "no messages");
    check_reason(
        "sharegpt",
        json!({ "conversations": [{ "from": "human" }] }),
        "message 0 has no content",
    );
    check_reason(
        "sharegpt",
        json!({ "conversations": [{ "value": "a" }] }),
        "message 0 has no role",
    );
    check_reason(
        "openai",
        json!({ "messages": [{ "role": "user", "content": 7 }] }),
        "message 0 has a content that is neither text nor parts",
    );
    check_reason(
        "openai",
        json!({ "messages": [{ "role": "user", "content": "a" }], "tools": "{" }),
        "column tools is not JSON: EOF while parsing an object at line 1 column 1",
    );
    check_reason(
        "alpaca",
        json!({ "instruction": "a", "output": null }),
        "column output or response is missing or null",
    );
    check_reason(
        "alpaca",
        json!({ "instruction": ["a"], "output": "b" }),
        "column instruction is not text",
    );
    check_reason(
        "preference",
        json!({ "chosen": "b", "rejected": "c" }),
        "no prompt: there is no column prompt, and the answers share no first message",
    );
    check_reason("text", json!({ "text": "" }), "the text is empty");
}

#[test]
fn calls_come_as_json_or_as_its_text() {
    let call =
        json!([{ "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } }]);
    let bare = json!({ "name": "f", "arguments": "{\"x\": 1}" });
    for (key, given) in [
        ("tool_calls", call.clone()),
        ("tool_calls", call[0].clone()),
        ("tool_calls", Value::String(call.to_string())),
        ("function_call", bare.clone()),
        ("function_call", Value::String(bare.to_string())),
    ] {
        let mut turn = json!({ "role": "assistant", "content": "b" });
        turn[key] = given;
        check(
            json!({ "messages": [{ "role": "user", "content": "a" }, turn] }),
            "openai",
            json!({ "messages": [{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b", "tool_calls": call }] }),
        );
    }
    let with = |key: &str, given: Value| {
        let mut turn = json!({ "role": "assistant", "content": "b" });
        turn[key] = given;
        json!({ "messages": [turn] })
    };
    check_reason(
        "openai",
        with("tool_calls", json!(7)),
        "message 0 has tool_calls that are no calls",
    );
    check_reason(
        "openai",
        with("function_call", json!("f(1)")),
        "message 0 has a function call that is not JSON",
    );
    let mut both = with("tool_calls", call);
    both["messages"][0]["function_call"] = bare;
    check_reason(
        "openai",
        both,
        "message 0 has both tool_calls and function_call",
    );
}

#[test]
fn nothing_that_is_said_is_passed_over() {
    check_reason(
        "sharegpt",
        json!({ "messages": [{ "user": "a", "assistant": ["b", "c"] }] }),
        "message 0 has under assistant what is not text",
    );
    check_reason(
        "sharegpt",
        json!({ "messages": [{ "user": null }] }),
        "message 0 has no content",
    );
    let with_system = |column: &str| json!({ "system": column, "messages": [{ "role": "system", "content": "s" }, { "role": "user", "content": "a" }] });
    check_reason(
        "openai",
        with_system("another"),
        "column system is not what the system message says",
    );
    for same in ["s", " s\n", ""] {
        check(
            with_system(same),
            "openai",
            json!({ "messages": [{ "role": "system", "content": "s" }, { "role": "user", "content": "a" }] }),
        );
    }
}

#[test]
fn a_prompt_is_not_asked_twice() {
    let repeated = "an answer repeats the prompt, and not as the prompt has it";
    let turns = |answer: &str| json!([{ "role": "user", "content": "a?" }, { "role": "assistant", "content": answer }]);
    for row in [
        json!({ "prompt": "a", "chosen": turns("b"), "rejected": turns("c") }),
        json!({ "prompt": "a", "chosen": "a\nb", "rejected": "a\nc" }),
        json!({ "prompt": "a", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c" }),
    ] {
        check_reason("preference", row, repeated);
    }
    let transcript = "\n\nHuman: a\n\nAssistant:";
    check_preference(
        json!({ "prompt": transcript, "chosen": " b", "rejected": " c" }),
        [&["a"], &[" b"], &[" c"]],
    );
    let whole = |answer: &str| format!("{transcript} {answer}");
    check_preference(
        json!({ "prompt": transcript, "chosen": whole("b"), "rejected": whole("c") }),
        [&["a"], &["b"], &["c"]],
    );
    check_preference(
        json!({ "prompt": "a", "chosen": "abc", "rejected": "a" }),
        [&["a"], &["abc"], &["a"]],
    );
}

/// Templates see the media of a row under the names they have beside the messages.
#[test]
fn media_columns_travel_to_the_template() {
    let row = json!({ "messages": [{ "role": "user", "content": "<image>?" }, { "role": "assistant", "content": "a cat" }], "images": ["cat.png"], "videos": [], "audios": null });
    let Value::Object(mut row) = row else {
        panic!("not an object")
    };
    let record = Formats::default()
        .get("openai")
        .expect("known")
        .convert(&mut row);
    let Ok(updraft_dataset::Record::Conversation(conversation)) = record else {
        panic!("{record:?}")
    };
    assert_eq!(
        Value::Object(conversation.variables),
        json!({ "images": ["cat.png"] })
    );
}
