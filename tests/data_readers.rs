//! Every kind of data file gives the same rows, and a hostile one is an error with its file and line.

mod data_files;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use assert_cmd::Command;
use data_files::{jsonl, load_bytes, tokenizer};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use predicates::str::contains;
use proptest::prelude::*;
use qlora::data::{Dataset, DatasetFormat, Example, LoadOptions, load};
use qlora::{Error, Result};
use serde_json::{Value, json};

const OUTPUTS: [&str; 3] = ["12 apples", "two\nlines, a \"quote\" and\ta tab", "été 🙂"];

fn records() -> Vec<Value> {
    let row =
        |(i, output): (usize, &&str)| json!({"input": format!("question {i}"), "output": output});
    OUTPUTS.iter().enumerate().map(row).collect()
}

fn csv(delimiter: char) -> Vec<u8> {
    let mut text = format!("output{delimiter}unused{delimiter}input\r\n");
    for (i, output) in OUTPUTS.iter().enumerate() {
        let quoted = output.replace('"', "\"\"");
        text += &format!("\"{quoted}\"{delimiter}x{delimiter}question {i}\r\n");
    }
    text.into_bytes()
}

fn byte_arrays(texts: &[&str]) -> Vec<ByteArray> {
    texts
        .iter()
        .map(|text| ByteArray::from(text.as_bytes()))
        .collect()
}

/// A file with the columns `input` and `output`, or with others.
fn parquet(columns: [&str; 2], inputs: &[&str], outputs: &[&str]) -> Vec<u8> {
    let [a, b] = columns;
    let schema = format!("message m {{ required binary {a} (STRING); optional binary {b}; }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<ByteArrayType>()
        .write_batch(&byte_arrays(inputs), None, None)
        .unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let levels = vec![1; outputs.len()];
    column
        .typed::<ByteArrayType>()
        .write_batch(&byte_arrays(outputs), Some(&levels), None)
        .unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();
    bytes
}

/// Two conversations in nested columns, with a null field.
fn nested_parquet() -> Vec<u8> {
    let schema = "message m { optional group messages (LIST) { repeated group list { optional group element {
        optional binary role (STRING); optional binary content (STRING); optional int64 weight; } } } }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let repetition = [0, 1, 0, 1];
    for texts in [
        ["user", "assistant", "user", "assistant"],
        ["a", "b", "c", "d"],
    ] {
        let mut column = group.next_column().unwrap().unwrap();
        let texts = byte_arrays(&texts);
        column
            .typed::<ByteArrayType>()
            .write_batch(&texts, Some(&[4; 4]), Some(&repetition))
            .unwrap();
        column.close().unwrap();
    }
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<Int64Type>()
        .write_batch(&[], Some(&[3; 4]), Some(&repetition))
        .unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn rows(name: &str, bytes: &[u8]) -> Result<Dataset> {
    load_bytes(
        name,
        bytes,
        &LoadOptions::default(),
        Some(&tokenizer("tokenizer")),
    )
}

fn ids(dataset: &Dataset) -> Vec<Vec<u32>> {
    dataset
        .examples()
        .map(|example| example.input_ids)
        .collect()
}

#[test]
fn every_kind_of_file_gives_the_same_rows() {
    let lines = jsonl(&records());
    let expected = ids(&rows("a.jsonl", &lines).unwrap());
    assert_eq!(expected.len(), 3);
    let pretty = serde_json::to_vec_pretty(&records()).unwrap();
    let objects: Vec<String> = records().iter().map(|row| format!("{row:#}\n")).collect();
    let [a, b] = lines.split_at(lines.len() / 2).into();
    let two_members = [gzip(a), gzip(b)].concat();
    for (name, bytes) in [
        ("a.json", pretty.clone()),
        ("a.json", objects.concat().into_bytes()),
        ("a.json", lines.clone()),
        ("a.ndjson", lines.clone()),
        ("a.csv", csv(',')),
        ("a.tsv", csv('\t')),
        (
            "a.parquet",
            parquet(
                ["input", "output"],
                &["question 0", "question 1", "question 2"],
                &OUTPUTS,
            ),
        ),
        ("a.jsonl.gz", gzip(&lines)),
        ("a.jsonl.gz", two_members),
        ("a.jsonl", gzip(&lines)),
        ("a.json.zst", zstd(&pretty)),
        ("a.csv.zstd", zstd(&csv(','))),
        ("A.CSV.GZ", gzip(&csv(','))),
    ] {
        assert_eq!(ids(&rows(name, &bytes).unwrap()), expected, "{name}");
    }
}

