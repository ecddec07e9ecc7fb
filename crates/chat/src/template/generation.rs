//! `{% generation %}`, the tag that marks what the assistant writes.
//!
//! minijinja has no such tag, but it tells which part of the source wrote
//! which part of the output. So the tag becomes a `{% with %}` of the same
//! length, which has the same scope and writes nothing, and the output that
//! comes from its body is the span.

use std::borrow::Cow;
use std::ops::Range;

use minijinja::OutputSpan;

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

/// Normalises line ends and replaces generation tags.
pub(super) fn rewrite(source: &str) -> Rewritten {
    let source = match source.contains('\r') {
        true => Cow::Owned(source.replace("\r\n", "\n").replace('\r', "\n")),
        false => Cow::Borrowed(source),
    };
    let mut rewritten = source.clone().into_owned();
    let mut bodies = Vec::new();
    let mut open = Vec::new();
    for tag in tags(&source) {
        let word = source[tag.inner.clone()].trim();
        let replacement = match word {
            "generation" => {
                open.push(tag.range.end);
                "with"
            }
            "endgeneration" => {
                if let Some(start) = open.pop() {
                    bodies.push(start..tag.range.start);
                }
                "endwith"
            }
            _ => continue,
        };
        let padded = format!("{replacement:<width$}", width = tag.inner.len());
        rewritten.replace_range(tag.inner.clone(), &padded);
    }
    Rewritten {
        source: rewritten,
        bodies,
    }
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
        let end = start + source[start..].find("%}")? + 2;
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
    fn the_tag_keeps_its_length() {
        check(
            "a{% generation %}b{%- endgeneration -%}c",
            "a{%with        %}b{%-endwith        -%}c",
            &["b"],
        );
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
