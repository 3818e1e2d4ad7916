//! Tokenized rows are kept on disk, found again by what they were made of, and never taken for other ones.

mod data_files;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use data_files::{fixtures, jsonl};
use qlora::data::{Example, LoadOptions, Tokenizer, load};
use serde_json::json;

fn cached(dir: &Path) -> LoadOptions {
    LoadOptions {
        cache_dir: Some(dir.join("cache")),
        ..LoadOptions::default()
    }
}

fn write(dir: &Path, name: &str, output: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(
        &path,
        jsonl(&[
            json!({"input": "a", "output": output}),
            json!({"input": "b", "output": "été"}),
        ]),
    )
    .unwrap();
    path
}

fn tokenizer() -> Tokenizer {
    data_files::tokenizer("tokenizer")
}

fn rows(path: &Path, options: &LoadOptions, tokenizer: &Tokenizer) -> Vec<Example> {
    load(path, options, Some(tokenizer))
        .unwrap()
        .examples()
        .collect()
}

fn kept(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join("cache")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Sets a time that no new file can have, to see whether the file is written again.
fn age(path: &Path) {
    let long_ago = SystemTime::now() - Duration::from_secs(1000);
    std::fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
}

fn is_aged(path: &Path) -> bool {
    let modified = path.metadata().unwrap().modified().unwrap();
    modified.elapsed().unwrap() > Duration::from_secs(500)
}

#[test]
fn a_second_load_takes_the_rows_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.jsonl", "x");
    let options = cached(dir.path());
    let plain = load(&path, &LoadOptions::default(), Some(&tokenizer())).unwrap();
    let first = load(&path, &options, Some(&tokenizer())).unwrap();
    let files = kept(dir.path());
    assert_eq!(files.len(), 1, "{files:?}");
    age(&files[0]);
    // The name of the file does not matter, what it holds does.
    let copy = write(dir.path(), "b.jsonl", "x");
    let second = load(&copy, &options, Some(&tokenizer())).unwrap();
    assert_eq!(kept(dir.path()), files);
    assert!(is_aged(&files[0]));
    for dataset in [&first, &second] {
        assert_eq!(
            dataset.examples().collect::<Vec<_>>(),
            plain.examples().collect::<Vec<_>>()
        );
        assert_eq!(
            (dataset.format, &dataset.detected),
            (plain.format, &plain.detected)
        );
        assert_eq!(
            (dataset.stats, dataset.findings),
            (plain.stats, plain.findings)
        );
    }
}

#[test]
fn another_file_tokenizer_or_option_is_another_entry() {
    let dir = tempfile::tempdir().unwrap();
    let options = cached(dir.path());
    let path = write(dir.path(), "a.jsonl", "x");
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixtures().join("tokenizer").join(name), model.join(name)).unwrap();
    }
    rows(&path, &options, &tokenizer());
    let mut expected = 1;
    let mut expect_one_more = |what: &str| {
        expected += 1;
        assert_eq!(kept(dir.path()).len(), expected, "{what}");
    };
    rows(&write(dir.path(), "b.jsonl", "y"), &options, &tokenizer());
    expect_one_more("another row");
    rows(
        &path,
        &LoadOptions {
            max_seq_len: Some(3),
            ..options.clone()
        },
        &tokenizer(),
    );
    expect_one_more("another option");
    rows(
        &path,
        &options,
        &data_files::tokenizer("tokenizer_metaspace"),
    );
    expect_one_more("another vocabulary");
    std::fs::write(model.join("chat_template.jinja"), "x").unwrap();
    rows(&path, &options, &Tokenizer::from_dir(&model).unwrap());
    expect_one_more("another template");
    std::fs::write(
        model.join("chat_template.jinja"),
        "y{{ strftime_now('%Y') }}",
    )
    .unwrap();
    rows(&path, &options, &Tokenizer::from_dir(&model).unwrap());
    expect_one_more("another text of the template");
    std::fs::write(
        model.join("generation_config.json"),
        "{\"eos_token_id\": 5}",
    )
    .unwrap();
    rows(&path, &options, &Tokenizer::from_dir(&model).unwrap());
    expect_one_more("another end token");
}

#[test]
fn a_damaged_entry_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let options = cached(dir.path());
    let path = write(dir.path(), "a.jsonl", "x");
    let expected = rows(&path, &options, &tokenizer());
    let entry = kept(dir.path()).remove(0);
    let whole = std::fs::read(&entry).unwrap();
    for damaged in [&whole[..whole.len() - 1], b"", b"qlorarow", &whole[1..]] {
        std::fs::write(&entry, damaged).unwrap();
        assert_eq!(rows(&path, &options, &tokenizer()), expected);
        assert_eq!(std::fs::read(&entry).unwrap(), whole);
    }
}

#[test]
fn a_failed_load_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    std::fs::write(&path, "{\"input\": \"a\", \"output\": \"b\"}\n{}\n").unwrap();
    load(&path, &cached(dir.path()), Some(&tokenizer())).unwrap_err();
    assert_eq!(kept(dir.path()), [""; 0].map(PathBuf::from));
}

/// Nobody has asked for the one in the home directory.
#[test]
fn a_home_that_cannot_be_written_to_costs_the_cache_alone() {
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large.jsonl");
    let row = json!({"input_ids": vec![1; 1 << 16]});
    std::fs::write(&large, jsonl(&vec![row; 150])).unwrap();
    let inspect = |home: &Path| {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("qlora"));
        command.arg("inspect").arg(&large).env("HOME", home);
        let output = command.env_remove("XDG_CACHE_HOME").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    // A file is in the way.
    let told = inspect(&large);
    assert!(told.contains("tokenized rows are not kept there"), "{told}");
    assert_eq!(inspect(dir.path()), "");
    let kept = std::fs::read_dir(dir.path().join(".cache/qlora")).unwrap();
    assert_eq!(kept.count(), 1);
}

#[test]
fn added_tokens_and_the_template_for_tools_are_part_of_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.jsonl", "x");
    let entry = json!({"content": "</s>", "lstrip": true, "special": true});
    let named = |tool_use: &str| {
        let tool_use = json!({"name": "tool_use", "template": tool_use});
        json!({"chat_template": [{"name": "default", "template": "d"}, tool_use]})
    };
    for (i, changes) in [
        json!({}),
        json!({"added_tokens_decoder": {"2": entry}}),
        named("t"),
        named("u"),
    ]
    .into_iter()
    .enumerate()
    {
        let model = data_files::model_dir("tokenizer", changes);
        let tokenizer = Tokenizer::from_dir(model.path()).unwrap();
        rows(&path, &cached(dir.path()), &tokenizer);
        assert_eq!(kept(dir.path()).len(), i + 1);
    }
}
