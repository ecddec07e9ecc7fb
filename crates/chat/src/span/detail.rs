//! The trained parts of a message that is not trained whole.

use std::ops::Range;

use super::loss::joined;
use super::{Mark, core};
use crate::message::{Content, Message, Role, TrainDetail};

/// Where the trained parts of a message's text stand in a render, if it wrote the text once and
/// as it is. `marks` are those of the message.
pub(super) fn trained(
    message: &Message,
    details: &[TrainDetail],
    rendered: &str,
    marks: &[Mark],
) -> Option<Vec<Range<usize>>> {
    let Content::Text(content) = &message.content else {
        return None;
    };
    let core = core(content, message.role == Role::Assistant);
    let mut whole = marks
        .iter()
        .filter(|mark| rendered[mark.range.clone()] == content[core.clone()]);
    let mark = &whole.next().filter(|_| whole.next().is_none())?.range;
    // What surrounds the core is there only where the template has not trimmed it.
    let (before, after) = (&content[..core.start], &content[core.end..]);
    let kept_before = rendered[..mark.start].ends_with(before);
    let kept_after = rendered[mark.end..].starts_with(after);
    let from = if kept_before { 0 } else { core.start };
    let to = if kept_after { content.len() } else { core.end };
    let place = |at: usize| mark.start + at.clamp(from, to) - core.start;

    let mut bytes: Vec<usize> = content.char_indices().map(|(at, _)| at).collect();
    bytes.push(content.len());
    let byte = |offset: usize| bytes[offset.min(bytes.len() - 1)];
    let details = details.iter().filter(|detail| detail.train);
    let places = details.map(|detail| {
        place(byte(detail.begin_offset))..place(byte(detail.end_offset.saturating_add(1)))
    });
    Some(joined(places.collect()))
}
