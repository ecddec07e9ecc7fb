//! Python's `json.dumps`, which transformers puts behind `tojson`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, Value};

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja's form of a filter"
)]
pub(super) fn tojson(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    type Arguments = (
        Option<Value>,
        Option<Value>,
        Option<Value>,
        Option<Value>,
        Kwargs,
    );
    let args: Vec<Value> = args.iter().cloned().map(Value::from).collect();
    let (ascii, indent, separators, sort, kwargs): Arguments = from_args(&args)?;
    let named = |positional: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional {
            Some(value) => Some(value),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none()))
    };
    let ensure_ascii = named(ascii, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = named(indent, "indent")?;
    let indent = indent.as_ref().map(indent_text).transpose()?;
    let separators = named(separators, "separators")?;
    let separators = separators.as_ref().map(separator_texts).transpose()?;
    let sort_keys = named(sort, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let between = if indent.is_some() { "," } else { ", " };
    let (item, key) = separators.unwrap_or((between.to_owned(), ": ".to_owned()));
    let mut writer = Writer {
        out: String::new(),
        ensure_ascii,
        indent,
        item,
        key,
        sort_keys,
    };
    writer.value(value, 0)?;
    Ok(Value::from(writer.out))
}

fn indent_text(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => {
            let width = usize::try_from(value.clone())?;
            Ok(" ".repeat(width.min(MAX_INDENT)))
        }
    }
}

fn separator_texts(value: &Value) -> Result<(String, String), Error> {
    let texts: Vec<String> = value.try_iter()?.map(|text| text.to_string()).collect();
    <[String; 2]>::try_from(texts)
        .map(|[item, key]| (item, key))
        .map_err(|_| {
            Error::new(
                ErrorKind::InvalidOperation,
                "separators must be a pair of strings",
            )
        })
}

const MAX_INDENT: usize = 64;
const MAX_DEPTH: usize = 200;

struct Writer {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(unserializable("a value nested this deep"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(match value.is_true() {
                true => "true",
                false => "false",
            }),
            ValueKind::Number if value.is_integer() => {
                let _ = write!(self.out, "{value}");
            }
            ValueKind::Number => python_float(f64::try_from(value.clone())?, &mut self.out),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq => {
                let items = value.try_iter()?.checked();
                self.container(('[', ']'), items, depth, |writer, item| {
                    writer.value(&item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.checked().collect::<Result<_, _>>()?;
                if self.sort_keys {
                    keys.sort();
                }
                let keys = keys.into_iter().map(Ok);
                self.container(('{', '}'), keys, depth, |writer, key| {
                    match key.as_str() {
                        Some(text) => writer.string(text),
                        None => {
                            let mut text = writer.like();
                            text.value(&key, depth + 1)?;
                            writer.string(&text.out);
                        }
                    }
                    writer.out.push_str(&writer.key.clone());
                    writer.value(&value.get_item(&key)?, depth + 1)
                })?;
            }
            other => return Err(unserializable(&other.to_string())),
        }
        Ok(())
    }

    /// An empty writer of the same style, for keys that are not strings.
    fn like(&self) -> Writer {
        Writer {
            out: String::new(),
            indent: self.indent.clone(),
            item: self.item.clone(),
            key: self.key.clone(),
            ..*self
        }
    }

    fn container(
        &mut self,
        (open, close): (char, char),
        items: impl Iterator<Item = Result<Value, Error>>,
        depth: usize,
        mut write: impl FnMut(&mut Writer, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut empty = true;
        for item in items {
            if !empty {
                self.out.push_str(&self.item.clone());
            }
            empty = false;
            self.line(depth + 1);
            write(self, item?)?;
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            let _ = match c {
                '"' => self.out.write_str("\\\""),
                '\\' => self.out.write_str("\\\\"),
                '\n' => self.out.write_str("\\n"),
                '\r' => self.out.write_str("\\r"),
                '\t' => self.out.write_str("\\t"),
                '\u{8}' => self.out.write_str("\\b"),
                '\u{c}' => self.out.write_str("\\f"),
                c if c < ' ' => write!(self.out, "\\u{:04x}", c as u32),
                c if self.ensure_ascii && c > '~' => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                    Ok(())
                }
                c => self.out.write_char(c),
            };
        }
        self.out.push('"');
    }
}

fn unserializable(what: &str) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("{what} is not JSON serializable"),
    )
}

/// `repr(float)`: the shortest digits, an exponent outside 1e-4 to 1e16.
fn python_float(value: f64, out: &mut String) {
    if value.is_nan() {
        out.push_str("NaN");
    } else if value.is_infinite() {
        out.push_str(if value > 0.0 { "Infinity" } else { "-Infinity" });
    } else if value != 0.0 && !(1e-4..1e16).contains(&value.abs()) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        let _ = write!(out, "{digits}e{sign}{exponent:0>2}");
    } else {
        let _ = write!(out, "{value:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_are_written_like_python() {
        for (value, expected) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (f64::INFINITY, "Infinity"),
            (f64::NAN, "NaN"),
        ] {
            let mut text = String::new();
            python_float(value, &mut text);
            assert_eq!(text, expected);
        }
    }
}