#[test]
fn nested_parquet_columns_are_conversations() {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = data_files::fixtures();
    for (from, to) in [
        ("tokenizer/tokenizer.json", "tokenizer.json"),
        ("tokenizer/tokenizer_config.json", "tokenizer_config.json"),
        ("templates/chatml.jinja", "chat_template.jinja"),
    ] {
        std::fs::copy(fixtures.join(from), dir.path().join(to)).unwrap();
    }
    let tokenizer = qlora::data::Tokenizer::from_dir(dir.path()).unwrap();
    let chat = |user: &str, assistant: &str| json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]});
    let lines = jsonl(&[chat("a", "b"), chat("c", "d")]);
    let options = LoadOptions::default();
    let expected = load_bytes("a.jsonl", &lines, &options, Some(&tokenizer)).unwrap();
    let found = load_bytes("a.parquet", &nested_parquet(), &options, Some(&tokenizer)).unwrap();
    assert_eq!(found.format, DatasetFormat::Messages);
    assert_eq!(ids(&found), ids(&expected));
}

#[test]
fn lines_are_those_of_the_file() {
    let line = |name: &str, bytes: &[u8]| -> Vec<usize> {
        rows(name, bytes)
            .unwrap()
            .examples()
            .map(|example| example.line)
            .collect()
    };
    assert_eq!(line("a.csv", &csv(',')), [2, 3, 5]);
    let pretty = serde_json::to_vec_pretty(&records()).unwrap();
    assert_eq!(line("a.json", &pretty), [2, 6, 10]);
    assert_eq!(
        line(
            "a.jsonl",
            &[b"\n\n".as_slice(), &jsonl(&records())].concat()
        ),
        [3, 4, 5]
    );
}

