//! Parquet rows, decoded a row group at a time.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value, json};

use super::{Content, Record, Records, bad_row};
use crate::{Error, Result};

/// The rows of `file`.
pub(super) fn rows(path: &Path, file: File) -> Result<Records> {
    let damaged =
        |reason: String| Error::malformed(path, format!("not a whole Parquet file: {reason}"));
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(damaged)?;
    if let Some(reason) = unread_compression(reader.metadata()) {
        return Err(Error::malformed(path, reason));
    }
    let columns = reader
        .metadata()
        .file_metadata()
        .schema_descr()
        .num_columns();
    if columns == 0 {
        return Err(Error::malformed(path, "the Parquet file has no columns"));
    }
    let rows =
        guarded(|| RowIter::from_file_into(Box::new(reader)).project(None)).map_err(damaged)?;
    let mut rows = Some(rows);
    let path = PathBuf::from(path);
    let mut number = 0;
    Ok(Box::new(std::iter::from_fn(move || {
        number += 1;
        let iter = rows.as_mut()?;
        let row = match guarded(|| iter.next().transpose()) {
            Ok(row) => row?,
            Err(reason) => {
                rows = None;
                return Some(Err(bad_row(
                    &path,
                    number,
                    format!("the Parquet file is damaged: {reason}"),
                )));
            }
        };
        Some(Ok(Record {
            line: number,
            content: Content::Columns(columns_of(&row)),
        }))
    })))
}

/// What to say of a file with a column in a compression that is not read.
fn unread_compression(metadata: &ParquetMetaData) -> Option<String> {
    let groups = metadata.row_groups().iter();
    let mut columns = groups.flat_map(|group| group.columns());
    columns.find_map(|column| {
        let compression = match column.compression() {
            Compression::UNCOMPRESSED
            | Compression::SNAPPY
            | Compression::GZIP(_)
            | Compression::ZSTD(_) => return None,
            Compression::BROTLI(_) => "brotli",
            Compression::LZ4 | Compression::LZ4_RAW => "lz4",
            Compression::LZO => "lzo",
        };
        Some(format!(
            "column `{}` is compressed by {compression}, which is not read; write the file with snappy, gzip, zstd or \
             without compression",
            column.column_path().string()
        ))
    })
}

/// The decoder indexes by what a file says; where that is wrong it panics, which is the file's fault and not the
/// program's.
fn guarded<T>(decode: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("its parts contradict each other".into()),
    }
}

fn columns_of(row: &Row) -> Map<String, Value> {
    let columns = row.get_column_iter();
    columns
        .map(|(name, field)| (name.clone(), to_json(field)))
        .collect()
}

fn to_json(field: &Field) -> Value {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => (*flag).into(),
        Field::Byte(x) => (*x).into(),
        Field::Short(x) => (*x).into(),
        Field::Int(x) => (*x).into(),
        Field::Long(x) => (*x).into(),
        Field::UByte(x) => (*x).into(),
        Field::UShort(x) => (*x).into(),
        Field::UInt(x) => (*x).into(),
        Field::ULong(x) => (*x).into(),
        Field::Float16(x) => float(f64::from(f32::from(*x))),
        Field::Float(x) => float(f64::from(*x)),
        Field::Double(x) => float(*x),
        Field::Str(text) => text.as_str().into(),
        // Written by programs that leave the type of a string out.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            // An image, say. A format that wants a text there refuses an object; the others leave it alone.
            Err(_) => json!({ "bytes": bytes.len() }),
        },
        Field::Group(row) => Value::Object(columns_of(row)),
        Field::ListInternal(list) => list.elements().iter().map(to_json).collect(),
        Field::MapInternal(map) => {
            let mut object = Map::new();
            for (key, value) in map.entries() {
                let key = match to_json(key) {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                object.insert(key, to_json(value));
            }
            Value::Object(object)
        }
        other => Value::String(other.to_string()),
    }
}
