//! A template's source as minijinja is given it: what Jinja2 reads differently
//! is rewritten.
//!
//! `{% generation %}` marks what the assistant writes. minijinja has no such
//! tag, but it tells which part of the source wrote which part of the output.
//! So the tag becomes a `{% with %}`, which has the same scope and writes
//! nothing, and the output that comes from its body is the span.
//!
//! `{% for x in y %}` loops over nothing where `y` is none, and Python raises.
//! So `y` passes through a filter that raises.

use std::borrow::Cow;
use std::ops::Range;

use minijinja::OutputSpan;

/// The filter through which the iterable of a loop passes.
pub(super) const ITERATED: &str = "__iterated";

pub(super) struct Rewritten {
    pub(super) source: String,
    /// The bodies of the tags, in the source.
    pub(super) bodies: Vec<Range<usize>>,
}

/// A `{% … %}` or `{{ … }}` of a template's source.
pub(super) struct Tag {
    /// With its delimiters.
    pub(super) range: Range<usize>,
    /// Without delimiters and whitespace control.
    pub(super) inner: Range<usize>,
}

/// Normalises line ends, replaces generation tags and guards loops.
pub(super) fn rewrite(source: &str) -> Rewritten {
    let source = match source.contains('\r') {
        true => Cow::Owned(source.replace("\r\n", "\n").replace('\r', "\n")),
        false => Cow::Borrowed(source),
    };
    let mut rewritten = String::with_capacity(source.len() + source.len() / 16);
    let mut bodies = Vec::new();
    let mut open = Vec::new();
    let mut at = 0;
    for tag in tags(&source) {
        rewritten.push_str(&source[at..tag.inner.start]);
        let inner = &source[tag.inner.clone()];
        match inner.trim() {
            "generation" => {
                rewritten.push_str(" with ");
                open.push(rewritten.len() + tag.range.end - tag.inner.end);
            }
            "endgeneration" => {
                let end = rewritten.len() - (tag.inner.start - tag.range.start);
                bodies.extend(open.pop().map(|start| start..end));
                rewritten.push_str(" endwith ");
            }
            _ => guard_loop(inner, &mut rewritten),
        }
        at = tag.inner.end;
    }
    rewritten.push_str(&source[at..]);
    Rewritten {
        source: rewritten,
        bodies,
    }
}

/// Writes a tag, the iterable of a `for` through the filter.
fn guard_loop(inner: &str, out: &mut String) {
    let Some(iterable) = iterable(inner) else {
        return out.push_str(inner);
    };
    out.push_str(&inner[..iterable.start]);
    out.push('(');
    out.push_str(&inner[iterable.clone()]);
    out.push_str(")|");
    out.push_str(ITERATED);
    out.push_str(&inner[iterable.end..]);
}

/// Where `y` is in `for x in y`, without its condition.
fn iterable(inner: &str) -> Option<Range<usize>> {
    let mut words = outer_words(inner);
    let (_, first) = words.next()?;
    if first != "for" {
        return None;
    }
    let (start, word) = words.find(|&(_, word)| word == "in")?;
    let start = start + word.len();
    let end = words
        .find(|&(_, word)| word == "if" || word == "recursive")
        .map_or(inner.len(), |(at, _)| at);
    let iterable = &inner[start..end];
    let trimmed = iterable.trim();
    let start = start + (iterable.len() - iterable.trim_start().len());
    (!trimmed.is_empty()).then(|| start..start + trimmed.len())
}

/// The words outside strings and brackets, with where they begin.
fn outer_words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let bytes = code.as_bytes();
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii();
    let (mut at, mut depth, mut quote) = (0, 0_i32, None);
    std::iter::from_fn(move || {
        while at < bytes.len() {
            let byte = bytes[at];
            let start = at;
            at += 1;
            match (quote, byte) {
                (None, b'\'' | b'"') => quote = Some(byte),
                (None, b'(' | b'[' | b'{') => depth += 1,
                (None, b')' | b']' | b'}') => depth -= 1,
                (None, _) if is_word(byte) => {
                    while at < bytes.len() && is_word(bytes[at]) {
                        at += 1;
                    }
                    // What follows a dot or a pipe is a name, whatever it spells.
                    let named = code[..start].trim_end().ends_with(['.', '|']);
                    if depth == 0 && !named {
                        return Some((start, &code[start..at]));
                    }
                }
                (Some(_), b'\\') => at += 1,
                (Some(open), _) if byte == open => quote = None,
                _ => {}
            }
        }
        None
    })
}

