use super::*;
use crate::message::TrainDetail;
use crate::template::SpecialTokens;

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The same with tags around what the assistant writes.
const TAGGED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// The same, looking into the contents, so that sentinels would change the render.
const MARKED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '!' if m.content.startswith('Be ') }}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn spans(source: &str, messages: &[Message]) -> Result<(SpanSource, Vec<String>), Rejection> {
    spans_by(source, messages, &LossOptions::default())
}

fn spans_by(
    source: &str,
    messages: &[Message],
    loss: &LossOptions,
) -> Result<(SpanSource, Vec<String>), Rejection> {
    let template = ChatTemplate::new(source, SpecialTokens::default()).unwrap();
    let special = ["<|im_start|>", "<|im_end|>"];
    let markers = TurnMarkers::learn(&template, special.into_iter(), Vec::new());
    let conversation = Conversation::new(messages);
    let rendered = render_spans(
        &template,
        &markers,
        &conversation,
        loss,
        &RenderOptions::default(),
    )?;
    let texts = rendered
        .spans
        .iter()
        .map(|span| rendered.text[span.clone()].to_owned());
    Ok((rendered.source, texts.collect()))
}

fn talk() -> Vec<Message> {
    vec![
        Message::system("Be brief."),
        Message::user("ok"),
        Message::assistant(" ok\n"),
        Message::user("ok"),
        Message::assistant("ok"),
    ]
}

#[test]
fn sentinels_find_each_turn_through_its_end() {
    let expected = vec![" ok\n<|im_end|>".to_owned(), "ok<|im_end|>".to_owned()];
    assert_eq!(
        spans(CHATML, &talk()).unwrap(),
        (SpanSource::Sentinels, expected)
    );
}

#[test]
fn generation_tags_come_first() {
    let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let expected = vec![" ok\n!".to_owned(), "ok!".to_owned()];
    assert_eq!(
        spans(source, &talk()).unwrap(),
        (SpanSource::Generation, expected)
    );
}

#[test]
fn markers_explain_what_sentinels_cannot() {
    let source = CHATML.replace(
        "{{ m.content }}",
        "{{ 'Hm. ' if m.content.startswith('ok ') }}{{ m.content }}",
    );
    let mut messages = talk();
    messages[4] = Message::assistant("ok then");
    let (source, found) = spans(&source, &messages).unwrap();
    assert_eq!(source, SpanSource::Markers);
    assert_eq!(found, [" ok\n<|im_end|>", "Hm. ok then<|im_end|>"]);
}

#[test]
fn a_weight_of_zero_is_left_out() {
    let mut messages = talk();
    messages[2].weight = Some(0.0);
    let (_, found) = spans(CHATML, &messages).unwrap();
    assert_eq!(found, ["ok<|im_end|>"]);
}

#[test]
fn a_dropped_message_is_named() {
    let source = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}");
    let error = spans(&source, &talk()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("message 1") && text.contains("user"),
        "{text}"
    );
}

#[test]
fn text_full_of_private_characters_still_works() {
    let messages = [
        Message::user("\u{F0001}\u{10FFFD}"),
        Message::assistant("\u{F0000}x"),
    ];
    let (source, found) = spans(CHATML, &messages).unwrap();
    assert_eq!(source, SpanSource::Markers);
    assert_eq!(found, ["\u{F0000}x<|im_end|>"]);
}

/// Messages as a dataset writes them.
fn said(messages: serde_json::Value) -> Vec<Message> {
    serde_json::from_value(messages).unwrap()
}

#[track_caller]
fn trains(source: &str, messages: &[Message], loss: &LossOptions, expected: &[&str]) {
    assert_eq!(spans_by(source, messages, loss).unwrap().1, expected);
}

#[test]
fn the_roles_to_train_can_be_others() {
    let roles = |roles: &[Role]| LossOptions {
        roles_to_train: roles.to_vec(),
        ..LossOptions::default()
    };
    let both = roles(&[Role::User, Role::Assistant]);
    let (ok, answer) = ("ok<|im_end|>", " ok\n<|im_end|>");
    trains(CHATML, &talk(), &both, &[ok, answer, ok, ok]);
    trains(
        TAGGED,
        &talk(),
        &both,
        &["ok<|im_end|>", " ok\n<|im_end|>", ok, ok],
    );
    trains(
        CHATML,
        &talk(),
        &roles(&[Role::System]),
        &["Be brief.<|im_end|>"],
    );

    let mut messages = talk();
    messages[1].weight = Some(1.0);
    messages[4].weight = Some(0.0);
    trains(CHATML, &messages, &LossOptions::default(), &[ok, answer]);
    trains(TAGGED, &messages, &LossOptions::default(), &[ok, answer]);
}

