//! The command line as a contract: exit statuses, flags, and the help texts that `docs/command-line.md` shows.

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use qlora::train::config::KEYS;
use serde_json::Value;

/// Where the help texts are shown.
const PAGE: &str = "docs/command-line.md";

fn qlora() -> Command {
    let mut command = Command::cargo_bin("qlora").unwrap();
    // The width that clap wraps help texts to, where there is no terminal.
    command.env("COLUMNS", "100");
    command
}

fn help(arguments: &[&str]) -> String {
    let output = qlora().args(arguments).arg("--help").assert().success();
    String::from_utf8(output.get_output().stdout.clone()).unwrap()
}

/// The commands that `qlora --help` lists.
fn commands() -> Vec<String> {
    let help = help(&[]);
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = listed.take_while(|line| !line.is_empty());
    // A line that is indented further continues the one above.
    let names = names.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names = names.filter(|name| !name.is_empty() && *name != "help");
    names.map(str::to_string).collect()
}

/// One line on stderr that starts with `error: `, and nothing on stdout.
fn one_error_line(text: &str) -> bool {
    text.starts_with("error: ") && text.ends_with('\n') && text.matches('\n').count() == 1
}

#[test]
fn wrong_usage_ends_with_2_and_the_nearest_name() {
    for (arguments, expected) in [
        (&["trian"][..], "'train'"),
        (&["train", "--lora_rr", "3"], "'--lora_r'"),
        (
            &["train", "--batch-size", "3"],
            "'--per_device_train_batch_size'",
        ),
        (
            &["train", "--lora_r", "abc"],
            "expected a non-negative integer, found `abc`",
        ),
        (
            &["train", "--lora_r", "-1"],
            "expected a non-negative integer, found `-1`",
        ),
        (&["train", "--optim", "lion_32bit"], "paged_adamw_8bit"),
        (
            &["train", "--double_quant", "perhaps"],
            "expected true or false",
        ),
        (&["train", "--threads", "0"], "at least 1"),
        (&["train", "a.toml", "b.toml"], "'b.toml'"),
        (&[], "Usage: qlora"),
    ] {
        let assert = qlora().args(arguments).assert().code(2);
        assert.stdout("").stderr(contains(expected));
    }
}

#[test]
fn a_failure_ends_with_1_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.toml"), "lora_r = 2\nlora_alfa = 3\n").unwrap();
    for (arguments, expected) in [
        (&["train"][..], "`model_name_or_path`: is required"),
        (
            &["train", "a.toml"],
            "unknown config key `lora_alfa`, did you mean `lora_alpha`?",
        ),
        (&["train", "missing.toml"], "missing.toml: No such file"),
        (&["train", "--lora_r", "0"], "`lora_r`: must be at least 1"),
        (
            &["train", "--lora_dropout", "1"],
            "`lora_dropout`: must be at least 0 and less than 1",
        ),
        (
            &["train", "--packing"],
            "`packing`: fills sequences of max_seq_len tokens",
        ),
        (
            &[
                "train",
                "--model_name_or_path",
                "m",
                "--dataset",
                "d",
                "--device",
                "cuda",
            ],
            "use --device cpu",
        ),
        (
            &["train", "--model_name_or_path", "m", "--dataset", "d"],
            "error: ",
        ),
    ] {
        let assert = qlora().current_dir(&dir).args(arguments).assert().code(1);
        let stderr = predicate::function(one_error_line).and(contains(expected));
        assert.stdout("").stderr(stderr);
    }
    let left: Vec<_> = std::fs::read_dir(&dir).unwrap().collect();
    assert_eq!(left.len(), 1, "a failed run left {left:?}");
}

#[test]
fn flags_are_spelled_with_underscores_hyphens_or_an_equals_sign() {
    for spelled in [
        &["--lora_r", "0"][..],
        &["--lora-r", "0"],
        &["--lora_r=0"],
        &["--lora-r=0"],
        // A bare flag does not take the next one for its value.
        &["--train_on_source", "--lora_r", "0"],
        &["--train_on_source", "false", "--lora_r", "0"],
    ] {
        let assert = qlora().arg("train").args(spelled).assert().code(1);
        assert.stderr(contains("config key `lora_r`: must be at least 1, found 0"));
    }
}

