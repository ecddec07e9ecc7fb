//! Where a template would render differently from transformers, found at load.

use std::fmt;

use super::generation::{Tag, tags};

/// A place where a template relies on what minijinja does differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateDivergence {
    /// The template's name.
    pub template: String,
    /// The line, counted from 1.
    pub line: usize,
    /// What differs.
    pub kind: DivergenceKind,
}

/// What differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DivergenceKind {
    /// A string marked `safe` is added to another: Jinja2 then escapes the
    /// other one for HTML, which we do not.
    SafeConcatenation,
}

impl fmt::Display for TemplateDivergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TemplateDivergence { template, line, .. } = self;
        match self.kind {
            DivergenceKind::SafeConcatenation => write!(
                f,
                "chat template {template:?}, line {line}: transformers escapes for HTML what is \
                 added to a string marked safe, and this crate does not"
            ),
        }
    }
}

pub(super) fn find(template: &str, source: &str) -> Vec<TemplateDivergence> {
    let mut found: Vec<TemplateDivergence> = tags(source)
        .filter(|tag| adds_to_safe(tag, source))
        .map(|tag| TemplateDivergence {
            template: template.to_owned(),
            line: source[..tag.range.start].matches('\n').count() + 1,
            kind: DivergenceKind::SafeConcatenation,
        })
        .collect();
    found.dedup();
    found
}

/// Whether a tag holds both the filter and an addition, outside strings.
fn adds_to_safe(tag: &Tag, source: &str) -> bool {
    let code = outside_strings(&source[tag.inner.clone()]);
    let filters = code.split('|').skip(1).map(str::trim_start);
    let marks_safe = filters
        .filter_map(|filter| filter.strip_prefix("safe"))
        .any(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'));
    marks_safe && code.contains('+')
}

fn outside_strings(code: &str) -> String {
    let mut kept = String::with_capacity(code.len());
    let mut quote = None;
    let mut chars = code.chars();
    while let Some(c) = chars.next() {
        match quote {
            None if c == '\'' || c == '"' => quote = Some(c),
            None => kept.push(c),
            Some(_) if c == '\\' => drop(chars.next()),
            Some(open) if c == open => quote = None,
            Some(_) => {}
        }
    }
    kept
}
