//! Where in a text its tokens end, from the tokens' own bytes.
//!
//! The fast engine reports no offsets. It needs none: an added token is
//! found in the text as it is, and between two of them the tokens' bytes are
//! the text's bytes, unless a normalizer (NFC, for most models) changed some.

use super::Vocabulary;

/// The byte end of each token. A token of a stretch that a normalizer changed
/// ends where the bytes before it, or else those after it, still match.
pub(super) fn token_ends(vocabulary: &Vocabulary, text: &str, ids: &[u32]) -> Vec<usize> {
    let mut ends = Vec::with_capacity(ids.len());
    let mut start = 0;
    let mut rest = ids;
    while !rest.is_empty() {
        let count = rest
            .iter()
            .position(|&id| vocabulary.is_added(id))
            .unwrap_or(rest.len());
        let (stretch, after) = rest.split_at(count);
        let (end, next) = match after.first() {
            Some(&added) => {
                let token = vocabulary.bytes(added).unwrap_or_default();
                let near = start
                    + stretch
                        .iter()
                        .map(|&id| vocabulary.width(id))
                        .sum::<usize>();
                find_added(text, start, near, token)
            }
            None => (text.len(), text.len()),
        };
        stretch_ends(vocabulary, text, start..end, stretch, &mut ends);
        if !after.is_empty() {
            ends.push(next);
        }
        start = next;
        rest = after.get(1..).unwrap_or_default();
    }
    ends
}

/// Where the next added token begins and ends. `near` is where it begins if
/// no byte between was changed.
fn find_added(text: &str, start: usize, near: usize, token: &[u8]) -> (usize, usize) {
    let bytes = text.as_bytes();
    let is_at = |at: usize| bytes.get(at..).is_some_and(|tail| tail.starts_with(token));
    let at = if is_at(near) {
        Some(near)
    } else {
        memchr::memmem::find(&bytes[start..], token).map(|at| start + at)
    };
    match at {
        Some(at) => (at, at + token.len()),
        None => (start, start),
    }
}

fn stretch_ends(
    vocabulary: &Vocabulary,
    text: &str,
    range: std::ops::Range<usize>,
    ids: &[u32],
    ends: &mut Vec<usize>,
) {
    let bytes = &text.as_bytes()[range.clone()];
    let written: usize = ids.iter().map(|&id| vocabulary.width(id)).sum();
    let prefix = vocabulary.prefix().len();
    let skipped = if written == bytes.len() {
        0
    } else if written == bytes.len() + prefix {
        prefix
    } else {
        return changed_stretch_ends(vocabulary, bytes, range.start, ids, ends);
    };
    let mut end = range.start;
    let mut skip = skipped;
    for &id in ids {
        let width = vocabulary.width(id);
        let own = width.saturating_sub(skip);
        skip -= width - own;
        end += own;
        ends.push(end);
    }
}

/// A normalizer changed something: where a token's bytes are not the text's,
/// look for the nearest place where the next few match again. The tokens
/// before that place share the gap.
fn changed_stretch_ends(
    vocabulary: &Vocabulary,
    bytes: &[u8],
    offset: usize,
    ids: &[u32],
    ends: &mut Vec<usize>,
) {
    let first = ends.len();
    let mut at = 0;
    let mut index = 0;
    while let Some(&id) = ids.get(index) {
        let token = vocabulary.bytes(id).unwrap_or_default();
        if bytes[at..].starts_with(token) {
            at += token.len();
            ends.push(offset + at);
            index += 1;
            continue;
        }
        let Some((count, again)) = resume(vocabulary, &bytes[at..], &ids[index..]) else {
            break;
        };
        share_gap(
            vocabulary,
            offset + at..offset + at + again,
            &ids[index..index + count],
            ends,
        );
        at += again;
        index += count;
    }
    share_gap(
        vocabulary,
        offset + at..offset + bytes.len(),
        &ids[index..],
        ends,
    );
    if let Some(last) = ends[first..].last_mut() {
        *last = offset + bytes.len();
    }
}

/// How many tokens to give up, and how many bytes, until both match again.
fn resume(vocabulary: &Vocabulary, bytes: &[u8], ids: &[u32]) -> Option<(usize, usize)> {
    const TOKENS: usize = 64; // to give up at most
    const NEEDLE: usize = 4; // tokens that must match in a row
    const WIDER: usize = 3; // NFC shortens a character at most to a third

    let mut given_up = 0;
    for count in 0..ids.len().min(TOKENS) {
        let needle: Vec<u8> = ids[count..]
            .iter()
            .take(NEEDLE)
            .flat_map(|&id| vocabulary.bytes(id).unwrap_or_default())
            .copied()
            .collect();
        let window = bytes.len().min(given_up * WIDER + needle.len() + 16);
        if let Some(at) = memchr::memmem::find(&bytes[..window], &needle) {
            return Some((count, at));
        }
        given_up += vocabulary.width(ids[count]);
    }
    None
}

fn share_gap(
    vocabulary: &Vocabulary,
    gap: std::ops::Range<usize>,
    ids: &[u32],
    ends: &mut Vec<usize>,
) {
    let mut end = gap.start;
    for (index, &id) in ids.iter().enumerate() {
        end = match index + 1 == ids.len() {
            true => gap.end,
            false => gap.end.min(end + vocabulary.width(id)),
        };
        ends.push(end);
    }
}
