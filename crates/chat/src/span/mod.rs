//! Which bytes of a rendered conversation the assistant wrote.
//!
//! Three ways, tried in order. `{% generation %}` tags say it. Else every
//! string of the conversation is rendered between sentinels, and where taking
//! the sentinels out gives the plain render, what stood between them is the
//! message. Else the turns' own markers, learnt by rendering probes, delimit
//! them. A conversation that none of these explains is rejected.

mod markers;
mod sentinels;

use std::ops::Range;

use crate::error::Rejection;
use crate::message::{Conversation, Message, Role};
use crate::template::{ChatTemplate, RenderOptions};
pub(crate) use markers::TurnMarkers;
use sentinels::core;
pub(crate) use sentinels::{Mark, Marks, Origin, Sentinels};

/// A rendered conversation and what of it is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges of the text that the assistant wrote and the loss counts,
    /// each through the end of its turn; ascending and apart.
    pub spans: Vec<Range<usize>>,
    /// How the spans were found.
    pub source: SpanSource,
}

/// How loss spans were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanSource {
    /// From `{% generation %}` tags.
    Generation,
    /// From sentinels around the messages' strings.
    Sentinels,
    /// From the markers around assistant turns.
    Markers,
}

/// Renders a conversation and finds what of it is trained.
pub(crate) fn render_spans(
    template: &ChatTemplate,
    markers: &TurnMarkers,
    conversation: &Conversation,
    options: &RenderOptions,
) -> Result<Rendered, Rejection> {
    let tagged = template.render_tagged(conversation, options)?;
    let text = tagged.text;
    let marks = Marks::find(template, conversation, options, &text);
    check_preserved(conversation, &text, marks.as_ref())?;
    let (spans, source) = match (&tagged.spans[..], &marks) {
        ([], None) => (
            delimited_turns(conversation, markers, &text)?,
            SpanSource::Markers,
        ),
        ([], Some(marks)) => (
            marked_turns(conversation, markers, &text, &marks.written)?,
            SpanSource::Sentinels,
        ),
        (spans, marks) => (
            tagged_turns(conversation, markers, &text, spans, marks.as_ref())?,
            SpanSource::Generation,
        ),
    };
    Ok(Rendered {
        text,
        spans,
        source,
    })
}

/// That every message's text and tool calls reached the render.
fn check_preserved(
    conversation: &Conversation,
    text: &str,
    marks: Option<&Marks>,
) -> Result<(), Rejection> {
    let dropped = match marks {
        Some(marks) => marks.dropped,
        None => conversation
            .messages
            .iter()
            .position(|message| !holds(text, message)),
    };
    match dropped {
        None => Ok(()),
        Some(index) => Err(Rejection::ContentDropped {
            index,
            role: conversation.messages[index].role.to_string(),
        }),
    }
}

/// Whether a text holds a message's texts and the names of what it calls.
fn holds(text: &str, message: &Message) -> bool {
    let thinks = message.role == Role::Assistant;
    let mut texts = message.content.texts();
    let mut calls = message.tool_calls.iter().flatten();
    texts.all(|string| contains(text, &string[core(string, thinks)]))
        && calls.all(|call| contains(text, &call.function.name))
}

/// As it is, or escaped inside a JSON string.
fn contains(text: &str, string: &str) -> bool {
    let escaped = || serde_json::Value::from(string).to_string();
    text.contains(string) || text.contains(escaped().trim_matches('"'))
}

/// The tags' spans, without those of messages that carry no weight.
fn tagged_turns(
    conversation: &Conversation,
    markers: &TurnMarkers,
    text: &str,
    spans: &[Range<usize>],
    marks: Option<&Marks>,
) -> Result<Vec<Range<usize>>, Rejection> {
    let silent = |message: &Message| message.role == Role::Assistant && !message.is_trained();
    let skipped: Vec<&Mark> = match conversation.messages.iter().position(silent) {
        None => Vec::new(),
        Some(index) => {
            let marks = marks.ok_or(Rejection::AssistantNotLocated { index })?;
            let written = marks.written.iter();
            written
                .filter(|mark| silent(&conversation.messages[mark.message]))
                .collect()
        }
    };
    let kept = spans.iter().filter(|span| {
        !skipped
            .iter()
            .any(|mark| span.start < mark.range.end && mark.range.start < span.end)
    });
    Ok(kept
        .map(|span| span.start..markers.end_at(text, span.end))
        .collect())
}

