//! Which bytes of a rendered conversation the assistant wrote.
//!
//! Three ways, tried in order. `{% generation %}` tags say it. Else every
//! string of the conversation is rendered between sentinels, and where taking
//! the sentinels out gives the plain render, what stood between them is the
//! message. Else the turns' own markers, learnt by rendering probes, delimit
//! them. A conversation that none of these explains is rejected.

use std::ops::Range;

use crate::error::{Rejection, Result};
use crate::message::{Conversation, Message, Role};
use crate::template::{ChatTemplate, RenderOptions, Strings};

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

/// What surrounds an assistant's turn, learnt from probes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TurnMarkers {
    /// What a turn may open with, longest first.
    pub(crate) openings: Vec<String>,
    /// What a turn may end with.
    pub(crate) ends: Vec<String>,
}

impl TurnMarkers {
    /// Renders probes. `special` are the control tokens, `ends` the ones known
    /// to end generation.
    pub(crate) fn probe<'a>(
        template: &ChatTemplate,
        special: impl Iterator<Item = &'a str>,
        mut ends: Vec<String>,
    ) -> TurnMarkers {
        let prompt = Probe::render(template, &["user"], true);
        let asked = Probe::render(template, &["user"], false);
        let answered = Probe::render(template, &["user", "assistant"], false);
        let resumed = Probe::render(template, &["user", "assistant", "user"], false);

        let mut openings = Vec::new();
        if let (Some(prompt), Some(asked)) = (&prompt, &asked)
            && let Some(opening) = prompt.text.strip_prefix(&asked.text)
        {
            openings.push(opening.to_owned());
            for turn in [&answered, &resumed].into_iter().flatten() {
                let common = turn.before_answer(&asked.text).map(|before| {
                    let len = common_prefix(opening, before);
                    opening[..len].to_owned()
                });
                openings.extend(common);
            }
        }
        openings.retain(|opening| !opening.trim().is_empty());
        openings.sort_by_key(|opening| std::cmp::Reverse(opening.len()));
        openings.dedup();

        let special: Vec<&str> = special.collect();
        let tails = [&resumed, &answered].map(|turn| turn.as_ref().map(Probe::after_answer));
        for tail in tails.iter().flatten() {
            let first = special
                .iter()
                .filter(|token| tail.trim_start().starts_with(**token))
                .max_by_key(|token| token.len());
            ends.extend(first.map(|token| (*token).to_owned()));
        }
        if let (true, [Some(resumed), Some(answered)]) = (ends.is_empty(), tails) {
            let common = resumed[..common_prefix(resumed, answered)].trim();
            ends.push(common.to_owned());
        }
        ends.retain(|end| !end.is_empty());
        ends.sort();
        ends.dedup();
        TurnMarkers { openings, ends }
    }

    /// The end of the first end marker in a range of the text.
    fn end_in(&self, text: &str, range: Range<usize>) -> Option<usize> {
        let gap = &text[range.clone()];
        let found = self
            .ends
            .iter()
            .filter_map(|end| Some((gap.find(end.as_str())?, std::cmp::Reverse(end.len()))))
            .min();
        found.map(|(at, len)| range.start + at + len.0)
    }

    /// Where a turn that reaches `range.end` begins: after its opening, if
    /// that is in the range.
    fn start_in(&self, text: &str, range: Range<usize>) -> Option<usize> {
        let gap = &text[range.clone()];
        self.openings
            .iter()
            .find_map(|opening| Some(range.start + gap.rfind(opening.as_str())? + opening.len()))
    }
}

/// A conversation made up to see how a template lays out turns.
struct Probe {
    text: String,
    answer: Option<Range<usize>>,
}

impl Probe {
    fn render(
        template: &ChatTemplate,
        roles: &[&str],
        add_generation_prompt: bool,
    ) -> Option<Probe> {
        const QUESTION: &str = "probequestion";
        const ANSWER: &str = "probeanswer";

        let messages: Vec<Message> = roles
            .iter()
            .map(|&role| match role {
                "assistant" => Message::assistant(ANSWER),
                _ => Message::user(QUESTION),
            })
            .collect();
        let options = RenderOptions {
            add_generation_prompt,
            ..RenderOptions::default()
        };
        let text = template
            .render(&Conversation::new(messages), &options)
            .ok()?;
        let answer = text.find(ANSWER).map(|at| at..at + ANSWER.len());
        Some(Probe { text, answer })
    }

    /// From where the text leaves `asked` to the answer.
    fn before_answer(&self, asked: &str) -> Option<&str> {
        self.text.get(asked.len()..self.answer.clone()?.start)
    }

