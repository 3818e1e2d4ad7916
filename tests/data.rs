//! Data files become the token ids and labels that qlora.py makes of them, in a fixed order, and bad ones say where.
//! Fixtures: `tests/fixtures/make_data.py`.

mod data_files;

use data_files::{TOKENIZERS, expect_row_error, fixture, integers, jsonl, load_bytes, tokenizer};
use proptest::prelude::*;
use qlora::Error;
use qlora::data::{
    Batch, Dataset, DatasetFormat, Example, LoadOptions, RowOrder, Shuffle, Unlabelled, load,
};
use serde_json::{Value, json};

fn all(dataset: &Dataset) -> Vec<Example> {
    dataset.examples().collect()
}

#[test]
fn source_and_target_rows_equal_the_collator_of_qlora_py() {
    let expected = fixture("rows.json");
    for name in TOKENIZERS {
        let tokenizer = tokenizer(name);
        for case in expected[name].as_array().unwrap() {
            let options = LoadOptions {
                source_max_len: case["source_max_len"].as_u64().unwrap() as usize,
                target_max_len: case["target_max_len"].as_u64().map(|len| len as usize),
                train_on_source: case["train_on_source"].as_bool().unwrap().into(),
                ..LoadOptions::default()
            };
            let records = case["records"].as_array().unwrap();
            let dataset =
                load_bytes("rows.jsonl", &jsonl(records), &options, Some(&tokenizer)).unwrap();
            let format = case["format"].as_str().unwrap().parse();
            assert_eq!(dataset.format, format.unwrap(), "the format is detected");
            let rows = case["rows"].as_array().unwrap();
            assert_eq!(dataset.len(), rows.len());
            for (example, row) in dataset.examples().zip(rows) {
                assert_eq!(
                    example.input_ids,
                    integers::<u32>(&row["input_ids"]),
                    "{case}"
                );
                assert_eq!(example.labels, integers::<i64>(&row["labels"]), "{case}");
            }
        }
    }
}

#[test]
fn tokenized_rows_are_recognised_and_kept_as_they_are() {
    let records = [
        json!({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}),
        json!({"input_ids": [8, 9], "other": "x"}),
    ];
    let dataset = load_bytes("a.jsonl", &jsonl(&records), &LoadOptions::default(), None).unwrap();
    assert_eq!(dataset.format, DatasetFormat::Tokenized);
    assert!(
        dataset.detected.contains("`input_ids`"),
        "{}",
        dataset.detected
    );
    assert_eq!(
        all(&dataset),
        [
            Example {
                input_ids: vec![5, 6, 7],
                labels: vec![-100, 6, 7],
                line: 1
            },
            Example {
                input_ids: vec![8, 9],
                labels: vec![8, 9],
                line: 2
            },
        ]
    );
    assert_eq!((dataset.stats.tokens, dataset.stats.target_tokens), (5, 3));
}

#[test]
fn an_optional_column_that_is_null_is_absent() {
    let tokenizer = tokenizer("tokenizer");
    let instance = json!({"instruction_with_input": "a", "output": "b"});
    let task = json!({"Definition": "Count.", "Instances": [{"input": "a", "output": "1"}]});
    for (row, columns) in [
        (json!({"instruction": "a", "output": "b"}), vec!["input"]),
        (json!({"input_ids": [5, 6]}), vec!["labels"]),
        (instance, vec!["instances", "reformulations"]),
        (task, vec!["Positive Examples", "Instance"]),
    ] {
        let mut with_nulls = row.clone();
        for column in columns {
            with_nulls[column] = Value::Null;
        }
        let [expected, found] = [row, with_nulls].map(|row| {
            let options = LoadOptions::default();
            all(&load_bytes("a.jsonl", &jsonl(&[row]), &options, Some(&tokenizer)).unwrap())
        });
        assert_eq!(found, expected);
    }
}