/// The line and the reason of the error that a file is.
fn refused(name: &str, bytes: &[u8]) -> (usize, String) {
    match rows(name, bytes) {
        Err(Error::Row { path, line, reason }) => {
            assert!(path.ends_with(name), "{}", path.display());
            (line, reason)
        }
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn hostile_files_are_errors_with_their_line() {
    let good = jsonl(&records());
    let with = |tail: &[u8]| [good.as_slice(), tail].concat();
    // Random enough that its compressed form is cut inside the text.
    let long: String = (0..40_000u32)
        .map(|i| {
            format!(
                "{}\n",
                json!({"input": i.wrapping_mul(2_654_435_761), "output": "x"})
            )
        })
        .collect();
    let long = long
        .replace("\"input\":", "\"input\":\"")
        .replace(",\"output\"", "\",\"output\"");
    let cut = |compressed: Vec<u8>| compressed[..compressed.len() / 2].to_vec();
    let cases: Vec<(&str, Vec<u8>, usize, &str)> = vec![
        (
            "utf8.jsonl",
            with(b"{\"input\": \"\xff\", \"output\": \"\"}\n"),
            4,
            "invalid UTF-8 at byte 12",
        ),
        (
            "utf8.csv",
            b"input,output\na,b\nc,\xff\n".to_vec(),
            3,
            "invalid UTF-8 in column 2",
        ),
        (
            "nul.jsonl",
            with(b"{\"input\": \"a\0b\", \"output\": \"\"}\n"),
            4,
            "control character",
        ),
        (
            "nul.csv",
            b"input,output\na,b\0\n".to_vec(),
            2,
            "a NUL byte",
        ),
        (
            "mixed.jsonl",
            with(b"{\"messages\": []}\n"),
            4,
            "column `input` is missing; the row has `messages`",
        ),
        ("csv.jsonl", b"input,output\na,b\n".to_vec(), 1, "bad JSON"),
        ("lines.csv", good.clone(), 1, "follows a closing quote"),
        (
            "open.csv",
            b"input,output\na,b\nc,\"d\ne,f\n".to_vec(),
            3,
            "a quote is opened here and never closed",
        ),
        (
            "inside.csv",
            b"input,output\na,b\n\"c\"d,e\n".to_vec(),
            3,
            "'d' follows a closing quote",
        ),
        (
            "short.csv",
            b"input,output\na,b\nc\n".to_vec(),
            3,
            "the row has 1 fields and the line of column names 2",
        ),
        (
            "twice.csv",
            b"input,input\na,b\n".to_vec(),
            1,
            "two columns are called `input`",
        ),
        (
            "array.json",
            b"[{\"input\": \"a\", \"output\": \"b\"}\n{}]".to_vec(),
            2,
            "expected `,` or `]`, found '{'",
        ),
        (
            "endless.json",
            b"[{\"input\": \"a\", \"output\": \"b\"}\n".to_vec(),
            2,
            "the array has no end",
        ),
        (
            "more.json",
            b"[{\"input\": \"a\", \"output\": \"b\"}]\n 1".to_vec(),
            2,
            "something follows the array",
        ),
        (
            "open.json",
            b"{\"input\": \"a\", \"output\": \"b\"}\n{\"input\": [".to_vec(),
            2,
            "bad JSON: EOF",
        ),
        (
            "numbers.json",
            b"[1, 2]".to_vec(),
            1,
            "the row is a number, expected an object",
        ),
        (
            "schema.parquet",
            parquet(["a", "b"], &["x"], &["y"]),
            1,
            "no dataset_format fits the columns `a`, `b`",
        ),
    ];
    for (name, bytes, line, reason) in cases {
        let (found_line, found) = refused(name, &bytes);
        assert!(found.contains(reason), "{name}: {found}");
        assert_eq!(found_line, line, "{name}: {found}");
    }
    for (name, bytes) in [
        ("cut.jsonl.gz", cut(gzip(long.as_bytes()))),
        ("cut.jsonl.zst", cut(zstd(long.as_bytes()))),
    ] {
        let (line, reason) = refused(name, &bytes);
        assert!(line > 1 && line < 40_000, "{name}: line {line}");
        assert!(
            reason.contains("compressed file ends here") || reason.contains("cannot read on"),
            "{name}: {reason}"
        );
    }
    let (line, _) = refused(
        "cut.csv.gz",
        &cut(gzip(
            &[
                b"input,output\n".as_slice(),
                "a,b\n".repeat(100_000).as_bytes(),
            ]
            .concat(),
        )),
    );
    assert!(line > 1);
}

#[test]
fn a_row_of_100_mb_is_refused_and_not_kept() {
    let huge = "x".repeat(100 << 20);
    for (name, bytes) in [
        (
            "a.jsonl",
            format!("{{\"input\": \"a\", \"output\": \"b\"}}\n{{\"input\": \"{huge}\"}}\n"),
        ),
        (
            "a.json",
            format!("[{{\"input\": \"a\", \"output\": \"b\"}},\n{{\"input\": \"{huge}\"}}]"),
        ),
        ("a.csv", format!("input,output\n\"{huge}\",b\n")),
    ] {
        let (line, reason) = refused(name, bytes.as_bytes());
        assert_eq!(
            (line, reason.as_str()),
            (2, "the row has more than 64 MiB"),
            "{name}"
        );
    }
}

/// `bytes` with one sequence of bytes in place of another.
fn replaced(bytes: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    let mut bytes = bytes.to_vec();
    let starts = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(old));
    let starts: Vec<usize> = starts.collect();
    assert!(!starts.is_empty(), "{old:?} is not there");
    for at in starts {
        bytes[at..at + old.len()].copy_from_slice(new);
    }
    bytes
}

#[test]
fn a_parquet_compression_that_is_not_read_is_named() {
    let plain = parquet(["input", "output"], &["a"], &["b"]);
    // The codec, field 4 of a column's metadata, comes after its path; a number is twice itself.
    for (codec, name) in [(4, "brotli"), (5, "lz4"), (7, "lz4")] {
        let bytes = replaced(
            &plain,
            b"input\x15\x00",
            &[b"input\x15", [2 * codec].as_slice()].concat(),
        );
        let error = rows("a.parquet", &bytes).unwrap_err().to_string();
        let expected = format!("column `input` is compressed by {name}, which is not read");
        assert!(
            error.contains(&expected) && error.contains("snappy, gzip, zstd"),
            "{error}"
        );
    }
}

#[test]
fn a_parquet_column_of_bytes_stops_only_a_format_that_uses_it() {
    let tokenizer = data_files::tokenizer("tokenizer");
    let load = |columns| {
        let bytes = replaced(
            &parquet(columns, &["a"], &["QQQQ"]),
            b"QQQQ",
            b"\xFF\xD8\xFF\xE0",
        );
        load_bytes(
            "a.parquet",
            &bytes,
            &LoadOptions::default(),
            Some(&tokenizer),
        )
    };
    assert_eq!(load(["text", "image"]).unwrap().len(), 1);
    let error = load(["input", "output"]).unwrap_err().to_string();
    assert!(
        error.contains("`output` is an object, expected a string"),
        "{error}"
    );
}

#[test]
fn a_damaged_parquet_file_is_named() {
    let whole = parquet(["input", "output"], &["a"], &["b"]);
    for bytes in [&whole[..whole.len() - 9], b"PAR1", b"not parquet at all"] {
        let error = rows("a.parquet", bytes).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("a.parquet: not a whole Parquet file"),
            "{error}"
        );
    }
    assert!(matches!(
        rows("a.parquet", b""),
        Err(Error::Malformed { .. })
    ));
}

