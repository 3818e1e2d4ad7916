//! `qlora eval --mmlu` from the command line.

use std::path::PathBuf;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use qlora::data::{LETTERS, Question};
use qlora::infer::{Ensemble, MultipleChoice, multiple_choice, multiple_choice_ensemble};
use serde_json::{Value, json};

use super::reference_case::ReferenceCase;
use super::{BOS, LETTER_IDS, model_with_tokenizer};

fn words(ids: &[u32]) -> String {
    let words: Vec<String> = ids.iter().map(|id| format!("w{id}")).collect();
    words.join(" ")
}

/// A model with a tokenizer, and questions of two subjects as a row of qlora.py has them.
struct CommandCase {
    case: ReferenceCase,
    dir: tempfile::TempDir,
    model: PathBuf,
    questions: Vec<Question>,
}

impl CommandCase {
    fn new() -> Self {
        let case = ReferenceCase::read("llama_gqa");
        let dir = tempfile::tempdir().unwrap();
        let model = model_with_tokenizer(&case, dir.path(), "ABCD");
        let prompts: [&[u32]; 5] = [
            &[7, 9],
            &[20, 30, 50, 60],
            &[99],
            &[2, 3, 5],
            &[77, 88, 101],
        ];
        let questions = prompts.iter().enumerate().map(|(i, prompt)| Question {
            subject: if i == 1 { "one" } else { "four" }.to_string(),
            prompt: [&[BOS], *prompt].concat(),
            answer: i % 4,
        });
        Self {
            questions: questions.collect(),
            case,
            dir,
            model,
        }
    }

    /// Writes the questions and gives their measures, computed by the library.
    fn write(&self, name: &str, questions: &[Question]) -> MultipleChoice {
        let rows = questions.iter().map(|question| {
            json!({
                "subject": question.subject,
                "input": words(&question.prompt[1..]),
                "output": LETTERS[question.answer],
            })
        });
        let dir = self.dir.path().join("mmlu");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(name), Value::from_iter(rows).to_string()).unwrap();
        let decoder = self.case.decoder();
        let answers = multiple_choice(&decoder, LETTER_IDS, questions, |_| {});
        MultipleChoice::new(questions, &answers.unwrap())
    }

    fn eval(&self, arguments: &[&str]) -> assert_cmd::assert::Assert {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("qlora"));
        command.current_dir(self.dir.path()).arg("eval");
        command.arg("--model").arg(&self.model);
        command.arg("--adapter").arg(&self.case.adapter);
        command.args(arguments).assert()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.eval(&[arguments, &["--json"]].concat()).success();
        serde_json::from_slice(&output.get_output().stdout).unwrap()
    }
}

