//! What rows say of their own training, from the formats to the tokens' loss spans.

use futures::TryStreamExt as _;
use serde_json::{Value, json};
use updraft_chat::{
    ByteTokenizer, Chat, ChatTemplate, Role, SpecialTokens, TokenizerExt as _, TrainOnEos,
};
use updraft_dataset::{
    Formats, ImportOptions, MemorySource, PretokenizeOptions, Reader, ReaderOptions, Record,
    import, pretokenize,
};
use updraft_store::{CancelToken, NoProgress, Store};

/// One message in OpenAI's words, as it is standardized.
fn convert(message: Value) -> Result<Value, String> {
    let mut row = serde_json::Map::from_iter([("messages".to_owned(), Value::from(vec![message]))]);
    let formats = Formats::default();
    let format = formats.get("openai").expect("built in");
    match format.convert(&mut row)? {
        Record::Conversation(conversation) => {
            Ok(serde_json::to_value(&conversation.messages[0]).expect("JSON"))
        }
        other => panic!("not a conversation: {other:?}"),
    }
}

#[track_caller]
fn check(message: Value, expected: &Value) {
    assert_eq!(&convert(message).expect("a message"), expected);
}

#[track_caller]
fn check_reason(message: Value, reason: &str) {
    assert_eq!(convert(message).expect_err("no message"), reason);
}

#[test]
fn whether_a_message_is_trained_is_said_in_several_words() {
    let said = |key: &str, value: Value| {
        let mut message = json!({ "role": "assistant", "content": "b" });
        message[key] = value;
        message
    };
    let weight = |weight: f64| json!({ "role": "assistant", "content": "b", "weight": weight });
    for no in [
        json!(false),
        json!(0),
        json!(0.0),
        json!("false"),
        json!("False"),
    ] {
        check(said("train", no), &weight(0.0));
    }
    check(said("train", json!(true)), &weight(1.0));
    check(said("weight", json!(0)), &weight(0.0));
    check(said("loss_weight", json!(1)), &weight(1.0));
    check(
        said("train", Value::Null),
        &json!({ "role": "assistant", "content": "b" }),
    );
    check_reason(
        said("train", json!("perhaps")),
        "message 0 has a train that is neither true nor false",
    );
    check_reason(
        said("weight", json!("heavy")),
        "message 0 has a weight that is not a number",
    );
}

#[test]
fn other_roles_are_trained_if_they_say_so() {
    let user = |key: &str| json!({ "role": "user", "content": "b", key: 1 });
    let trained = json!({ "role": "user", "content": "b", "weight": 1.0 });
    check(user("train"), &trained);
    check(user("loss_weight"), &trained);
    check(user("weight"), &json!({ "role": "user", "content": "b" }));
}

#[test]
fn turns_named_by_their_keys_have_flags_too() {
    let row = json!({ "conversations": [{ "user": "a", "assistant": "b", "train": false }] });
    let formats = Formats::default();
    let format = formats.get("sharegpt").expect("built in");
    let mut row = row.as_object().expect("an object").clone();
    let Ok(Record::Conversation(conversation)) = format.convert(&mut row) else {
        panic!("not a conversation");
    };
    let weights = conversation.messages.iter().map(|message| message.weight);
    assert_eq!(weights.collect::<Vec<_>>(), [None, Some(0.0)]);
}

