//! Private-use characters that follow a conversation's strings through a
//! template.

use std::ops::Range;

use crate::message::Conversation;
use crate::template::{ChatTemplate, RenderOptions, Strings};

/// Where a marked string comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The message's place.
    pub(crate) message: usize,
    /// Whether the text may begin with thoughts that templates cut off.
    pub(crate) thinks: bool,
    /// Whether a template must write it. Thoughts it may leave out.
    pub(crate) required: bool,
}

/// Marks strings on their way into a template, each by a character of its own.
#[derive(Debug)]
pub(crate) struct Sentinels {
    base: u32,
    origins: Vec<Origin>,
}

/// The marked strings of a render, in the order they were written.
#[derive(Debug)]
pub(crate) struct Marks {
    pub(crate) written: Vec<Mark>,
    /// The message of the first required string that was not written.
    pub(crate) dropped: Option<usize>,
}

/// A marked string in a render.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) message: usize,
    pub(crate) range: Range<usize>,
}

/// The supplementary private-use planes, with the first byte of their UTF-8.
const PLANES: [(u32, u8); 2] = [(0xF_0000, 0xF3), (0x10_0000, 0xF4)];
/// Private-use characters in a plane.
const PER_PLANE: usize = 0xFFFE;
const THINK_END: &str = "</think>";

impl Marks {
    /// Renders once more, with sentinels. `None` if the render without them
    /// is not `text`, because the template looked into the strings.
    pub(crate) fn find(
        template: &ChatTemplate,
        conversation: &Conversation,
        options: &RenderOptions,
        text: &str,
    ) -> Option<Marks> {
        let mut sentinels = Sentinels::unlike(text)?;
        let strings = Strings::Marked(&mut sentinels);
        let marked = template.render_with(conversation, options, strings).ok()?;
        sentinels.compare(&marked, text)
    }
}

impl Sentinels {
    /// Sentinels that the text does not contain; `None` if it has characters
    /// of both planes.
    fn unlike(text: &str) -> Option<Sentinels> {
        let bytes = text.as_bytes();
        // The lower half of what 0xF3 leads is an ordinary plane.
        let is_private = |at: usize, lead: u8| lead == 0xF4 || bytes[at + 1] >= 0xB0;
        let unused = |&&(_, lead): &&(u32, u8)| {
            !memchr::memchr_iter(lead, bytes).any(|at| is_private(at, lead))
        };
        let &(base, _) = PLANES.iter().find(unused)?;
        Some(Sentinels {
            base,
            origins: Vec::new(),
        })
    }

    /// The text with its core between two sentinels.
    pub(crate) fn wrap(&mut self, origin: Origin, text: &str) -> String {
        let core = core(text, origin.thinks);
        let index = Some(self.origins.len()).filter(|&index| index < PER_PLANE && !core.is_empty());
        let sentinel = index.and_then(|index| char::from_u32(self.base + index as u32));
        let Some(sentinel) = sentinel else {
            return text.to_owned();
        };
        self.origins.push(origin);
        let mut marked = String::with_capacity(text.len() + 2 * sentinel.len_utf8());
        marked.push_str(&text[..core.start]);
        marked.push(sentinel);
        marked.push_str(&text[core.clone()]);
        marked.push(sentinel);
        marked.push_str(&text[core.end..]);
        marked
    }

    /// The marks, if what is left of the marked render without them is `plain`.
    fn compare(&self, marked: &str, plain: &str) -> Option<Marks> {
        let (_, lead) = PLANES.into_iter().find(|&(base, _)| base == self.base)?;
        let mut written = Vec::with_capacity(self.origins.len());
        let mut seen = vec![false; self.origins.len()];
        let mut open: Option<(usize, usize)> = None;
        let (mut from, mut at_plain) = (0, 0);
        for at in memchr::memchr_iter(lead, marked.as_bytes()) {
            let sentinel = marked[at..].chars().next()?;
            let Some(index) = (sentinel as u32).checked_sub(self.base) else {
                continue; // of the ordinary plane that shares the first byte
            };
            let index = index as usize;
            let origin = self.origins.get(index)?;
            let piece = &marked[from..at];
            if !plain[at_plain..].starts_with(piece) {
                return None;
            }
            at_plain += piece.len();
            from = at + sentinel.len_utf8();
            open = match open {
                None => Some((index, at_plain)),
                Some((opened, start)) if opened == index => {
                    seen[index] = true;
                    written.push(Mark {
                        message: origin.message,
                        range: start..at_plain,
                    });
                    None
                }
                Some(_) => return None,
            };
        }
        let same = open.is_none() && plain[at_plain..] == marked[from..];
        let dropped = || {
            let unseen = seen.iter().zip(&self.origins).filter(|(seen, _)| !*seen);
            let mut missing = unseen.filter(|(_, origin)| origin.required);
            missing.next().map(|(_, origin)| origin.message)
        };
        same.then(|| Marks {
            written,
            dropped: dropped(),
        })
    }
}

/// The part of a text that templates hardly touch: without the whitespace
/// around it, and after the thoughts, if it may begin with some.
pub(super) fn core(text: &str, thinks: bool) -> Range<usize> {
    let thoughts = match text.rfind(THINK_END) {
        Some(at) if thinks => at + THINK_END.len(),
        _ => 0,
    };
    let answer = match text[thoughts..].trim().is_empty() {
        true => text,
        false => &text[thoughts..],
    };
    let before = text.len() - answer.len();
    let start = before + (answer.len() - answer.trim_start().len());
    start..start + answer.trim().len()
}

#[cfg(test)]
mod tests {
    use super::core;

    #[track_caller]
    fn check(text: &str, thinks: bool, expected: &str) {
        assert_eq!(&text[core(text, thinks)], expected);
    }

    #[test]
    fn the_core_is_what_templates_leave_alone() {
        check("", true, "");
        check(" \n", true, "");
        check("\n a b ", true, "a b");
        check("<think>\nr\n</think>\n\nb ", true, "b");
        check(
            "<think>\nr\n</think>\n\nb ",
            false,
            "<think>\nr\n</think>\n\nb",
        );
        check("<think>only</think> ", true, "<think>only</think>");
    }
}
