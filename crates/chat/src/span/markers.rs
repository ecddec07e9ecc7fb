//! What a template writes before and after an assistant's turn.

use std::ops::Range;

use crate::message::{Conversation, Message, Role, ToolCall};
use crate::template::{ChatTemplate, LocalTime, RenderOptions};

/// What surrounds an assistant's turn, learnt by rendering probes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TurnMarkers {
    /// What a turn may open with, longest first: the generation prompt, and
    /// as much of it as past turns share.
    pub(super) openings: Vec<String>,
    /// What a turn may end with.
    pub(crate) ends: Vec<String>,
}

impl TurnMarkers {
    /// Learns the markers of a template. `special` are the control tokens,
    /// `ends` those known to end generation.
    pub(crate) fn learn<'a>(
        template: &ChatTemplate,
        special: impl Iterator<Item = &'a str>,
        mut ends: Vec<String>,
    ) -> TurnMarkers {
        let special: Vec<&str> = special.collect();
        let answered = Probe::render(template, &["user", "assistant"], false);
        let resumed = Probe::render(template, &["user", "assistant", "user"], false);
        ends.extend(learn_end(answered.as_ref(), resumed.as_ref(), &special));
        let called = Probe::render(template, &["user", "caller"], false);
        let after_call = called.as_ref().and_then(Probe::after_call);
        ends.extend(after_call.map(|tail| last_specials(tail, &special).to_owned()));
        ends.retain(|end| !end.is_empty());
        ends.sort();
        ends.dedup();

        let asked = Probe::render(template, &["user"], false);
        let prompt = Probe::render(template, &["user"], true);
        let openings = match (asked, prompt) {
            (Some(asked), Some(prompt)) => {
                // Some templates close an unanswered text, so that the prompt
                // does not go on from its very end.
                let shared = shared_tags(&asked.text, &prompt.text);
                let turns = [&answered, &resumed];
                let past = turns.into_iter().flatten();
                learn_openings(
                    &prompt.text[shared..],
                    past.filter_map(|turn| turn.before_answer(shared)),
                )
            }
            _ => Vec::new(),
        };
        TurnMarkers { openings, ends }
    }

    /// The first end marker in a range of the text.
    pub(super) fn end_in(&self, text: &str, range: Range<usize>) -> Option<Range<usize>> {
        let gap = &text[range.clone()];
        let found = self.ends.iter().filter_map(|end| {
            let at = gap.find(end.as_str())?;
            Some((at, std::cmp::Reverse(end.len())))
        });
        let (at, std::cmp::Reverse(len)) = found.min()?;
        let start = range.start + at;
        Some(start..start + len)
    }

    /// Where the turn that reaches the range's end begins: after its opening,
    /// if that is in the range.
    pub(super) fn start_in(&self, text: &str, range: Range<usize>) -> Option<usize> {
        let gap = &text[range.clone()];
        self.openings.iter().find_map(|opening| {
            let at = gap.rfind(opening.as_str())?;
            Some(range.start + at + opening.len())
        })
    }

    /// How far an end marker reaches that begins exactly at `at`.
    pub(super) fn end_at(&self, text: &str, at: usize) -> usize {
        let tail = &text[at..];
        let found = self
            .ends
            .iter()
            .filter(|end| tail.starts_with(end.as_str()));
        at + found.map(String::len).max().unwrap_or(0)
    }

    /// Where the end marker begins that a text ends with, blanks aside.
    pub(super) fn last_in(&self, text: &str) -> Option<usize> {
        let text = text.trim_end();
        let found = self.ends.iter().filter(|end| text.ends_with(end.as_str()));
        found.map(|end| text.len() - end.len()).min()
    }
}

/// What follows both a last and an earlier answer, as far as it is control
/// tokens; text, where there are none.
fn learn_end(
    answered: Option<&Probe>,
    resumed: Option<&Probe>,
    special: &[&str],
) -> Option<String> {
    let (last, earlier) = (answered?.after_answer()?, resumed?.after_answer()?);
    let both = earlier[..common_prefix(earlier, last)].trim();
    let tokens = special_run(both, special);
    let first = special_run(earlier.trim_start(), special);
    Some(match (tokens, first) {
        ("", "") => both.to_owned(),
        // The last turn may be left open; an earlier one shows its first token.
        ("", tokens) => longest_special(tokens, special).to_owned(),
        (tokens, _) => tokens.to_owned(),
    })
}

/// The control tokens a text begins with.
fn special_run<'a>(text: &'a str, special: &[&str]) -> &'a str {
    let mut rest = text;
    loop {
        match longest_special(rest, special).len() {
            0 => return &text[..text.len() - rest.len()],
            len => rest = &rest[len..],
        }
    }
}

