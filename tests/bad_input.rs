//! Bad input to `qlora train`: exit status 1, one line that names the file and the line, nothing left under a final name.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// A copy of a small model, so that a test can break it.
    fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engine/llama_gqa");
        fs::create_dir(bench.model()).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(case.join(file), bench.model().join(file)).unwrap();
        }
        fs::copy(case.join("train/data.jsonl"), bench.data()).unwrap();
        bench
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data.jsonl")
    }

    fn output(&self) -> PathBuf {
        self.dir.path().join("output")
    }

    fn arguments(&self) -> Vec<String> {
        let path = |p: PathBuf| p.to_str().unwrap().to_string();
        let mut arguments = vec!["train".to_string()];
        for (key, value) in [
            ("--model_name_or_path", path(self.model())),
            ("--dataset", path(self.data())),
            ("--output_dir", path(self.output())),
            ("--max_steps", "2".into()),
        ] {
            arguments.extend([key.to_string(), value]);
        }
        arguments
    }

    /// Runs `qlora train` and gives its one line of error.
    fn fails(&self) -> String {
        self.fails_with(&[])
    }

    fn fails_with(&self, flags: &[&str]) -> String {
        let mut command = Command::cargo_bin("qlora").unwrap();
        let run = command.args(self.arguments()).args(flags).assert().code(1);
        assert!(run.get_output().stdout.is_empty());
        assert!(!self.output().join("adapter_model.safetensors").exists());
        error_line(&run.get_output().stderr)
    }
}

fn error_line(stderr: &[u8]) -> String {
    let text = String::from_utf8(stderr.to_vec()).unwrap();
    let errors: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{text}");
    assert_eq!(
        text.lines().last(),
        errors.last().copied(),
        "the error comes last: {text}"
    );
    errors[0].to_string()
}

#[track_caller]
fn names(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn a_missing_model_is_named() {
    let bench = Bench::new();
    fs::remove_dir_all(bench.model()).unwrap();
    names(&bench.fails(), &["model"]);
}

#[test]
fn a_missing_data_file_is_named() {
    let bench = Bench::new();
    fs::remove_file(bench.data()).unwrap();
    names(&bench.fails(), &["data.jsonl", "No such file"]);
}

#[test]
fn a_truncated_weight_file_is_named() {
    let bench = Bench::new();
    let path = bench.model().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 100]).unwrap();
    names(&bench.fails(), &["model.safetensors"]);
}

#[test]
fn a_model_type_that_is_not_understood_is_named() {
    let bench = Bench::new();
    let path = bench.model().join("config.json");
    let config = fs::read_to_string(&path)
        .unwrap()
        .replace("\"llama\"", "\"mamba\"");
    fs::write(&path, config).unwrap();
    names(&bench.fails(), &["config.json", "model_type", "mamba"]);
}

#[test]
fn an_empty_data_file_is_named() {
    let bench = Bench::new();
    fs::write(bench.data(), "").unwrap();
    names(&bench.fails(), &["data.jsonl"]);
}

#[test]
fn a_row_of_the_wrong_type_is_named_with_its_line() {
    let bench = Bench::new();
    let good = "{\"input_ids\": [5, 6, 7], \"labels\": [5, 6, 7]}\n";
    for bad in [
        "{\"input_ids\": \"text\"}",
        "[1, 2",
        "{\"input_ids\": [5.5]}",
        "{\"input_ids\": [-3, 4]}",
    ] {
        fs::write(bench.data(), format!("{good}{bad}\n{good}")).unwrap();
        names(&bench.fails(), &["data.jsonl:2:"]);
    }
}

#[test]
fn a_token_id_beyond_the_vocabulary_is_named_with_its_line() {
    let bench = Bench::new();
    fs::write(
        bench.data(),
        "{\"input_ids\": [5, 6]}\n{\"input_ids\": [5, 1000000]}\n",
    )
    .unwrap();
    names(&bench.fails(), &["data.jsonl:2:", "1000000"]);
}

#[test]
fn rows_without_a_single_label_are_an_error() {
    let bench = Bench::new();
    fs::write(
        bench.data(),
        "{\"input_ids\": [5, 6, 7], \"labels\": [-100, -100, -100]}\n",
    )
    .unwrap();
    names(&bench.fails(), &["data.jsonl", "-100"]);
}

/// A limit on the size of files stands in for a full disk: both make the write fail.
#[test]
#[cfg(unix)]
fn a_disk_that_is_full_leaves_nothing_under_a_final_name() {
    let bench = Bench::new();
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg("ulimit -f 4; trap '' XFSZ; exec \"$0\" \"$@\"");
    shell
        .arg(assert_cmd::cargo::cargo_bin("qlora"))
        .args(bench.arguments());
    let run = shell.assert().code(1);
    names(
        &error_line(&run.get_output().stderr),
        &["output", "too large"],
    );
    let left: Vec<PathBuf> = fs::read_dir(bench.output())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    let is_final = |path: &PathBuf| {
        path.ends_with("adapter_model.safetensors") || path.ends_with("checkpoint-2")
    };
    assert!(!left.iter().any(is_final), "{left:?}");
}

#[test]
#[cfg(unix)]
fn an_output_directory_that_cannot_be_made_is_named() {
    let bench = Bench::new();
    fs::write(bench.output(), "a file").unwrap();
    names(&bench.fails(), &["output"]);
}

#[test]
fn an_adapter_of_another_model_is_named() {
    let bench = Bench::new();
    let adapter = format!(
        "{}/tests/fixtures/engine/qwen3/adapter",
        env!("CARGO_MANIFEST_DIR")
    );
    names(
        &bench.fails_with(&["--adapter", &adapter]),
        &[
            "qwen3/adapter: does not fit the model",
            "q_proj.lora_B.weight",
        ],
    );
}

#[test]
fn a_weight_file_in_place_of_its_directory_is_told_what_to_give() {
    let bench = Bench::new();
    let inside = bench.dir.path().join("inside");
    fs::rename(bench.model(), &inside).unwrap();
    fs::rename(inside.join("model.safetensors"), bench.model()).unwrap();
    names(&bench.fails(), &["is a file, give the directory"]);
}

#[test]
fn text_for_a_model_without_a_tokenizer_says_what_is_missing() {
    let bench = Bench::new();
    let row = r#"{"input": "a", "output": "b"}"#;
    fs::write(bench.data(), row).unwrap();
    names(&bench.fails(), &["input-output", "tokenizer.json"]);
}

/// What a run makes are files: it goes on when the reader of its messages is gone.
#[test]
#[cfg(unix)]
fn a_run_outlives_the_reader_of_its_output() {
    let bench = Bench::new();
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg("\"$0\" \"$@\" 2>&1 | true; test -f \"$ADAPTER\"");
    shell
        .arg(assert_cmd::cargo::cargo_bin("qlora"))
        .args(bench.arguments())
        .env("ADAPTER", bench.output().join("adapter_model.safetensors"));
    shell.assert().success();
}