    fn after_answer(&self) -> &str {
        let end = self
            .answer
            .clone()
            .map_or(self.text.len(), |answer| answer.end);
        &self.text[end..]
    }
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices()
        .zip(b.chars())
        .find(|&((_, a), b)| a != b)
        .map_or(a.len().min(b.len()), |((at, _), _)| at)
}

/// Marks strings on their way into a template, each by a private-use character
/// of its own.
#[derive(Debug)]
pub(crate) struct Sentinels {
    base: u32,
    owners: Vec<usize>,
}

/// A marked string found in a render.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    message: usize,
    range: Range<usize>,
}

const PLANES: [u32; 2] = [0xF_0000, 0x10_0000];
const SENTINELS: usize = 0xFFFE;

impl Sentinels {
    /// Sentinels that the text does not contain; `None` if it contains
    /// characters of both private planes.
    pub(crate) fn unlike(text: &str) -> Option<Sentinels> {
        let bytes = text.as_bytes();
        let has_plane = |base: u32| match base {
            0xF_0000 => memchr::memchr_iter(0xF3, bytes).any(|at| bytes[at + 1] >= 0xB0),
            _ => memchr::memchr(0xF4, bytes).is_some(),
        };
        let base = PLANES.into_iter().find(|&base| !has_plane(base))?;
        Some(Sentinels {
            base,
            owners: Vec::new(),
        })
    }

    /// The text with its core between sentinels. What a template may trim, or
    /// cut off as thoughts, stays outside.
    pub(crate) fn wrap(&mut self, message: usize, text: &str) -> String {
        let core = core(text);
        let sentinel = u32::try_from(self.owners.len())
            .ok()
            .filter(|_| self.owners.len() < SENTINELS && !core.is_empty())
            .and_then(|index| char::from_u32(self.base + index));
        let Some(sentinel) = sentinel else {
            return text.to_owned();
        };
        self.owners.push(message);
        let mut marked = String::with_capacity(text.len() + 8);
        marked.push_str(&text[..core.start]);
        marked.push(sentinel);
        marked.push_str(&text[core.clone()]);
        marked.push(sentinel);
        marked.push_str(&text[core.end..]);
        marked
    }

    /// The marked strings, in order, if the render without sentinels is `plain`.
    fn verify(&self, marked: &str, plain: &str) -> Option<Vec<Mark>> {
        let lead = if self.base == PLANES[0] { 0xF3 } else { 0xF4 };
        let mut marks: Vec<Mark> = Vec::with_capacity(self.owners.len());
        let mut open: Option<(char, usize)> = None;
        let (mut from, mut written) = (0, 0);
        for at in memchr::memchr_iter(lead, marked.as_bytes()) {
            let sentinel = marked[at..].chars().next()?;
            let owner = (sentinel as u32).checked_sub(self.base)?;
            let message = *self.owners.get(owner as usize)?;
            let piece = &marked[from..at];
            if !plain[written..].starts_with(piece) {
                return None;
            }
            written += piece.len();
            from = at + sentinel.len_utf8();
            open = match open {
                None => Some((sentinel, written)),
                Some((opened, start)) if opened == sentinel => {
                    marks.push(Mark {
                        message,
                        range: start..written,
                    });
                    None
                }
                Some(_) => return None,
            };
        }
        (open.is_none() && plain[written..] == marked[from..]).then_some(marks)
    }
}

/// What of a text a template hardly touches: without surrounding whitespace,
/// and after the thoughts if it begins with some.
fn core(text: &str) -> Range<usize> {
    let thoughts = text.rfind(THINK_END).map_or(0, |at| at + THINK_END.len());
    let end = text.trim_end().len().max(thoughts);
    let start = end - text[thoughts..end].trim_start().len();
    start..end
}

const THINK_END: &str = "</think>";

/// Renders a conversation and finds what of it is trained.
pub(crate) fn render_spans(
    template: &ChatTemplate,
    markers: &TurnMarkers,
    conversation: &Conversation,
    options: &RenderOptions,
) -> Result<Rendered, Rejection> {
    let tagged = template.has_generation_tags(conversation, options);
    let (text, generated) = match tagged {
        true => {
            let tagged = template.render_tagged(conversation, options)?;
            (tagged.text, tagged.spans)
        }
        false => (template.render(conversation, options)?, Vec::new()),
    };
    let marks = find_marks(template, conversation, options, &text);
    check_preserved(conversation, &text, marks.as_deref())?;
    let (turns, source) = if !generated.is_empty() {
        (
            owned(generated, conversation, marks.as_deref())?,
            SpanSource::Generation,
        )
    } else if let Some(marks) = &marks {
        (
            marked_turns(conversation, markers, &text, marks),
            SpanSource::Sentinels,
        )
    } else {
        (
            delimited_turns(conversation, markers, &text)?,
            SpanSource::Markers,
        )
    };
    Ok(Rendered {
        text,
        spans: turns,
        source,
    })
}

