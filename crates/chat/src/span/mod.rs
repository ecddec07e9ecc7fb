//! Which bytes of a rendered conversation the assistant wrote.
//!
//! Three ways, tried in order. `{% generation %}` tags say it. Else every
//! string of the conversation is rendered between sentinels, and where taking
//! the sentinels out gives the plain render, what stood between them is the
//! message. Else the turns' own markers, learnt by rendering probes, delimit
//! them. A conversation that none of these explains is rejected.

mod detail;
mod loss;
mod markers;
mod sentinels;

use std::ops::Range;

use crate::error::Rejection;
use crate::message::{Conversation, Message, Role};
use crate::template::{ChatTemplate, RenderOptions};
use loss::Turn;
pub use loss::{LossOptions, TrainOnEos};
pub(crate) use markers::TurnMarkers;
use sentinels::core;
pub(crate) use sentinels::{Mark, Marks, Origin, Sentinels};

/// A rendered conversation and what of it is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges of the text that the loss counts: what the trained messages say, with the
    /// ends of turns that [`LossOptions::train_on_eos`] asks for; ascending and apart.
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
    loss: &LossOptions,
    options: &RenderOptions,
) -> Result<Rendered, Rejection> {
    let tagged = template.render_tagged(conversation, options)?;
    let text = tagged.text;
    let marks = Marks::find(template, conversation, options, &text);
    check_preserved(conversation, &text, marks.as_ref())?;
    let marks = marks.map(|marks| marks.written);
    let find = Find {
        conversation,
        loss,
        markers,
        text: &text,
    };
    let (turns, source) = match (&tagged.spans[..], &marks) {
        ([], None) => (find.delimited_turns()?, SpanSource::Markers),
        ([], Some(marks)) => (find.marked_turns(marks, |_| true)?, SpanSource::Sentinels),
        (spans, marks) => (
            find.tagged_turns(spans, marks.as_deref())?,
            SpanSource::Generation,
        ),
    };
    let every_end = || find.every_end(marks.as_deref().unwrap_or_default());
    Ok(Rendered {
        spans: loss::spans(turns, loss.train_on_eos, every_end),
        source,
        text,
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

/// The search for the trained messages of a render.
struct Find<'a> {
    conversation: &'a Conversation,
    loss: &'a LossOptions,
    markers: &'a TurnMarkers,
    text: &'a str,
}

impl Find<'_> {
    /// Whether a message is trained as templates and markers see it: an assistant's, and whole.
    fn is_plain(&self, message: &Message) -> bool {
        message.role == Role::Assistant && message.details().is_none() && self.loss.trains(message)
    }

    /// Whether only the marks of a message's strings can tell what is trained of it.
    fn needs_marks(&self, message: &Message) -> bool {
        self.loss.trains(message) && !self.is_plain(message)
    }

    /// The tags' spans. Assistant messages that are not trained whole are taken out of them, and
    /// what is trained of other messages is found by its marks.
    fn tagged_turns(
        &self,
        spans: &[Range<usize>],
        marks: Option<&[Mark]>,
    ) -> Result<Vec<Turn>, Rejection> {
        let messages = &self.conversation.messages;
        let is_odd = |message: &Message| {
            self.needs_marks(message)
                || (message.role == Role::Assistant && !self.is_plain(message))
        };
        let marks = match (messages.iter().position(is_odd), marks) {
            (None, _) => &[][..],
            (Some(_), Some(marks)) => marks,
            (Some(index), None) => return Err(Rejection::NotLocated { index }),
        };
        // The marks in a span, or else the one before it: a span may hold a turn's end alone.
        let of = |span: &Range<usize>| {
            let from = marks.partition_point(|mark| mark.range.end <= span.start);
            let to = marks.partition_point(|mark| mark.range.start < span.end);
            &marks[if from < to {
                from
            } else {
                from.saturating_sub(1)
            }..to]
        };
        let is_kept =
            |span: &&Range<usize>| !of(span).iter().any(|mark| is_odd(&messages[mark.message]));
        let kept = spans.iter().filter(is_kept);
        let mut turns: Vec<Turn> = kept.map(|span| self.tagged_turn(span)).collect();
        if messages.iter().any(|message| self.needs_marks(message)) {
            turns.extend(self.marked_turns(marks, |message| self.needs_marks(message))?);
            turns.sort_by_key(|turn| turn.said.first().map(|said| said.start));
        }
        Ok(turns)
    }

    /// A tag's span, whether its turn's end is in it or follows.
    fn tagged_turn(&self, span: &Range<usize>) -> Turn {
        let end = self.markers.end_at(self.text, span.end);
        let inside = self.markers.last_in(&self.text[span.clone()]);
        let said_to = inside.map_or(span.end, |at| span.start + at);
        Turn {
            said: std::iter::once(span.start..said_to).collect(),
            end: (said_to < end).then_some(said_to..end),
        }
    }

    /// Each trained message that `wanted` wants, from its turn's opening to its turn's end.
    fn marked_turns(
        &self,
        marks: &[Mark],
        wanted: impl Fn(&Message) -> bool,
    ) -> Result<Vec<Turn>, Rejection> {
        let mut turns = Vec::new();
        let mut previous_end = 0;
        for (at, run) in runs(marks) {
            let index = run[0].message;
            let message = &self.conversation.messages[index];
            let last = run[run.len() - 1].range.end;
            if !self.loss.trains(message) || !wanted(message) {
                previous_end = last;
                continue;
            }
            let lost = || Rejection::NotLocated { index };
            let next = marks.get(at + run.len());
            let limit = next.map_or(self.text.len(), |mark| mark.range.start);
            let (said_to, end) = self.closing(message, last..limit).ok_or_else(lost)?;
            let said = match message.details() {
                None => {
                    let from = self.opening(message, previous_end..run[0].range.start);
                    std::iter::once(from..said_to).collect()
                }
                Some(details) => {
                    let otherwise = self.loss.trains_otherwise(message);
                    detail::trained(message, details, otherwise, self.text, run).ok_or_else(lost)?
                }
            };
            previous_end = end.as_ref().map_or(said_to, |end| end.end);
            turns.push(Turn { said, end });
        }
        Ok(turns)
    }

    /// Where a turn begins whose strings begin where the gap ends.
    fn opening(&self, message: &Message, gap: Range<usize>) -> usize {
        let opened = match message.role {
            Role::Assistant => self.markers.start_in(self.text, gap.clone()),
            _ => None,
        };
        opened.unwrap_or(gap.end)
    }

    /// Where a turn ends whose strings end where the gap begins, and what closes it there. What
    /// closes a tool call belongs to the turn, so its end must be known.
    fn closing(
        &self,
        message: &Message,
        gap: Range<usize>,
    ) -> Option<(usize, Option<Range<usize>>)> {
        let calls = message.tool_calls.iter().flatten().next().is_some();
        match self.markers.end_in(self.text, gap.clone()) {
            Some(end) => Some((end.start, Some(end))),
            None if gap.end == self.text.len() => {
                let said = self.text[gap.clone()].trim_end().len();
                Some((gap.start + said, None))
            }
            None => (!calls).then_some((gap.start, None)),
        }
    }

    /// The stretches between an opening and an end marker, if there is one for
    /// each assistant message and it holds the message.
    fn delimited_turns(&self) -> Result<Vec<Turn>, Rejection> {
        let messages = &self.conversation.messages;
        if let Some(index) = messages.iter().position(|it| self.needs_marks(it)) {
            return Err(Rejection::NotLocated { index });
        }
        let assistants: Vec<(usize, &Message)> = (messages.iter().enumerate())
            .filter(|(_, message)| message.role == Role::Assistant)
            .collect();
        let lost = |index: usize| Rejection::NotLocated { index };
        let Some(&(first, _)) = assistants.first() else {
            return Ok(Vec::new());
        };
        let text = self.text;
        let count = |opening: &String| text.matches(opening.as_str()).count();
        let opening = (self.markers.openings.iter())
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
            let end = self
                .markers
                .end_in(text, start..limit)
                .ok_or_else(|| lost(index))?;
            if !holds(&text[start..end.end], message) {
                return Err(lost(index));
            }
            if self.loss.trains(message) {
                turns.push(Turn {
                    said: std::iter::once(start..end.start).collect(),
                    end: Some(end),
                });
            }
        }
        Ok(turns)
    }

    /// Every end marker that no message spells.
    fn every_end(&self, marks: &[Mark]) -> Vec<Range<usize>> {
        let spelled = |end: &Range<usize>| {
            let mut marks = marks.iter();
            marks.any(|mark| mark.range.start < end.end && end.start < mark.range.end)
        };
        let mut at = 0;
        let ends = std::iter::from_fn(|| {
            let end = self.markers.end_in(self.text, at..self.text.len())?;
            at = end.end;
            Some(end)
        });
        ends.filter(|end| !spelled(end)).collect()
    }
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

#[cfg(test)]
mod tests;