#[test]
fn the_program_ends_with_1_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = "{\"input_ids\": [1, 2]}\n";
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write(
        "utf8.jsonl",
        &[good.as_bytes(), b"{\"input_ids\": \"\xff\"}"].concat(),
    );
    write("cut.jsonl.gz", &gzip(good.repeat(1000).as_bytes())[..30]);
    write("broken.csv", b"input_ids\n\"[1, 2]\n");
    write("schema.parquet", &parquet(["a", "b"], &["x"], &["y"]));
    for (name, expected) in [
        ("utf8.jsonl", "error: utf8.jsonl:2: invalid UTF-8"),
        ("cut.jsonl.gz", "error: cut.jsonl.gz:"),
        ("broken.csv", "error: broken.csv:2: a quote is opened here"),
        (
            "schema.parquet",
            "error: schema.parquet:1: no dataset_format fits",
        ),
    ] {
        let mut command = Command::cargo_bin("qlora").unwrap();
        let assert = command
            .current_dir(dir.path())
            .args(["inspect", name])
            .assert();
        let assert = assert.code(1).stdout("").stderr(contains(expected));
        let stderr = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[test]
fn a_directory_is_its_training_files() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, id: u32| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, jsonl(&[json!({"input_ids": [id, id]})])).unwrap();
    };
    write("data/train-1.jsonl", 2);
    write("data/train-0.jsonl", 1);
    write("data/test-0.jsonl", 3);
    let files = qlora::data::data_files(dir.path()).unwrap();
    let dataset = qlora::data::load_files(&files, &LoadOptions::default(), None).unwrap();
    assert_eq!(ids(&dataset), [[1, 1], [2, 2]]);
    let empty = tempfile::tempdir().unwrap();
    let error = qlora::data::data_files(empty.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("has no data files"), "{error}");
}

/// Whether what came out of a damaged file is still sound.
fn is_sound(dataset: &Dataset) -> bool {
    let is_sound = |example: Example| {
        example.input_ids.len() == example.labels.len() && example.target_count() > 0
    };
    dataset.examples().all(is_sound)
}

fn damaged(
    mut bytes: Vec<u8>,
    edits: &[(prop::sample::Index, u8)],
    keep: prop::sample::Index,
) -> Vec<u8> {
    for (index, byte) in edits {
        let i = index.index(bytes.len());
        bytes[i] = *byte;
    }
    bytes.truncate(keep.index(bytes.len()) + 1);
    bytes
}

fn check_damaged(
    path: &Path,
    bytes: &[u8],
    tokenizer: &qlora::data::Tokenizer,
) -> Result<(), TestCaseError> {
    std::fs::write(path, bytes).unwrap();
    if let Ok(dataset) = load(path, &LoadOptions::default(), Some(tokenizer)) {
        prop_assert!(is_sound(&dataset));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_reader_panics_on_a_damaged_file(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        keep in any::<prop::sample::Index>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer("tokenizer");
        let lines = jsonl(&records());
        for (name, bytes) in [
            ("a.jsonl", lines.clone()),
            ("a.json", serde_json::to_vec_pretty(&records()).unwrap()),
            ("a.csv", csv(',')),
            ("a.parquet", parquet(["input", "output"], &["a", "b", "c"], &OUTPUTS)),
            ("a.jsonl.gz", gzip(&lines)),
            ("a.jsonl.zst", zstd(&lines)),
        ] {
            check_damaged(&dir.path().join(name), &damaged(bytes, &edits, keep), &tokenizer)?;
        }
    }

    #[test]
    fn no_reader_panics_on_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer("tokenizer");
        for name in ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"] {
            check_damaged(&dir.path().join(name), &bytes, &tokenizer)?;
        }
    }

    #[test]
    fn csv_fields_are_read_back_whatever_they_hold(fields in prop::collection::vec("[^\0]{0,12}", 1..6)) {
        let mut text = String::from("input_ids,output,input\n");
        for field in &fields {
            text += &format!("x,\"{}\",q\n", field.replace('"', "\"\""));
        }
        let expected: Vec<Value> = fields.iter().map(|field| json!({"output": field, "input": "q"})).collect();
        let options = LoadOptions { format: Some(DatasetFormat::InputOutput), ..LoadOptions::default() };
        let tokenizer = tokenizer("tokenizer");
        let found = load_bytes("a.csv", text.as_bytes(), &options, Some(&tokenizer)).unwrap();
        let expected = load_bytes("a.jsonl", &jsonl(&expected), &options, Some(&tokenizer)).unwrap();
        prop_assert_eq!(ids(&found), ids(&expected));
    }
}