fn keys(report: &Value) -> Vec<&str> {
    report
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[test]
fn eval_prints_what_qlora_py_logs() {
    let case = CommandCase::new();
    let expected = case.write("zero_shot_mmlu_val.json", &case.questions);
    let found = case.json(&["--mmlu", "mmlu"]);
    let names = [
        "mmlu_eval_accuracy",
        "mmlu_loss",
        "mmlu_questions",
        "mmlu_eval_accuracy_four",
        "mmlu_eval_accuracy_one",
    ];
    assert_eq!(keys(&found), names);
    assert_eq!(found["mmlu_eval_accuracy"], expected.accuracy);
    assert_eq!(found["mmlu_loss"], expected.loss);
    assert_eq!(found["mmlu_questions"], 5);
    let (four, one) = (expected.subjects["four"], expected.subjects["one"]);
    assert_eq!(found["mmlu_eval_accuracy_four"], four);
    assert_eq!(found["mmlu_eval_accuracy_one"], one);
    assert_eq!(expected.accuracy, (four + one) / 2.0);
    assert_eq!(
        found,
        case.json(&["--mmlu", "mmlu/zero_shot_mmlu_val.json"])
    );

    let output = case.eval(&["--mmlu", "mmlu"]).success();
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(lines.iter().map(|line| line[0]).collect::<Vec<_>>(), names);
    assert_eq!(lines[0][1], format!("{:.4}", expected.accuracy));
    assert_eq!(lines[2][1], "5");
    let width = text.lines().next().unwrap().len();
    assert!(text.lines().all(|line| line.len() == width), "{text}");
    output.stderr(contains("zero_shot_mmlu_val.json: 5 questions\n"));

    let cut = case
        .eval(&["--mmlu", "mmlu", "--mmlu_source_max_len", "3"])
        .success();
    cut.stderr(contains(
        "5 questions, 3 of them cut at the beginning to 3 tokens",
    ));
    assert_eq!(
        case.json(&["--mmlu", "mmlu", "--max_eval_samples", "2"])["mmlu_questions"],
        2
    );
}

#[test]
fn measures_of_several_files_have_names_of_their_own() {
    let case = CommandCase::new();
    let one = |i: usize| &case.questions[i..=i];
    case.write("zero_shot_mmlu_val.json", one(0));
    let test = case.write("zero_shot_mmlu_test.json", one(1));
    let found = case.json(&["--mmlu", "mmlu"]);
    assert_eq!(
        keys(&found),
        [
            "mmlu_eval_accuracy",
            "mmlu_eval_loss",
            "mmlu_eval_questions",
            "mmlu_eval_accuracy_four",
            "mmlu_test_accuracy",
            "mmlu_test_loss",
            "mmlu_test_questions",
            "mmlu_test_accuracy_one",
        ]
    );
    assert_eq!(found["mmlu_test_loss"], test.loss);

    std::fs::remove_file(case.dir.path().join("mmlu/zero_shot_mmlu_test.json")).unwrap();
    let five = case.write("five_shot_mmlu_val.json", one(2));
    let found = case.json(&["--mmlu", "mmlu"]);
    assert_eq!(
        keys(&found),
        [
            "mmlu_zero_shot_eval_accuracy",
            "mmlu_zero_shot_loss",
            "mmlu_zero_shot_questions",
            "mmlu_zero_shot_eval_accuracy_four",
            "mmlu_five_shot_eval_accuracy",
            "mmlu_five_shot_loss",
            "mmlu_five_shot_questions",
            "mmlu_five_shot_eval_accuracy_four",
        ]
    );
    assert_eq!(found["mmlu_five_shot_loss"], five.loss);

    let other = case.write("other.json", one(3));
    let found = case.json(&["--mmlu", "mmlu/other.json"]);
    assert_eq!(found["mmlu_accuracy"], other.accuracy);
    assert_eq!(found["mmlu_loss"], other.loss);
}

#[test]
fn questions_are_answered_beside_rows_and_by_ensembles() {
    let case = CommandCase::new();
    case.write("five_shot_mmlu_test.json", &case.questions);
    let rows = "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5]}\n";
    std::fs::write(case.dir.path().join("rows.jsonl"), rows).unwrap();
    let data = case.json(&["--data", "rows.jsonl"]);
    let mmlu = case.json(&["--mmlu", "mmlu"]);
    let mut both = data.as_object().unwrap().clone();
    both.extend(mmlu.as_object().unwrap().clone());
    let given = ["--data", "rows.jsonl", "--mmlu", "mmlu"];
    assert_eq!(case.json(&given), Value::Object(both));

    let masks = ["--ensemble", "1,2", "--lora_matrix_dropout", "0.5"];
    let found = case.json(&[&given[..], &masks].concat());
    assert_eq!(found["mmlu_loss"], mmlu["mmlu_loss"]);
    let ensemble = Ensemble::new(0.5, 0, 2).unwrap();
    let of = (&ensemble, &[1, 2][..]);
    let decoder = case.case.decoder();
    let expected =
        multiple_choice_ensemble(&decoder, of, LETTER_IDS, &case.questions, |_| {}).unwrap();
    let ensembles = found["ensembles"].as_array().unwrap();
    for ((found, expected), models) in ensembles.iter().zip(&expected).zip(1..) {
        let expected = MultipleChoice::new(&case.questions, expected);
        assert_eq!(found["models"], models);
        assert_eq!(found["mmlu_loss"], expected.loss);
        assert_eq!(found["mmlu_test_accuracy"], expected.accuracy);
        assert!(found["perplexity"].is_number());
    }
    assert_ne!(ensembles[0]["mmlu_loss"], ensembles[1]["mmlu_loss"]);
    let output = case
        .eval(&[&["--mmlu", "mmlu"][..], &masks].concat())
        .success();
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    let head = text.lines().next().unwrap();
    assert!(
        head.ends_with("   plain adapter   ensemble of 1   ensemble of 2"),
        "{text}"
    );
}

#[test]
fn what_is_not_there_is_refused() {
    let case = CommandCase::new();
    case.eval(&[])
        .code(2)
        .stderr(contains("--data").and(contains("--mmlu")));
    let usage = |arguments: &[&str]| case.eval(arguments).code(2).stdout("");
    usage(&["--mmlu", "mmlu", "--logprobs", "out.safetensors"]);
    usage(&["--data", "rows.jsonl", "--mmlu_source_max_len", "9"]);
    usage(&["--mmlu", "mmlu", "--mmlu_source_max_len", "1"]);
    let fails = |arguments: &[&str], expected: &str| {
        let one_line = predicate::function(|text: &str| text.lines().count() == 1);
        let run = case.eval(arguments).code(1).stdout("");
        run.stderr(contains(expected.to_string()).and(one_line));
    };
    fails(&["--mmlu", "mmlu"], "mmlu: ");
    std::fs::create_dir(case.dir.path().join("mmlu")).unwrap();
    fails(&["--mmlu", "mmlu"], "mmlu: the directory has no questions");
    std::fs::write(case.dir.path().join("mmlu/zero_shot_mmlu_val.json"), "[{}]").unwrap();
    fails(
        &["--mmlu", "mmlu"],
        "zero_shot_mmlu_val.json:1: column `subject`",
    );
    let masks = ["--mmlu", "mmlu", "--ensemble", "2"];
    fails(&masks, "was not trained with lora_matrix_dropout");
    std::fs::remove_file(case.model.join("tokenizer.json")).unwrap();
    fails(
        &["--mmlu", "mmlu"],
        "--mmlu: the model has no tokenizer.json",
    );
}

#[test]
fn training_says_where_the_questions_of_mmlu_are_answered() {
    for key in [["--do_mmlu_eval", "true"], ["--mmlu_split", "test"]] {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("qlora"));
        command
            .arg("train")
            .args(key)
            .assert()
            .code(1)
            .stderr(contains(
                "is not supported: `qlora eval --mmlu DIR` does it after training; leave it out",
            ));
    }
}