/// The control tokens a text ends with, whitespace aside.
fn last_specials<'a>(text: &'a str, special: &[&str]) -> &'a str {
    let text = text.trim_end();
    let mut rest = text;
    while let Some(token) = special.iter().find(|token| rest.ends_with(**token)) {
        rest = &rest[..rest.len() - token.len()];
    }
    &text[rest.len()..]
}

/// The longest control token a text begins with.
fn longest_special<'a>(text: &'a str, special: &[&str]) -> &'a str {
    let found = special.iter().filter(|token| text.starts_with(**token));
    &text[..found.map(|token| token.len()).max().unwrap_or(0)]
}

/// The generation prompt, and what past turns share of it.
fn learn_openings<'a>(prompt: &str, past: impl Iterator<Item = &'a str>) -> Vec<String> {
    let shared = past.map(|before| {
        let len = shared_tags(prompt, before);
        prompt[..len].to_owned()
    });
    let mut openings: Vec<String> = shared.collect();
    openings.push(prompt.to_owned());
    openings.retain(|opening| !opening.trim().is_empty());
    openings.sort_by_key(|opening| std::cmp::Reverse(opening.len()));
    openings.dedup();
    openings
}

const QUESTION: &str = "probequestion";
const ANSWER: &str = "probeanswer";
const CALL: &str = "probecall";

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
        let say = |&role: &&str| match role {
            "assistant" => Message::assistant(ANSWER),
            "caller" => Message {
                role: Role::Assistant,
                tool_calls: Some(vec![ToolCall::new(CALL, "{\"probe\": 1}")]),
                ..Message::default()
            },
            _ => Message::user(QUESTION),
        };
        let messages: Vec<Message> = roles.iter().map(say).collect();
        let options = RenderOptions {
            add_generation_prompt,
            now: Some(LocalTime::from_seconds(0)),
            ..RenderOptions::default()
        };
        let text = template
            .render(&Conversation::new(messages), &options)
            .ok()?;
        let answer = text.find(ANSWER).map(|at| at..at + ANSWER.len());
        Some(Probe { text, answer })
    }

    fn before_answer(&self, from: usize) -> Option<&str> {
        self.text.get(from..self.answer.clone()?.start)
    }

    fn after_answer(&self) -> Option<&str> {
        self.text.get(self.answer.clone()?.end..)
    }

    fn after_call(&self) -> Option<&str> {
        let at = self.text.find(CALL)?;
        self.text.get(at + CALL.len()..)
    }
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices()
        .zip(b.chars())
        .find(|&((_, a), b)| a != b)
        .map_or(a.len().min(b.len()), |((at, _), _)| at)
}

/// The common prefix of `a` and `b`: all of `a`, or else not into the middle
/// of a tag, for `<think>` and `</think>` share no more than `<`.
fn shared_tags(a: &str, b: &str) -> usize {
    let len = common_prefix(a, b);
    match len == a.len() {
        true => len,
        false => {
            let whole = a[..len].rfind(['>', ']', ':', ' ', '\n']);
            whole.map_or(0, |at| at + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::SpecialTokens;

    #[track_caller]
    fn check(source: &str, openings: &[&str], ends: &[&str]) {
        let template = ChatTemplate::new(source, SpecialTokens::default()).unwrap();
        let special = ["<u>", "<a>", "<end>", "<eos>"];
        let markers = TurnMarkers::learn(&template, special.into_iter(), Vec::new());
        assert_eq!(markers.openings, openings);
        assert_eq!(markers.ends, ends);
    }

    #[test]
    fn markers_are_learnt_from_probes() {
        check(
            "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
            &["<a>"],
            &["<end>"],
        );
    }

    #[test]
    fn an_end_can_be_several_tokens_or_plain_text() {
        check(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<end><eos>{% endfor %}",
            &[],
            &["<end><eos>"],
        );
        check(
            "{% for m in messages %}{{ m.content }}\n###\n{% endfor %}",
            &[],
            &["###"],
        );
    }

    #[test]
    fn a_tool_call_may_end_otherwise() {
        check(
            "{% for m in messages %}<{{ m.role[0] }}>{% for c in m.tool_calls %}{{ c.function.name }}<eos>{% else %}{{ m.content }}<end>{% endfor %}{% endfor %}",
            &[],
            &["<end>", "<eos>"],
        );
    }

    #[test]
    fn a_last_turn_may_be_left_open() {
        check(
            "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% if not loop.last %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<end><a>{% endif %}",
            &["<end><a>"],
            &["<end>"],
        );
    }

    #[test]
    fn a_past_turn_shares_whole_tags_of_the_prompt() {
        check(
            "{% for m in messages %}<{{ m.role[0] }}>{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a><think>{% endif %}",
            &["<a><think>", "<a>"],
            &["<u>"],
        );
    }

    #[test]
    fn a_prompt_may_replace_what_closes_the_text() {
        check(
            "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<a>{% else %}<eos>{% endif %}",
            &["<a>"],
            &["<end>"],
        );
    }
}
