//! What is wrong with a data set is found and said, cut as the options say, and nothing is silently unused.

mod data_files;

use std::path::Path;

use data_files::{expect_row_error, jsonl, load_bytes, model_dir, tokenizer};
use qlora::IGNORE_INDEX;
use qlora::data::{
    DatasetFormat, ExcessLength, Finding, LoadOptions, SpecialTokens, Tokenizer, load_files,
};
use qlora::train::{RunData, TrainConfig};
use serde_json::{Value, json};

fn pair(input: &str, output: &str) -> Value {
    json!({"input": input, "output": output})
}

fn finding(rows: usize, line: usize) -> Finding {
    Finding {
        rows,
        first_line: Some(line),
        first_file: None,
    }
}

#[test]
fn excess_length_is_cut_dropped_or_an_error() {
    let tokenizer = tokenizer("tokenizer");
    let long = "the river carries seven stones ".repeat(8);
    let rows = [pair("a", "b"), pair(&long, "b"), pair("a", &long)];
    let bytes = jsonl(&rows);
    let with = |excess_length| LoadOptions {
        max_seq_len: Some(24),
        excess_length,
        ..LoadOptions::default()
    };
    let cut = load_bytes(
        "a.jsonl",
        &bytes,
        &with(ExcessLength::Truncate),
        Some(&tokenizer),
    )
    .unwrap();
    assert_eq!(
        (cut.len(), cut.stats.truncated, cut.stats.dropped),
        (3, 2, 0)
    );
    assert_eq!(cut.findings.answer_cut, finding(1, 3));
    let text = |i: usize| {
        tokenizer
            .decode(&cut.example(i).input_ids, SpecialTokens::Keep)
            .unwrap()
    };
    // The prompt keeps its end and the answer its own.
    assert!(
        text(1).starts_with("<s>") && text(1).ends_with("seven stones b</s>"),
        "{}",
        text(1)
    );
    assert!(!text(2).contains("</s>"), "{}", text(2));
    let sentences = cut.sentences();
    assert!(
        sentences[0].starts_with("1 row cut so that an answer lost its end"),
        "{sentences:?}"
    );

    let dropped = load_bytes(
        "a.jsonl",
        &bytes,
        &with(ExcessLength::Drop),
        Some(&tokenizer),
    )
    .unwrap();
    assert_eq!(
        (
            dropped.len(),
            dropped.stats.dropped,
            dropped.stats.truncated
        ),
        (1, 2, 0)
    );
    assert_eq!(dropped.findings.too_long, finding(2, 2));

    let error = with(ExcessLength::Error);
    expect_row_error(
        &bytes,
        &error,
        Some(&tokenizer),
        2,
        "and max_seq_len is 24; raise it",
    );
    let by_target = LoadOptions {
        target_max_len: Some(4),
        excess_length: ExcessLength::Error,
        ..LoadOptions::default()
    };
    expect_row_error(
        &bytes,
        &by_target,
        Some(&tokenizer),
        3,
        "and target_max_len is 4",
    );
    let all = LoadOptions {
        max_seq_len: Some(2),
        excess_length: ExcessLength::Drop,
        ..LoadOptions::default()
    };
    expect_row_error(
        &bytes,
        &all,
        Some(&tokenizer),
        1,
        "excess_length_strategy drop leaves none",
    );
}

#[test]
fn a_target_cut_as_in_qlora_py_is_counted() {
    let options = LoadOptions {
        target_max_len: Some(3),
        ..LoadOptions::default()
    };
    let bytes = jsonl(&[pair("a", "b"), pair("a", "one two three four")]);
    let dataset = load_bytes("a.jsonl", &bytes, &options, Some(&tokenizer("tokenizer"))).unwrap();
    assert_eq!(
        (dataset.stats.truncated, dataset.findings.answer_cut),
        (1, finding(1, 2))
    );
    assert_eq!(
        dataset.findings.missing_end,
        Finding::default(),
        "a cut answer is counted once"
    );
}

#[test]
fn super_natural_instructions_leave_examples_out_where_they_do_not_fit() {
    let row = json!({"Definition": "Count.", "Positive Examples": [{"input": "one", "output": "1"}, {"input": "two", "output": "2"}],
                     "Instance": {"input": "three", "output": ["3"]}});
    let tokenizer = tokenizer("tokenizer");
    let mut source_max_len = 1024;
    for examples in [2, 1, 0] {
        let options = LoadOptions {
            source_max_len,
            ..LoadOptions::default()
        };
        let bytes = jsonl(std::slice::from_ref(&row));
        let dataset = load_bytes("a.jsonl", &bytes, &options, Some(&tokenizer)).unwrap();
        assert_eq!(dataset.stats.truncated, 0, "{source_max_len}");
        let example = dataset.example(0);
        let text = tokenizer
            .decode(&example.input_ids, SpecialTokens::Skip)
            .unwrap();
        assert_eq!(text.matches("Positive Example").count(), examples);
        // One token less than this source has.
        source_max_len = example
            .labels
            .iter()
            .filter(|&&label| label == IGNORE_INDEX)
            .count()
            - 1;
    }
    assert_eq!(
        DatasetFormat::SuperNaturalInstructions.default_target_max_len(),
        128
    );
}