/// The strings of the conversation in the rendered text, if sentinels can
/// tell.
pub(crate) fn find_marks(
    template: &ChatTemplate,
    conversation: &Conversation,
    options: &RenderOptions,
    text: &str,
) -> Option<Vec<Mark>> {
    let mut sentinels = Sentinels::unlike(text)?;
    let marked = template
        .render_with(conversation, options, Strings::Marked(&mut sentinels))
        .ok()?;
    sentinels.verify(&marked, text)
}

/// That every message's content reached the text.
fn check_preserved(
    conversation: &Conversation,
    text: &str,
    marks: Option<&[Mark]>,
) -> Result<(), Rejection> {
    for (index, message) in conversation.messages.iter().enumerate() {
        let mut strings = message
            .content
            .texts()
            .filter(|text| !core(text).is_empty());
        let preserved = match marks {
            Some(marks) => {
                let expected = strings.count();
                let found = marks.iter().filter(|mark| mark.message == index).count();
                found >= expected
            }
            None => strings.all(|string| contains(text, &string[core(string)])),
        };
        if !preserved {
            return Err(Rejection::ContentDropped {
                index,
                role: message.role.to_string(),
            });
        }
    }
    Ok(())
}

/// As it is, or escaped inside a JSON string.
fn contains(text: &str, string: &str) -> bool {
    let escaped = || serde_json::Value::from(string).to_string();
    text.contains(string) || text.contains(escaped().trim_matches('"'))
}

/// Drops the spans of messages that carry no weight.
fn owned(
    spans: Vec<Range<usize>>,
    conversation: &Conversation,
    marks: Option<&[Mark]>,
) -> Result<Vec<Range<usize>>, Rejection> {
    let silent = |message: &Message| message.role == Role::Assistant && !message.is_trained();
    let Some(first) = conversation.messages.iter().position(silent) else {
        return Ok(spans);
    };
    let marks = marks.ok_or(Rejection::AssistantNotLocated { index: first })?;
    let is_silent = |span: &Range<usize>| {
        marks
            .iter()
            .filter(|mark| span.start <= mark.range.start && mark.range.end <= span.end)
            .any(|mark| silent(&conversation.messages[mark.message]))
    };
    Ok(spans.into_iter().filter(|span| !is_silent(span)).collect())
}

/// Each trained message from its turn's opening to its turn's end.
fn marked_turns(
    conversation: &Conversation,
    markers: &TurnMarkers,
    text: &str,
    marks: &[Mark],
) -> Vec<Range<usize>> {
    let mut turns = Vec::new();
    let mut at = 0;
    let mut previous_end = 0;
    while let Some(mark) = marks.get(at) {
        let message = mark.message;
        let run = marks[at..]
            .iter()
            .take_while(|mark| mark.message == message)
            .count();
        let last = &marks[at + run - 1];
        let next_start = marks
            .get(at + run)
            .map_or(text.len(), |mark| mark.range.start);
        let mut end = last.range.end;
        if conversation.messages[message].is_trained() {
            let start = markers
                .start_in(text, previous_end..mark.range.start)
                .unwrap_or(mark.range.start);
            end = markers.end_in(text, end..next_start).unwrap_or(end);
            turns.push(start..end);
        }
        previous_end = end;
        at += run;
    }
    turns
}

/// The stretches between an opening and an end marker, if there is one for
/// each assistant message and it holds the message.
fn delimited_turns(
    conversation: &Conversation,
    markers: &TurnMarkers,
    text: &str,
) -> Result<Vec<Range<usize>>, Rejection> {
    let messages = || conversation.messages.iter().enumerate();
    let assistants: Vec<(usize, &Message)> = messages()
        .filter(|(_, message)| message.role == Role::Assistant)
        .collect();
    let lost = |index: usize| Rejection::AssistantNotLocated { index };
    let Some(&(first, _)) = assistants.first() else {
        return Ok(Vec::new());
    };
    let opening = markers
        .openings
        .iter()
        .find(|opening| text.matches(opening.as_str()).count() == assistants.len())
        .ok_or_else(|| lost(first))?;
    let starts: Vec<usize> = text
        .match_indices(opening.as_str())
        .map(|(at, _)| at + opening.len())
        .collect();
    let mut turns = Vec::new();
    for (turn, &(index, message)) in assistants.iter().enumerate() {
        let start = starts[turn];
        let limit = starts
            .get(turn + 1)
            .map_or(text.len(), |next| next - opening.len());
        let end = markers
            .end_in(text, start..limit)
            .ok_or_else(|| lost(index))?;
        let held = |string: &str| contains(&text[start..end], &string[core(string)]);
        if !message.content.texts().all(held) {
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
        let markers = TurnMarkers::probe(&template, special.into_iter(), Vec::new());
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