#[test]
fn parts_of_a_message_become_details_of_its_text() {
    let detail = |begin: u32, end: u32, train: bool| json!({ "begin_offset": begin, "end_offset": end, "train": train });
    let details = json!([detail(0, 1, false), detail(2, 2, true)]);
    check(
        json!({ "role": "assistant", "content": "éàb", "train_detail": details, "train": null }),
        &json!({ "role": "assistant", "content": "éàb", "train_detail": details }),
    );
    check(
        json!({ "role": "assistant", "content": [
            { "type": "text", "text": "éà", "train": false }, { "type": "text", "text": "", "train": true }, { "type": "text", "text": "b", "train": true },
        ] }),
        &json!({ "role": "assistant", "content": "éàb", "train_detail": details }),
    );
    // A part that does not say it is as its message is.
    let unsaid = json!([{ "begin_offset": 0, "end_offset": 1 }, detail(2, 2, false)]);
    check(
        json!({ "role": "user", "train": true, "content": [{ "type": "text", "text": "ab" }, { "type": "text", "text": "c", "train": 0 }] }),
        &json!({ "role": "user", "content": "abc", "weight": 1.0, "train_detail": unsaid }),
    );
    check(
        json!({ "role": "assistant", "content": [{ "type": "text", "text": "a", "train": false }] }),
        &json!({ "role": "assistant", "content": "a", "weight": 0.0 }),
    );
    check(
        json!({ "role": "assistant", "train": true, "content": [{ "type": "text", "text": "a", "train": false }] }),
        &json!({ "role": "assistant", "content": "a", "weight": 0.0 }),
    );
    let with =
        |detail: Value| json!({ "role": "assistant", "content": "ab", "train_detail": detail });
    check_reason(
        with(json!("all")),
        "message 0 has a train_detail that is not a list",
    );
    check_reason(
        with(json!([{ "train": true }])),
        "message 0 has a train_detail without begin_offset, end_offset and train",
    );
    check_reason(
        with(json!([detail(2, 1, true)])),
        "message 0 has a train_detail that ends before it begins",
    );
    check_reason(
        json!({ "role": "assistant", "content": [{ "type": "image", "image": "x", "train": false }] }),
        "message 0 has a train on a part of type image: only texts take one",
    );
    check_reason(
        json!({ "role": "assistant", "content": [{ "type": "image", "image": "x" }], "train_detail": [detail(0, 0, true)] }),
        "message 0 has a train_detail and a content that is not one text",
    );
}

/// The texts of the tokens that a conversation's loss counts.
async fn trained(options: &PretokenizeOptions) -> Vec<String> {
    let (store, cancel) = (Store::memory(), CancelToken::new());
    let source = MemorySource::new("flags", [json!({ "messages": [
        { "role": "user", "content": "one two" },
        { "role": "assistant", "content": "three four", "train_detail": [{ "begin_offset": 0, "end_offset": 4, "train": true }] },
        { "role": "user", "content": "five", "train": true },
        { "role": "assistant", "content": "six" },
    ] })]).expect("rows");
    let standardized = import(
        &store,
        "flags",
        &source,
        &ImportOptions::default(),
        &NoProgress,
        &cancel,
    )
    .await
    .expect("an import");
    let special = SpecialTokens::new([("eos_token", "<end>")]);
    let template = ChatTemplate::new(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
        special,
    )
    .expect("a template");
    let chat = Chat::new(template, std::sync::Arc::new(ByteTokenizer::new(["<end>"])));
    let ready = pretokenize(
        &store,
        "m",
        "flags",
        &standardized,
        &chat,
        options,
        &NoProgress,
        &cancel,
    )
    .await
    .expect("a pretokenize");
    let reader = Reader::open(&ready, ReaderOptions::default())
        .await
        .expect("a reader");
    let rows: Vec<_> = reader.read(0, 0).try_collect().await.expect("rows");
    let [example] = &rows[..] else {
        panic!("one row is one example");
    };
    let text = |span: &std::ops::Range<u32>| {
        chat.tokenizer()
            .decode(&example.input_ids[span.start as usize..span.end as usize])
    };
    example.loss_spans.iter().map(text).collect()
}

#[tokio::test]
async fn flags_decide_which_tokens_the_loss_counts() {
    let options = PretokenizeOptions::default();
    assert_eq!(
        trained(&options).await,
        ["three", "<end>", "five<end>", "six<end>"]
    );
    let last = PretokenizeOptions {
        train_on_eos: TrainOnEos::Last,
        ..options.clone()
    };
    assert_eq!(trained(&last).await, ["three", "five", "six<end>"]);
    let users = PretokenizeOptions {
        roles_to_train: vec![Role::User],
        ..options
    };
    assert_eq!(
        trained(&users).await,
        ["one two<end>", "three", "<end>", "five<end>"]
    );
}
