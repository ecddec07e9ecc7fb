//! What the library tells on its way, as lines on standard error.

use std::fmt::{self, Write as _};
use std::io::Write as _;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Prints events of this crate's libraries from `INFO` up; there are no spans.
#[derive(Debug)]
pub(crate) struct Progress;

impl Subscriber for Progress {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO && metadata.target().starts_with("updraft")
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let mark = match *event.metadata().level() {
            Level::INFO => "",
            _ => "warning: ",
        };
        // Nobody may be there to read it.
        let _ = writeln!(std::io::stderr(), "{mark}{}{}", line.message, line.fields);
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// The message, then its fields in brackets.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " [{name}: {value:?}]"),
        };
        debug_assert!(written.is_ok(), "a string takes everything");
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_news_is_told() {
        let subscriber = Progress;
        tracing::subscriber::with_default(subscriber, || {
            assert!(tracing::enabled!(target: "updraft_provision", Level::INFO));
            assert!(!tracing::enabled!(target: "updraft_provision", Level::DEBUG));
            assert!(!tracing::enabled!(target: "hyper", Level::ERROR));
        });
    }
}