/// A tokenizer with `template` and changes to its config.
fn model(template: &str, mut changes: Value) -> Tokenizer {
    changes["chat_template"] = template.into();
    let dir = model_dir("tokenizer", changes);
    Tokenizer::from_dir(dir.path()).unwrap()
}

fn chat() -> Vec<u8> {
    jsonl(&[
        json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    ])
}

#[test]
fn doubled_bos_missing_end_and_pad_as_eos_are_found_and_said() {
    let options = LoadOptions::default();
    let template = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
    let tokenizer = model(template, json!({"pad_token": "</s>"}));
    let dataset = load_bytes("a.jsonl", &chat(), &options, Some(&tokenizer)).unwrap();
    let found = dataset.findings;
    assert_eq!(
        (found.doubled_bos, found.missing_end, found.pad_is_eos),
        (finding(1, 1), finding(1, 1), true)
    );
    let sentences = dataset.sentences().join("\n");
    for expected in [
        "with the bos token twice at the start",
        "does not end with an end token",
        "pad_token is eos_token",
    ] {
        assert!(sentences.contains(expected), "{sentences}");
    }
    let sound = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}";
    let tokenizer = model(sound, json!({}));
    let found = load_bytes("a.jsonl", &chat(), &options, Some(&tokenizer)).unwrap();
    assert_eq!(found.sentences(), [""; 0]);

    let tokenizer = model(sound, json!({"eos_token": null}));
    let bytes = jsonl(&[pair("a", "b")]);
    let found = load_bytes("a.jsonl", &bytes, &options, Some(&tokenizer))
        .unwrap()
        .findings;
    assert_eq!(
        found.missing_end,
        finding(1, 1),
        "a tokenizer without an end token"
    );
}

#[test]
fn rows_without_loss_are_counted_with_the_first_of_them() {
    let bytes = jsonl(&[
        json!({"input_ids": [1, 2]}),
        json!({"input_ids": [1, 2], "labels": [-100, -100]}),
    ]);
    let dataset = load_bytes("a.jsonl", &bytes, &LoadOptions::default(), None).unwrap();
    assert_eq!(
        (dataset.len(), dataset.findings.all_masked),
        (1, finding(1, 2))
    );
}