#[test]
fn an_array_and_its_lines_give_the_same_rows() {
    let records = [json!({"input_ids": [1, 2]}), json!({"input_ids": [3, 4]})];
    let array = Value::from(records.to_vec()).to_string();
    let options = LoadOptions::default();
    let from_array = load_bytes("a.json", array.as_bytes(), &options, None).unwrap();
    let from_lines = load_bytes("a.jsonl", &jsonl(&records), &options, None).unwrap();
    let ids =
        |dataset: &Dataset| -> Vec<Vec<u32>> { dataset.examples().map(|e| e.input_ids).collect() };
    assert_eq!(ids(&from_array), ids(&from_lines));
    let with_marks = [b"\xEF\xBB\xBF".as_slice(), &jsonl(&records)].concat();
    let windows = String::from_utf8(with_marks)
        .unwrap()
        .replace('\n', "\r\n\r\n");
    let with_blank_lines = load_bytes("a.jsonl", windows.as_bytes(), &options, None).unwrap();
    assert_eq!(with_blank_lines.example(1).input_ids, [3, 4]);
    assert_eq!(with_blank_lines.example(1).line, 3);
}

#[test]
fn rows_are_cut_on_the_right_and_dropped_without_a_target() {
    let records = [
        json!({"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}),
        json!({"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]}),
        json!({"input_ids": [1, 2], "labels": [1, -100]}),
        json!({"input_ids": [7, 8]}),
    ];
    let options = LoadOptions {
        max_seq_len: Some(3),
        ..LoadOptions::default()
    };
    let dataset = load_bytes("a.jsonl", &jsonl(&records), &options, None).unwrap();
    let lines: Vec<usize> = dataset.examples().map(|e| e.line).collect();
    assert_eq!(lines, [1, 4]);
    assert_eq!(dataset.example(0).labels, [-100, -100, 3]);
    let stats = dataset.stats;
    assert_eq!((stats.rows, stats.dropped, stats.truncated), (4, 2, 2));
    assert_eq!((stats.tokens, stats.target_tokens), (5, 2));

    let keep = LoadOptions {
        unlabelled: Unlabelled::Keep,
        ..options.clone()
    };
    let kept = load_bytes("a.jsonl", &jsonl(&records), &keep, None).unwrap();
    assert_eq!((kept.len(), kept.stats.dropped), (4, 0));
    let first = LoadOptions {
        max_samples: Some(1),
        ..options
    };
    let one = load_bytes("a.jsonl", &jsonl(&records), &first, None).unwrap();
    assert_eq!((one.len(), one.stats.rows), (1, 1));
}

#[test]
fn a_bad_row_names_its_line_and_what_was_expected() {
    let tokenizer = tokenizer("tokenizer");
    let good = "{\"input_ids\": [1, 2]}\n";
    let cases: [(&[u8], &str); 11] = [
        (
            b"{\"input_ids\": [1, 2",
            "bad JSON: EOF while parsing a list at column 19",
        ),
        (b"[1, 2]", "the row is an array, expected an object"),
        (
            b"{\"text\": 1}",
            "column `input_ids` is missing; the row has `text`",
        ),
        (
            b"{\"input_ids\": \"1 2\"}",
            "`input_ids` is a string, expected an array",
        ),
        (
            b"{\"input_ids\": [1, 2.5]}",
            "`input_ids[1]` is 2.5, expected a token id",
        ),
        (
            b"{\"input_ids\": [-1, 2]}",
            "`input_ids[0]` is -1, expected a token id",
        ),
        (b"{\"input_ids\": []}", "`input_ids` is empty"),
        (
            b"{\"input_ids\": [1, 480]}",
            "token id 480, beyond the model's vocabulary of 480",
        ),
        (
            b"{\"input_ids\": [1, 2], \"labels\": [1, 480]}",
            "`labels` has token id 480, beyond",
        ),
        (
            b"{\"input_ids\": [1, 2], \"labels\": [1]}",
            "`labels` has 1 entries and `input_ids` has 2",
        ),
        (
            b"{\"input_ids\": [1, 2], \"labels\": [1, -1]}",
            "`labels[1]` is -1, expected a token id or -100",
        ),
    ];
    let options = LoadOptions {
        vocab_size: Some(480),
        ..LoadOptions::default()
    };
    for (line, reason) in cases {
        let bytes = [good.as_bytes(), line, b"\n", line].concat();
        expect_row_error(&bytes, &options, None, 2, reason);
    }
    expect_row_error(
        b"{\"input_ids\": [1, 2]}\n\n\xff\xfe",
        &options,
        None,
        3,
        "invalid UTF-8 at byte 1",
    );

    let alpaca = "{\"instruction\": \"a\", \"output\": \"b\"}\n";
    for (line, reason) in [
        ("{\"instruction\": \"a\"}", "column `output` is missing"),
        (
            "{\"instruction\": 3, \"output\": \"b\"}",
            "`instruction` is a number, expected a string",
        ),
        (
            "{\"instruction\": \"a\", \"output\": null}",
            "`output` is null, expected a string",
        ),
        (
            "{\"instruction\": \"a\", \"output\": \"b\", \"input\": 3}",
            "`input` is a number, expected a string",
        ),
    ] {
        let bytes = format!("{alpaca}{line}\n");
        expect_row_error(bytes.as_bytes(), &options, Some(&tokenizer), 2, reason);
    }
    let small = LoadOptions {
        vocab_size: Some(20),
        ..LoadOptions::default()
    };
    expect_row_error(
        alpaca.as_bytes(),
        &small,
        Some(&tokenizer),
        1,
        "beyond the model's vocabulary of 20",
    );
}

#[test]
fn a_bad_file_is_named() {
    let options = LoadOptions::default();
    for bytes in [b"".as_slice(), b"\n \n"] {
        let error = load_bytes("empty.jsonl", bytes, &options, None).unwrap_err();
        assert!(matches!(&error, Error::Malformed { .. }), "{error}");
        assert!(
            error
                .to_string()
                .ends_with("empty.jsonl: the file has no rows"),
            "{error}"
        );
    }
    assert!(matches!(
        load("no/such.jsonl", &options, None),
        Err(Error::Io { .. })
    ));
    assert!(matches!(
        load_bytes("a.txt", b"a,b", &options, None),
        Err(Error::Malformed { .. })
    ));
    let error =
        load_bytes("a.json", b"[{\"input_ids\": [1]},\n oops]", &options, None).unwrap_err();
    assert!(matches!(&error, Error::Row { line: 2, .. }), "{error}");
    let unknown = jsonl(&[json!({"title": "a", "label": 1})]);
    expect_row_error(
        &unknown,
        &options,
        None,
        1,
        "no dataset_format fits the columns `title`, `label`",
    );
    let alpaca = jsonl(&[json!({"instruction": "a", "output": "b"})]);
    let error = load_bytes("a.jsonl", &alpaca, &options, None).unwrap_err();
    assert!(
        matches!(&error, Error::Config { key, .. } if key == "dataset_format"),
        "{error}"
    );
}

#[test]
fn a_file_without_any_target_is_an_error() {
    let row = json!({"input_ids": [1, 2], "labels": [-100, -100]});
    let bytes = jsonl(&[row.clone(), row]);
    expect_row_error(
        &bytes,
        &LoadOptions::default(),
        None,
        1,
        "all labels are -100, and so in all 2 rows",
    );
    let options = LoadOptions {
        max_seq_len: Some(1),
        ..LoadOptions::default()
    };
    let bytes = jsonl(&[json!({"input_ids": [1, 2]})]);
    expect_row_error(&bytes, &options, None, 1, "raise max_seq_len");
}

#[test]
fn formats_are_named_as_in_configs() {
    for format in DatasetFormat::ALL {
        assert_eq!(serde_json::to_value(format).unwrap(), format.name());
        assert_eq!(format.name().parse::<DatasetFormat>(), Ok(format));
    }
    assert_eq!("input_output".parse(), Ok(DatasetFormat::InputOutput));
    assert!(
        "alpacca"
            .parse::<DatasetFormat>()
            .unwrap_err()
            .contains("`alpaca`")
    );
}

#[test]
fn a_batch_lays_sequences_one_after_another() {
    let example = |input_ids: &[u32], labels: &[i64]| Example {
        input_ids: input_ids.to_vec(),
        labels: labels.to_vec(),
        line: 1,
    };
    let a = example(&[5, 6, 7], &[-100, 6, 7]);
    let b = example(&[8, 9], &[8, 9]);
    assert_eq!((a.target_count(), b.target_count()), (2, 1));
    let batch = Batch::from_examples(&[&a, &b]);
    assert_eq!(batch.input_ids, [5, 6, 7, 8, 9]);
    assert_eq!(batch.labels, [6, 7, -100, 9, -100]);
    assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
    assert_eq!(batch.cu_seqlens, [0, 3, 5]);
    assert_eq!((batch.token_count(), batch.target_count()), (5, 3));
}

#[test]
fn row_order_is_fixed_for_ever() {
    for case in fixture("row_order.json").as_array().unwrap() {
        let expected: Vec<usize> = integers(&case["order"]);
        let rows = case["rows"].as_u64().unwrap() as usize;
        let mut order = RowOrder::new(rows, case["data_seed"].as_u64().unwrap(), Shuffle::Yes);
        let found: Vec<usize> = (0..expected.len() as u64).map(|p| order.row(p)).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn row_order_without_shuffle_is_file_order_wrapping() {
    let mut order = RowOrder::new(3, 42, Shuffle::No);
    let rows: Vec<usize> = (0..7).map(|p| order.row(p)).collect();
    assert_eq!(rows, [0, 1, 2, 0, 1, 2, 0]);
}

proptest! {
    #[test]
    fn every_epoch_holds_each_row_once(rows in 1usize..200, seed: u64, epoch in 0u64..1000) {
        let mut order = RowOrder::new(rows, seed, Shuffle::Yes);
        let start = epoch * rows as u64;
        let mut seen: Vec<usize> = (start..start + rows as u64).map(|p| order.row(p)).collect();
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
    }

    #[test]
    fn row_order_needs_only_the_position(rows in 1usize..50, seed: u64, position in 0u64..500) {
        let mut resumed = RowOrder::new(rows, seed, Shuffle::Yes);
        let mut uninterrupted = RowOrder::new(rows, seed, Shuffle::Yes);
        let mut last = 0;
        for p in 0..=position {
            last = uninterrupted.row(p);
        }
        prop_assert_eq!(resumed.row(position), last);
    }

    #[test]
    fn a_batch_conserves_tokens_and_targets(lengths in prop::collection::vec(0usize..9, 0..6)) {
        let examples: Vec<Example> = lengths
            .iter()
            .map(|&n| Example { input_ids: vec![3; n], labels: (0..n as i64).map(|i| if i % 3 == 0 { 3 } else { -100 }).collect(), line: 1 })
            .collect();
        let batch = Batch::from_examples(&examples.iter().collect::<Vec<_>>());
        let n = lengths.iter().sum::<usize>();
        prop_assert_eq!((batch.token_count(), batch.labels.len(), batch.positions.len()), (n, n, n));
        prop_assert_eq!(batch.target_count(), examples.iter().map(Example::target_count).sum::<usize>());
        prop_assert_eq!(batch.cu_seqlens.last(), Some(&n));
    }

    #[test]
    fn the_reader_never_panics_on_a_mutated_file(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        keep in any::<prop::sample::Index>(),
    ) {
        let mut bytes = jsonl(&[
            json!({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}),
            json!({"input_ids": [4, 5], "messages": [{"role": "user", "content": "été"}]}),
        ]);
        for (index, byte) in edits {
            let i = index.index(bytes.len());
            bytes[i] = byte;
        }
        bytes.truncate(keep.index(bytes.len()) + 1);
        for name in ["a.jsonl", "a.json"] {
            if let Ok(dataset) = load_bytes(name, &bytes, &LoadOptions::default(), None) {
                prop_assert!(dataset.examples().all(|e| e.input_ids.len() == e.labels.len() && e.target_count() > 0));
            }
        }
    }
}
