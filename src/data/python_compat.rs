//! What chat templates expect from Python and Jinja2 beyond minijinja: `tojson`, `strftime_now`, `raise_exception`, methods of
//! strings, and what is iterable or a sequence.

use chrono::{DateTime, Local, NaiveDate, NaiveTime};
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, State, Value};
use serde::Serialize;

/// The function that prints the time: what it is, unless [`set_date`] says otherwise.
pub(super) const STRFTIME_NOW: &str = "strftime_now";

/// Adds them to `environment`.
pub(super) fn add_to(environment: &mut Environment) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| match value.is_none() {
        true => Ok(out.write_str("None")?),
        false => minijinja::escape_formatter(out, state, value),
    });
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function(STRFTIME_NOW, |format: String| {
        strftime(Local::now(), &format)
    });
}

/// Lets templates have it that it is the beginning of this day.
pub(super) fn set_date(environment: &mut Environment, date: NaiveDate) {
    environment.add_function(STRFTIME_NOW, move |format: String| {
        let midnight = date.and_time(NaiveTime::MIN);
        // Where the clocks are changed at midnight there may be none, or two.
        let local = midnight.and_local_timezone(Local).earliest();
        strftime(local.unwrap_or_else(|| midnight.and_utc().into()), &format)
    });
}

/// A method of a Python object.
fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, minijinja::Error> {
    if let Some(text) = value.as_str()
        && let [argument] = arguments
        && let Some(argument) = argument.as_str()
    {
        let found = match name {
            "removeprefix" => Some(text.strip_prefix(argument).unwrap_or(text).into()),
            "removesuffix" => Some(text.strip_suffix(argument).unwrap_or(text).into()),
            "partition" => Some(partition(
                text,
                text.find(argument),
                argument,
                [text, "", ""],
            )),
            "rpartition" => Some(partition(
                text,
                text.rfind(argument),
                argument,
                ["", "", text],
            )),
            _ => None,
        };
        if let Some(found) = found {
            return Ok(found);
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

/// Jinja2's, to which an undefined value is an empty iterator, but None is none.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Jinja2's: whatever has a length and takes an index, so text and mappings too.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined() || (is_iterable(value) && value.len().is_some())
}

fn partition(text: &str, at: Option<usize>, separator: &str, otherwise: [&str; 3]) -> Value {
    let owned = |parts: [&str; 3]| Value::from(parts.map(Value::from).to_vec());
    match at {
        Some(at) => owned([&text[..at], separator, &text[at + separator.len()..]]),
        None => owned(otherwise),
    }
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime(time: DateTime<Local>, format: &str) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let mut text = String::new();
    match write!(text, "{}", time.format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: {format:?} is not a date format"),
        )),
    }
}

/// `json.dumps` with the defaults of transformers: nothing escaped for HTML, `ensure_ascii=False`.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii = options
        .get::<Option<bool>>("ensure_ascii")?
        .unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;

    let failed = |e: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {e}"))
    };
    let mut value = serde_json::to_value(&value).map_err(failed)?;
    if sort_keys {
        value.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators are two strings",
            ));
        }
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let mut json = Vec::new();
    let formatter = PythonJson {
        item,
        key,
        indent,
        depth: 0,
        has_value: false,
    };
    value
        .serialize(&mut serde_json::Serializer::with_formatter(
            &mut json, formatter,
        ))
        .map_err(failed)?;
    let json = String::from_utf8(json).expect("serde_json writes UTF-8");
    Ok(if ensure_ascii {
        escape_non_ascii(&json)
    } else {
        json
    })
}

fn escape_non_ascii(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            escaped.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    escaped
}

/// The separators and line breaks of Python's `json.dumps`.
struct PythonJson {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    has_value: bool,
}

impl PythonJson {
    fn open(&mut self) {
        self.depth += 1;
        self.has_value = false;
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.line_break(writer)?;
        }
        Ok(())
    }

    fn next<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        is_first: bool,
    ) -> std::io::Result<()> {
        if !is_first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line_break(writer)
    }

    fn line_break<W: ?Sized + std::io::Write>(&self, writer: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open();
        writer.write_all(b"[")
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer)?;
        writer.write_all(b"]")
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        is_first: bool,
    ) -> std::io::Result<()> {
        self.next(writer, is_first)
    }

    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open();
        writer.write_all(b"{")
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer)?;
        writer.write_all(b"}")
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        is_first: bool,
    ) -> std::io::Result<()> {
        self.next(writer, is_first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}
