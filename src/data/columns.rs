//! Columns of a row, and how an error names what stands in them.

use serde_json::{Map, Value};

/// A row as it was read.
pub(super) type Columns = Map<String, Value>;

/// A JSON value's type, as an error names it.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

pub(super) fn quoted(names: &[&str]) -> String {
    if names.is_empty() {
        return "(none)".into();
    }
    names
        .iter()
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

pub(super) fn names(row: &Columns) -> String {
    quoted(&row.keys().map(String::as_str).collect::<Vec<_>>())
}

pub(super) fn column<'a>(row: &'a Columns, name: &str) -> Result<&'a Value, String> {
    row.get(name)
        .ok_or_else(|| format!("column `{name}` is missing; the row has {}", names(row)))
}

pub(super) fn text<'a>(row: &'a Columns, name: &str) -> Result<&'a str, String> {
    let value = column(row, name)?;
    value
        .as_str()
        .ok_or_else(|| format!("`{name}` is {}, expected a string", kind(value)))
}

/// What a column holds that may be absent; null, which tables write where a row has nothing, is absent too.
pub(super) fn optional<'a>(row: &'a Columns, name: &str) -> Option<&'a Value> {
    row.get(name).filter(|value| !value.is_null())
}

/// The text of a column that may be absent.
pub(super) fn optional_text<'a>(row: &'a Columns, name: &str) -> Result<&'a str, String> {
    match optional(row, name) {
        None => Ok(""),
        Some(_) => text(row, name),
    }
}

/// The objects of a column, each with the name that an error gives it.
pub(super) fn objects<'a>(
    row: &'a Columns,
    name: &'a str,
) -> Result<impl Iterator<Item = Result<&'a Columns, String>>, String> {
    let value = column(row, name)?;
    let items = value
        .as_array()
        .ok_or_else(|| format!("`{name}` is {}, expected an array of objects", kind(value)))?;
    Ok(items.iter().enumerate().map(move |(i, item)| {
        item.as_object()
            .ok_or_else(|| format!("`{name}[{i}]` is {}, expected an object", kind(item)))
    }))
}

pub(super) fn integers<T: TryFrom<i64>>(row: &Columns, name: &str) -> Result<Vec<T>, String> {
    let value = column(row, name)?;
    let values = value
        .as_array()
        .ok_or_else(|| format!("`{name}` is {}, expected an array of integers", kind(value)))?;
    values
        .iter()
        .enumerate()
        .map(|(i, value)| {
            value
                .as_i64()
                .and_then(|number| T::try_from(number).ok())
                .ok_or_else(|| format!("`{name}[{i}]` is {value}, expected a token id"))
        })
        .collect()
}