/// Each trained message from its turn's opening to its turn's end.
fn marked_turns(
    conversation: &Conversation,
    markers: &TurnMarkers,
    text: &str,
    marks: &[Mark],
) -> Result<Vec<Range<usize>>, Rejection> {
    let mut turns = Vec::new();
    let mut previous_end = 0;
    for (at, run) in runs(marks) {
        let index = run[0].message;
        let message = &conversation.messages[index];
        let (first, last) = (run[0].range.start, run[run.len() - 1].range.end);
        previous_end = match message.is_trained() {
            false => last,
            true => {
                let start = markers.start_in(text, previous_end..first).unwrap_or(first);
                let next = marks.get(at + run.len());
                let limit = next.map_or(text.len(), |mark| mark.range.start);
                let end = turn_end(message, markers, text, last..limit)
                    .ok_or(Rejection::AssistantNotLocated { index })?;
                turns.push(start..end);
                end
            }
        };
    }
    Ok(turns)
}

/// Marks of one message that follow each other, with the place of the first.
fn runs(marks: &[Mark]) -> impl Iterator<Item = (usize, &[Mark])> {
    let mut at = 0;
    marks
        .chunk_by(|a, b| a.message == b.message)
        .map(move |run| {
            let start = at;
            at += run.len();
            (start, run)
        })
}

/// Where a turn ends whose strings end where the gap begins. What closes a
/// tool call belongs to the turn, so its end must be known.
fn turn_end(
    message: &Message,
    markers: &TurnMarkers,
    text: &str,
    gap: Range<usize>,
) -> Option<usize> {
    let calls = message.tool_calls.iter().flatten().next().is_some();
    match markers.end_in(text, gap.clone()) {
        Some(end) => Some(end),
        None if gap.end == text.len() => Some(gap.start + text[gap].trim_end().len()),
        None => (!calls).then_some(gap.start),
    }
}

/// The stretches between an opening and an end marker, if there is one for
/// each assistant message and it holds the message.
fn delimited_turns(
    conversation: &Conversation,
    markers: &TurnMarkers,
    text: &str,
) -> Result<Vec<Range<usize>>, Rejection> {
    let messages = conversation.messages.iter().enumerate();
    let assistants: Vec<(usize, &Message)> = messages
        .filter(|(_, message)| message.role == Role::Assistant)
        .collect();
    let lost = |index: usize| Rejection::AssistantNotLocated { index };
    let Some(&(first, _)) = assistants.first() else {
        return Ok(Vec::new());
    };
    let count = |opening: &String| text.matches(opening.as_str()).count();
    let opening = markers
        .openings
        .iter()
        .find(|opening| count(opening) == assistants.len())
        .ok_or_else(|| lost(first))?;
    let openings: Vec<usize> = text
        .match_indices(opening.as_str())
        .map(|(at, _)| at)
        .collect();
    let mut turns = Vec::new();
    for (turn, &(index, message)) in assistants.iter().enumerate() {
        let start = openings[turn] + opening.len();
        let limit = openings.get(turn + 1).copied().unwrap_or(text.len());
        let end = markers
            .end_in(text, start..limit)
            .ok_or_else(|| lost(index))?;
        if !holds(&text[start..end], message) {
            return Err(lost(index));
        }
        if message.is_trained() {
            turns.push(start..end);
        }
    }
    Ok(turns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::SpecialTokens;

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn spans(source: &str, messages: &[Message]) -> Result<(SpanSource, Vec<String>), Rejection> {
        let template = ChatTemplate::new(source, SpecialTokens::default()).unwrap();
        let special = ["<|im_start|>", "<|im_end|>"];
        let markers = TurnMarkers::learn(&template, special.into_iter(), Vec::new());
        let conversation = Conversation::new(messages);
        let rendered = render_spans(
            &template,
            &markers,
            &conversation,
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
}
