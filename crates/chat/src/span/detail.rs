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
    otherwise: bool,
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
    // Blanks around the core may be the template's own. Thoughts before it are not, if they are there.
    let before = &content[..core.start];
    let thoughts = before.len() - before.trim_start().len();
    let from = match rendered[..mark.start].ends_with(before) {
        true => thoughts,
        false => core.start,
    };
    let to = core.end;
    let place = |at: usize| mark.start + at.clamp(from, to) - core.start;

    let mut bytes: Vec<usize> = content.char_indices().map(|(at, _)| at).collect();
    bytes.push(content.len());
    let byte = |offset: usize| bytes[offset.min(bytes.len() - 1)];
    let details = details
        .iter()
        .filter(|detail| detail.train.unwrap_or(otherwise));
    let places = details.map(|detail| {
        place(byte(detail.begin_offset))..place(byte(detail.end_offset.saturating_add(1)))
    });
    Some(joined(places.collect()))
}
