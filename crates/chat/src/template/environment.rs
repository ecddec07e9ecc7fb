//! minijinja set up as transformers sets up Jinja2.

use std::error::Error as _;
use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};

use super::generation::ITERATED;
use super::generator;
use super::json::tojson;

/// Work a render may do: one unit per instruction or 64 bytes. The largest
/// honest conversation (millions of tokens) needs a tenth.
const FUEL: u64 = 20_000_000;

pub(super) fn new() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("default delimiters are valid");
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", tojson);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter(ITERATED, iterated);
    generator::add_filters(&mut environment);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_function("raise_exception", raise_exception);
    environment
}

/// What a template said when it raised.
pub(super) fn raised(error: &Error) -> Option<&str> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message);
        }
        cause = error.source();
    }
    None
}

#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let raised = Raised(message.to_string());
    Err(Error::new(ErrorKind::InvalidOperation, "the template raised").with_source(raised))
}

/// Jinja2 answers the default, 0, where a value cannot be converted.
fn int(
    state: &State<'_, '_>,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let fallback = match &default {
        Some(default) => default.clone(),
        None => kwargs
            .peek::<Option<Value>>("default")?
            .unwrap_or(Value::from(0)),
    };
    Ok(minijinja::filters::int(state, value, default, base, kwargs).unwrap_or(fallback))
}

/// As [`int`], with 0.0.
fn float(
    state: &State<'_, '_>,
    value: &Value,
    default: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let fallback = match &default {
        Some(default) => default.clone(),
        None => kwargs
            .peek::<Option<Value>>("default")?
            .unwrap_or(Value::from(0.0)),
    };
    Ok(minijinja::filters::float(state, value, default, kwargs).unwrap_or(fallback))
}

/// What a loop goes over: anything but none, as in Python.
fn iterated(value: Value) -> Result<Value, Error> {
    match value.is_none() {
        false => Ok(value),
        true => Err(Error::new(
            ErrorKind::InvalidOperation,
            "a loop over none; give the template what it loops over, perhaps tools or documents",
        )),
    }
}

/// Python can iterate over an undefined value but not over `None`.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// To Jinja2 whatever has a length and items is a sequence, mappings and
/// strings included.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined()
        || matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Bytes
        )
}