#[test]
fn ends_are_trained_as_asked() {
    let loss = |train_on_eos| LossOptions {
        train_on_eos,
        ..LossOptions::default()
    };
    let (end, last) = ("<|im_end|>", "ok<|im_end|>");
    for source in [CHATML, TAGGED, MARKED] {
        trains(
            source,
            &talk(),
            &loss(TrainOnEos::Turn),
            &[" ok\n<|im_end|>", last],
        );
        trains(source, &talk(), &loss(TrainOnEos::Last), &[" ok\n", last]);
        let all = [end, end, " ok\n<|im_end|>", end, last];
        trains(source, &talk(), &loss(TrainOnEos::All), &all);
    }
    // Most tags of real templates hold the line end too.
    let roomy = TAGGED.replace(
        "<|im_end|>{% endgeneration %}{% else %}",
        "<|im_end|>\n{% endgeneration %}{% else %}",
    );
    let (first, second) = (" ok\n<|im_end|>\n", "ok<|im_end|>\n");
    trains(&roomy, &talk(), &loss(TrainOnEos::Turn), &[first, second]);
    trains(&roomy, &talk(), &loss(TrainOnEos::Last), &[" ok\n", second]);
    let mut spelled = talk();
    spelled[1] = Message::user("What does <|im_end|> do?");
    let all = [end, end, " ok\n<|im_end|>", end, last];
    trains(CHATML, &spelled, &loss(TrainOnEos::All), &all);
}

#[test]
fn a_message_may_be_trained_in_part() {
    let detail = |begin: usize, end: usize, train: bool| serde_json::json!({"begin_offset": begin, "end_offset": end, "train": train});
    let messages = said(serde_json::json!([
        {"role": "user", "content": "Où est-elle ?"},
        {"role": "assistant", "content": " Là : où ? Ici.\n",
         "train_detail": [detail(0, 2, true), detail(3, 9, false), detail(11, 13, true)]},
        {"role": "user", "content": "Oui", "train_detail": [detail(0, 1, true)]},
        {"role": "assistant", "content": "Non", "train_detail": [detail(0, 2, false)]},
    ]));
    // Blanks around a text may be the template's own; a turn is closed even if nothing in it is
    // trained, as axolotl has it.
    let end = "<|im_end|>";
    let expected = ["Là", "Ici", end, "Ou", end, end];
    let trimming = CHATML.replace("m.content", "m.content | trim");
    for source in [CHATML, TAGGED, &trimming] {
        trains(source, &messages, &LossOptions::default(), &expected);
    }

    // Beyond the text there is nothing, and weight 0 says more than any part.
    let mut beyond = messages;
    beyond[1].train_detail.as_mut().unwrap()[2].end_offset = usize::MAX;
    beyond[2].weight = Some(0.0);
    trains(
        CHATML,
        &beyond,
        &LossOptions::default(),
        &["Là", "Ici.", end, end],
    );

    // No parts at all are none to train, unless the message is.
    beyond[1].train_detail = Some(Vec::new());
    trains(CHATML, &beyond, &LossOptions::default(), &[end]);
    beyond[1].weight = Some(1.0);
    let whole = " Là : où ? Ici.\n<|im_end|>";
    trains(CHATML, &beyond, &LossOptions::default(), &[whole, end]);
}

#[test]
fn thoughts_may_be_parts_too() {
    let messages = said(serde_json::json!([
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<think>Hm</think>\n\nYes", "train_detail": [
            {"begin_offset": 7, "end_offset": 8, "train": true},
            {"begin_offset": 19, "end_offset": 21},
        ]},
    ]));
    let end = "<|im_end|>";
    trains(
        CHATML,
        &messages,
        &LossOptions::default(),
        &["Hm", "Yes<|im_end|>"],
    );
    let without = CHATML.replace("m.content", "m.content.split('</think>')[-1] | trim");
    trains(
        &without,
        &messages,
        &LossOptions::default(),
        &["Yes<|im_end|>"],
    );
    let nobody = LossOptions {
        roles_to_train: Vec::new(),
        ..LossOptions::default()
    };
    trains(CHATML, &messages, &nobody, &["Hm", end]);
}

#[test]
fn a_tag_that_closes_several_turns_is_its_messages() {
    let source = TAGGED.replace(
        "{% endfor %}{% if",
        "{% endfor %}~{% generation %}<eos>{% endgeneration %}{% if",
    );
    let (first, second) = (" ok\n<|im_end|>", "ok<|im_end|>");
    trains(
        &source,
        &talk(),
        &LossOptions::default(),
        &[first, second, "<eos>"],
    );
    let mut silent = talk();
    silent[4].weight = Some(0.0);
    trains(&source, &silent, &LossOptions::default(), &[first]);
}

#[test]
fn a_part_that_cannot_be_placed_is_refused() {
    let mut messages = talk();
    messages[4].train_detail = Some(vec![TrainDetail {
        begin_offset: 0,
        end_offset: 0,
        train: Some(true),
    }]);
    for source in [
        MARKED.to_owned(),
        CHATML.replace("m.content", "m.content | upper"),
    ] {
        let error = spans(&source, &messages).unwrap_err();
        assert!(
            error.to_string().contains("of message 4 cannot be located"),
            "{error}"
        );
    }
}