#[test]
fn padding_that_the_attention_mask_leaves_out_is_no_part_of_a_row() {
    let load = |rows: &[Value]| load_bytes("a.jsonl", &jsonl(rows), &LoadOptions::default(), None);
    let rows = [
        json!({"input_ids": [5, 9, 33, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}),
        json!({"input_ids": [0, 5, 9], "attention_mask": [0, 1, 1], "labels": [-100, -100, 9]}),
        json!({"input_ids": [5, 0, 9], "attention_mask": [1, 1, 1]}),
        json!({"input_ids": [5, 9], "attention_mask": null}),
    ];
    let loaded = load(&rows).unwrap();
    let examples: Vec<_> = (0..4).map(|i| loaded.example(i)).collect();
    let ids: Vec<_> = examples.iter().map(|row| &row.input_ids[..]).collect();
    assert_eq!(ids, [&[5, 9, 33][..], &[5, 9], &[5, 0, 9], &[5, 9]]);
    assert_eq!(examples[1].labels, [-100, 9]);
    for (mask, reason) in [
        (json!([1, 0, 1]), "`attention_mask[1]` is 0 between tokens"),
        (
            json!([1, 1]),
            "`attention_mask` has 2 entries and `input_ids` has 3",
        ),
        (json!([0, 0, 0]), "`input_ids` is empty"),
    ] {
        let row = json!({"input_ids": [5, 9, 7], "attention_mask": mask});
        let message = load(&[row]).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn columns_can_have_other_names() {
    let tokenizer = tokenizer("tokenizer");
    let bytes = jsonl(&[json!({"question": "a", "answer": "b", "input": "unused"})]);
    let columns = |pairs: &[(&str, &str)]| LoadOptions {
        columns: pairs
            .iter()
            .map(|(a, b)| (a.to_string(), b.to_string()))
            .collect(),
        ..LoadOptions::default()
    };
    let options = columns(&[("input", "question"), ("output", "answer")]);
    let found = load_bytes("a.jsonl", &bytes, &options, Some(&tokenizer)).unwrap();
    let expected = load_bytes(
        "a.jsonl",
        &jsonl(&[pair("a", "b")]),
        &LoadOptions::default(),
        Some(&tokenizer),
    )
    .unwrap();
    assert_eq!(found.format, DatasetFormat::InputOutput);
    assert_eq!(found.example(0), expected.example(0));
    let missing = columns(&[("output", "reply")]);
    expect_row_error(
        &bytes,
        &missing,
        Some(&tokenizer),
        1,
        "takes `output` from the column `reply`, which is missing",
    );
}

#[test]
fn detection_says_what_was_found_and_why() {
    let tokenizer = tokenizer("tokenizer");
    let detected = |row: Value| {
        let dataset = load_bytes(
            "a.jsonl",
            &jsonl(&[row]),
            &LoadOptions::default(),
            Some(&tokenizer),
        )
        .unwrap();
        (dataset.format, dataset.detected)
    };
    for (row, format, why) in [
        (
            json!({"text": "plain"}),
            DatasetFormat::Completion,
            "the first row has `text`",
        ),
        (
            json!({"text": "### Human: a### Assistant: b"}),
            DatasetFormat::Oasst1,
            "`text` with `### Human:`, `### Assistant:`",
        ),
        (
            json!({"text": "<human>: a\n<bot>: b"}),
            DatasetFormat::Chip2,
            "`text` with `<human>:`, `<bot>:`",
        ),
        (
            json!({"instruction_with_input": "a", "output": "b"}),
            DatasetFormat::UnnaturalInstructions,
            "detected",
        ),
        (
            json!({"instruction": "a", "input": "", "output": "b"}),
            DatasetFormat::Alpaca,
            "`instruction`, `output`",
        ),
    ] {
        let (found, sentence) = detected(row);
        assert_eq!(found, format);
        assert!(sentence.contains(why), "{sentence}");
    }
}

#[test]
fn a_completion_is_trained_whole_and_not_cut_by_the_target() {
    let tokenizer = tokenizer("tokenizer");
    let text = "the river carries seven stones ".repeat(100);
    let options = LoadOptions {
        target_max_len: Some(4),
        ..LoadOptions::default()
    };
    let dataset = load_bytes(
        "a.jsonl",
        &jsonl(&[json!({"text": text})]),
        &options,
        Some(&tokenizer),
    )
    .unwrap();
    let example = dataset.example(0);
    let decoded = tokenizer
        .decode(&example.input_ids, SpecialTokens::Keep)
        .unwrap();
    assert_eq!(decoded, format!("<s>{text}</s>"));
    assert_eq!(example.target_count(), example.input_ids.len() - 1);
}

#[test]
fn an_added_token_beyond_the_vocabulary_is_named() {
    let tokenizer = tokenizer("tokenizer");
    let options = LoadOptions {
        vocab_size: Some(2),
        ..LoadOptions::default()
    };
    let bytes = jsonl(&[pair("a", "")]);
    expect_row_error(
        &bytes,
        &options,
        Some(&tokenizer),
        1,
        "resize the model's embeddings first",
    );
}

/// A run on ten rows, of which the first token is the row's number.
fn run(dir: &Path, change: impl FnOnce(&mut TrainConfig)) -> RunData {
    let rows: Vec<Value> = (1..=10).map(|i| json!({"input_ids": [i, 50]})).collect();
    let path = dir.join("rows.jsonl");
    std::fs::write(&path, jsonl(&rows)).unwrap();
    let mut config = TrainConfig {
        dataset: path.into(),
        ..TrainConfig::default()
    };
    change(&mut config);
    RunData::load(&config, None, None).unwrap()
}

fn train_rows(data: &RunData) -> Vec<u32> {
    (0..data.train_len())
        .map(|i| data.train_example(i).input_ids[0])
        .collect()
}

fn eval_rows(data: &RunData) -> Vec<u32> {
    data.eval_examples()
        .unwrap()
        .map(|example| example.input_ids[0])
        .collect()
}

#[test]
fn a_split_divides_all_rows_by_the_seed() {
    let dir = tempfile::tempdir().unwrap();
    let split = |data_seed| {
        run(dir.path(), |config| {
            config.eval_dataset_size = Some(3);
            config.data_seed = data_seed;
        })
    };
    let data = split(42);
    let (train, eval) = (train_rows(&data), eval_rows(&data));
    assert_eq!((train.len(), eval.len(), data.unused), (7, 3, 0));
    assert!(
        train.is_sorted() && eval.is_sorted(),
        "both keep the order of the file"
    );
    let mut all = [train.clone(), eval.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (1..=10).collect::<Vec<_>>());
    assert_eq!(eval_rows(&split(42)), eval);
    assert_ne!(eval_rows(&split(43)), eval);
}

#[test]
fn limits_count_after_a_split_and_what_they_leave_out_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let whole = run(dir.path(), |config| config.eval_dataset_size = Some(3));
    let data = run(dir.path(), |config| {
        config.eval_dataset_size = Some(3);
        config.max_train_samples = Some(4);
        config.max_eval_samples = Some(2);
    });
    assert_eq!(train_rows(&data), train_rows(&whole)[..4]);
    assert_eq!(eval_rows(&data), eval_rows(&whole)[..2]);
    assert_eq!(data.unused, 4);
    let first = run(dir.path(), |config| config.max_train_samples = Some(4));
    assert_eq!(train_rows(&first), [1, 2, 3, 4]);
}

#[test]
fn several_data_sets_are_used_by_their_weights() {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other.jsonl");
    std::fs::write(
        &other,
        jsonl(&[
            json!({"input_ids": [60, 50]}),
            json!({"input_ids": [61, 50]}),
        ]),
    )
    .unwrap();
    let config = TrainConfig {
        dataset: serde_json::from_value(json!([dir.path().join("rows.jsonl"), other])).unwrap(),
        dataset_weights: Some(serde_json::from_value(json!([0.5, 2])).unwrap()),
        ..TrainConfig::default()
    };
    run(dir.path(), |_| ());
    let data = RunData::load(&config, None, None).unwrap();
    assert_eq!((data.train_len(), data.sources.len()), (12, 2));
    let mut order = data.order(&config);
    assert_eq!(order.sequences(1.0), 9.0);
    let firsts = (0..9).map(|position| data.train_example(order.rows(position)[0]).input_ids[0]);
    let firsts: Vec<u32> = firsts.collect();
    assert_eq!(firsts.iter().filter(|&&id| id >= 60).count(), 4);
}

#[test]
fn weights_that_make_an_epoch_of_too_many_rows_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), |_| ());
    let path = dir.path().join("rows.jsonl");
    let load = |weights: Value| {
        let config = TrainConfig {
            dataset: serde_json::from_value(json!([path, path])).unwrap(),
            dataset_weights: Some(serde_json::from_value(weights).unwrap()),
            ..TrainConfig::default()
        };
        RunData::load(&config, None, None)
    };
    for (weights, rows) in [(json!([1e300, 1]), "1.0e301"), (json!([1, 1e9]), "1.0e10")] {
        let error = load(weights).err().unwrap().to_string();
        let expected = format!("`dataset_weights`: would make an epoch of {rows} rows");
        assert!(error.contains(&expected), "{error}");
    }
    assert!(load(json!([1000, 1])).is_ok());
}