#[test]
fn bench_speed_takes_sizes_by_their_names_in_config_json() {
    let sizes = "--hidden_size 32 --intermediate_size 64 --num_hidden_layers 1 --num_attention_heads 2 \
        --vocab_size 50 --max_seq_len 16 --lora_r 2 --max_steps 2 --json";
    let mut command = qlora();
    let run = command
        .args(["bench", "speed"])
        .args(sizes.split_whitespace());
    let output = run.assert().success();
    let report: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(report["shape"]["hidden_size"], 32);
    assert_eq!(report["step_seconds"].as_array().unwrap().len(), 2);
    assert!(report["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(report["peak_memory_bytes"].as_u64().unwrap() > 0);

    let refused = qlora()
        .args(["bench", "speed", "--dataset", "rows.jsonl"])
        .assert()
        .code(1);
    refused.stdout("").stderr(contains("--dataset"));
}

#[test]
fn help_of_train_lists_every_key_with_its_default() {
    let help = help(&["train"]);
    let words: Vec<_> = help.split_whitespace().collect();
    let words = words.join(" ");
    for key in KEYS {
        assert!(
            words.contains(&format!("--{} ", key.name)),
            "{} is missing",
            key.name
        );
        if let Some(default) = key.default_text().filter(|_| key.name != "threads") {
            let line = format!("{} [default: {default}]", key.help);
            assert!(words.contains(&line), "no `{line}`");
        }
    }
}

#[test]
fn bench_kernels_measures_every_operation() {
    let arguments =
        "bench kernels --device cpu --tokens 64 --hidden_size 128 --num_attention_heads 1 --json";
    let output = assert_cmd::Command::cargo_bin("qlora")
        .unwrap()
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let kernels = report["kernels"].as_array().unwrap();
    for name in [
        "copy",
        "rms_norm",
        "gated_act",
        "rope",
        "linear forward with an adapter, dropout",
        "attention",
        "adamw",
    ] {
        let of_name =
            |kernel: &&serde_json::Value| kernel["name"].as_str().unwrap().starts_with(name);
        let measured = kernels
            .iter()
            .find(of_name)
            .unwrap_or_else(|| panic!("no {name}"));
        assert!(measured["rate"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn a_closed_pipe_is_no_panic() {
    let binary = assert_cmd::cargo::cargo_bin("qlora");
    let script = format!("'{}' train --help | head -n 1", binary.display());
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

/// `PAGE` shows each help text in a fenced block after `<!-- help: COMMAND -->`, and `<!-- help: qlora -->` for the
/// program. `UPDATE_DOCS=1 cargo test --test cli` writes them anew.
#[test]
fn the_page_shows_the_help_texts_as_they_are() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let page = std::fs::read_to_string(&path).unwrap();
    let mut updated = page.clone();
    let names = [
        "qlora",
        "bench speed",
        "bench kernels",
        "verify run",
        "verify export",
    ];
    let names = names.map(str::to_string);
    for name in names.into_iter().chain(commands()) {
        let arguments: Vec<&str> = name.split(' ').filter(|word| *word != "qlora").collect();
        let block = format!("\n```text\n{}```\n", help(&arguments));
        updated = with_block(&updated, &format!("<!-- help: {name} -->"), &block);
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &updated).unwrap();
    } else {
        let refresh =
            format!("{PAGE} is not what --help says: run UPDATE_DOCS=1 cargo test --test cli");
        similar_lines(&page, &updated, &refresh);
    }
}

/// Puts `block` after `marker`, in the place of the fenced block that follows it, if one does.
fn with_block(page: &str, marker: &str, block: &str) -> String {
    let at = page
        .find(marker)
        .unwrap_or_else(|| panic!("{PAGE} has no `{marker}`"));
    let (before, after) = page.split_at(at + marker.len());
    let rest = match after.trim_start().strip_prefix("```text\n") {
        Some(fenced) => fenced.split_once("\n```\n").expect("a fenced block ends").1,
        None => after.trim_start_matches('\n'),
    };
    format!("{before}{block}{rest}")
}

/// Names the first line that differs, which a comparison of the whole text would bury.
fn similar_lines(found: &str, expected: &str, what: &str) {
    for (number, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "line {}: {what}", number + 1);
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}