/// What of the output came from the bodies; adjoining pieces are one span.
pub(super) fn spans(bodies: &[Range<usize>], outputs: &[OutputSpan]) -> Vec<Range<usize>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    for output in outputs {
        let source = output.source_range();
        let inside = bodies
            .iter()
            .any(|body| body.start <= source.start && source.end <= body.end);
        if !inside {
            continue;
        }
        let range = output.output_range();
        match spans.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => spans.push(range),
        }
    }
    spans
}

/// The tags of a template, without comments and `raw` blocks.
pub(super) fn tags(source: &str) -> impl Iterator<Item = Tag> {
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            let start = at + source.get(at..)?.find('{')?;
            match source.as_bytes().get(start + 1)? {
                b'#' => at = start + 2 + source[start + 2..].find("#}")? + 2,
                b'%' => {
                    let tag = tag(source, start, "%}")?;
                    at = tag.range.end;
                    if source[tag.inner.clone()].trim() == "raw" {
                        at += end_of_raw(&source[at..])?;
                        continue;
                    }
                    return Some(tag);
                }
                b'{' => {
                    let tag = tag(source, start, "}}")?;
                    at = tag.range.end;
                    return Some(tag);
                }
                _ => at = start + 1,
            }
        }
    })
}

/// The tag that opens at `start`; its end is the first `close` outside a string.
fn tag(source: &str, start: usize, close: &str) -> Option<Tag> {
    let bytes = source.as_bytes();
    let mut quote = None;
    let mut at = start + 2;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (None, b'\'' | b'"') => quote = Some(bytes[at]),
            (None, _) if bytes[at..].starts_with(close.as_bytes()) => break,
            (Some(_), b'\\') => at += 1,
            (Some(open), byte) if byte == open => quote = None,
            _ => {}
        }
        at += 1;
    }
    let end = (at + 2 <= bytes.len()).then_some(at + 2)?;
    let control = |byte: Option<&u8>| usize::from(matches!(byte, Some(b'-' | b'+')));
    let from = start + 2 + control(bytes.get(start + 2));
    let to = at - control(bytes.get(at - 1).filter(|_| at > from));
    Some(Tag {
        range: start..end,
        inner: from..to,
    })
}

/// Where the text after a `raw` tag is template again.
fn end_of_raw(source: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        let start = at + source[at..].find("{%")?;
        let end = start + 2 + source[start + 2..].find("%}")? + 2;
        let word = source[start + 2..end - 2].trim_matches(['-', '+', ' ', '\t', '\n', '\r']);
        if word == "endraw" {
            return Some(end);
        }
        at = start + 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(source: &str, expected: &str, bodies: &[&str]) {
        let rewritten = rewrite(source);
        assert_eq!(rewritten.source, expected);
        let found: Vec<&str> = rewritten
            .bodies
            .iter()
            .map(|body| &rewritten.source[body.clone()])
            .collect();
        assert_eq!(found, bodies);
    }

    #[test]
    fn the_tag_becomes_a_scope() {
        check(
            "a{% generation %}b{%- endgeneration -%}c",
            "a{% with %}b{%- endwith -%}c",
            &["b"],
        );
        check(
            "{%generation%}{% for m in y %}b{% endfor %}{%+ endgeneration %}",
            "{% with %}{% for m in (y)|__iterated %}b{% endfor %}{%+ endwith %}",
            &["{% for m in (y)|__iterated %}b{% endfor %}"],
        );
    }

    #[test]
    fn the_iterable_of_a_loop_passes_through_the_filter() {
        for (tag, expected) in [
            ("for x in y", "for x in (y)|__iterated"),
            (
                "- for k, v in y.items() -",
                "- for k, v in (y.items())|__iterated -",
            ),
            ("for x in y if x in z", "for x in (y)|__iterated if x in z"),
            ("for x in y recursive", "for x in (y)|__iterated recursive"),
            (
                "for x in f(a if b else c)[' if ']",
                "for x in (f(a if b else c)[' if '])|__iterated",
            ),
            ("for x in 1, 2", "for x in (1, 2)|__iterated"),
            ("for x in a.if", "for x in (a.if)|__iterated"),
            ("for x in", "for x in"),
            ("set form = 'for x in y'", "set form = 'for x in y'"),
        ] {
            check(&format!("{{%{tag}%}}"), &format!("{{%{expected}%}}"), &[]);
        }
    }

    #[test]
    fn comments_strings_and_raw_blocks_stay() {
        for same in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endraw %}",
            "{ % } { {",
        ] {
            check(same, same, &[]);
        }
    }

    #[test]
    fn line_ends_become_newlines() {
        check("a\r\nb\rc", "a\nb\nc", &[]);
    }
}