#[test]
fn a_line_is_told_with_its_file_where_there_are_several() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, rows: &[Value]| {
        std::fs::write(dir.path().join(name), jsonl(rows)).unwrap();
    };
    let trained = |id: u32| json!({"input_ids": [id, 50]});
    let masked = json!({"input_ids": [1, 2], "labels": [-100, -100]});
    write("a.jsonl", &[trained(1), trained(2)]);
    write("b.jsonl", &[masked.clone(), trained(3)]);
    write("c.jsonl", &[trained(4)]);
    let load = || {
        let config = TrainConfig {
            dataset: dir.path().to_path_buf().into(),
            dataset_cache_dir: Some(dir.path().join("cache")),
            ..TrainConfig::default()
        };
        RunData::load(&config, None, None).unwrap()
    };
    let path = |name: &str| dir.path().join(name).display().to_string();
    let expected = [("a", 1), ("a", 2), ("b", 2), ("c", 1)];
    let expected =
        expected.map(|(name, line)| format!("{}:{line}", path(&format!("{name}.jsonl"))));
    // Read, and then taken from the cache.
    for data in [load(), load()] {
        let names: Vec<String> = (0..4).map(|row| data.row_name(row)).collect();
        assert_eq!(names, expected);
        let sentence = &data.sources[0].dataset.sentences()[0];
        let first = format!("(the first in line 1 of {})", path("b.jsonl"));
        assert!(sentence.contains(&first), "{sentence}");
    }

    write("a.jsonl", std::slice::from_ref(&masked));
    write("b.jsonl", &[masked]);
    std::fs::write(path("c.jsonl"), "").unwrap();
    let error = load_files(
        &["c.jsonl", "a.jsonl", "b.jsonl"].map(|name| dir.path().join(name)),
        &LoadOptions::default(),
        None,
    );
    let error = error.err().unwrap().to_string();
    assert!(
        error.starts_with(&format!("{}:1: ", path("a.jsonl"))),
        "{error}"
    );
}
