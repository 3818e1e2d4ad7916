//! `qlora eval`, `qlora generate` and `qlora chat` from the command line.

mod reference_case;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use qlora::IGNORE_INDEX;
use qlora::infer::{GenerateOptions, Sampler, SamplingOptions, Session, generate};
use reference_case::{ReferenceCase, floats, largest_difference};
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn qlora() -> Command {
    Command::new(assert_cmd::cargo::cargo_bin!("qlora"))
}

fn write_rows(case: &ReferenceCase, path: &Path) {
    let rows = case.examples.iter();
    let lines =
        rows.map(|e| json!({"input_ids": e.input_ids, "labels": e.labels}).to_string() + "\n");
    std::fs::write(path, lines.collect::<String>()).unwrap();
}

/// The case's checkpoint with a tokenizer in which the word `w7` is token 7.
fn model_with_tokenizer(case: &ReferenceCase, dir: &Path) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(case.dir.join(file), model.join(file)).unwrap();
    }
    let vocab: serde_json::Map<String, Value> =
        (0..256).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(model.join("tokenizer_config.json"), "{}").unwrap();
    model
}

fn words(ids: &[u32]) -> String {
    let words: Vec<String> = ids.iter().map(|id| format!("w{id}")).collect();
    words.join(" ")
}

fn stdout_json(command: &mut Command) -> Value {
    let output = command.assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

#[test]
fn eval_prints_the_reference_loss_and_writes_every_log_probability() {
    let case = ReferenceCase::read("llama_odd");
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (
        dir.path().join("rows.jsonl"),
        dir.path().join("out.safetensors"),
    );
    write_rows(&case, &data);
    let mut command = qlora();
    command
        .arg("eval")
        .arg("--model")
        .arg(&case.dir)
        .arg("--data")
        .arg(&data);
    command.arg("--adapter").arg(case.dir.join("adapter"));
    let found = stdout_json(command.args(["--json", "--logprobs"]).arg(&out));
    let loss = found["loss"].as_f64().unwrap();
    assert!((loss - f64::from(case.loss)).abs() < 1e-5, "{found}");
    assert!((found["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-6);
    let labels = case.examples.iter().flat_map(|e| &e.labels);
    assert_eq!(
        found["tokens"],
        labels.filter(|l| **l != IGNORE_INDEX).count()
    );
    for key in ["token_accuracy", "ece"] {
        assert!(
            (0.0..=1.0).contains(&found[key].as_f64().unwrap()),
            "{found}"
        );
    }

    let bytes = std::fs::read(&out).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), case.examples.len());
    for (row, (example, logits)) in case.examples.iter().zip(&case.logits).enumerate() {
        let name = format!("logprobs.{row}");
        let t = example.input_ids.len();
        assert_eq!(tensors.tensor(&name).unwrap().shape(), [t - 1]);
        let rows = logits.chunks_exact(logits.len() / t);
        let expected: Vec<f32> = rows
            .zip(&example.input_ids[1..])
            .map(|(logits, &next)| {
                let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
                (f64::from(logits[next as usize]) - sum.ln()) as f32
            })
            .collect();
        assert!(
            largest_difference(&floats(&tensors, &name), &expected) < 1e-4,
            "{name}"
        );
    }
}

#[test]
fn eval_in_bf16_is_near_the_reference_and_not_the_same() {
    let case = ReferenceCase::read("llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("rows.jsonl");
    write_rows(&case, &data);
    let loss = |dtype: &str| {
        let mut command = qlora();
        command.arg("eval").arg("--data").arg(&data);
        command.arg("--model").arg(&case.dir);
        command.arg("--adapter").arg(case.dir.join("adapter"));
        let found = stdout_json(command.args(["--json", "--compute_dtype", dtype]));
        found["loss"].as_f64().unwrap()
    };
    let (rounded, exact) = (loss("bf16"), loss("f32"));
    assert!((rounded - exact).abs() < 2e-3 * exact && rounded != exact);
    let mut command = qlora();
    command.args([
        "eval",
        "--model",
        "m",
        "--data",
        "d",
        "--compute-dtype",
        "f16",
    ]);
    let refused = predicate::str::contains("expected f32 or bf16");
    command.assert().code(2).stderr(refused);
}

#[test]
fn a_place_that_cannot_be_written_is_refused_before_the_evaluation() {
    let case = ReferenceCase::read("qwen2");
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("rows.jsonl");
    write_rows(&case, &data);
    let mut command = qlora();
    command.arg("eval").arg("--model").arg(&case.dir);
    command.arg("--data").arg(&data);
    command
        .arg("--logprobs")
        .arg(dir.path().join("none/out.safetensors"));
    let run = command.assert().code(1).stdout("");
    // Nothing else: not even the line about the rows, which are read first.
    let stderr = String::from_utf8_lossy(&run.get_output().stderr).to_string();
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert!(stderr.contains("none/out.safetensors"), "{stderr}");
}

#[test]
fn eval_without_json_prints_one_measure_a_line() {
    let case = ReferenceCase::read("qwen2");
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("rows.jsonl");
    write_rows(&case, &data);
    let mut command = qlora();
    command
        .arg("eval")
        .arg("--model")
        .arg(&case.dir)
        .arg("--data")
        .arg(&data);
    let output = command
        .args(["--max_seq_len", "12"])
        .assert()
        .success()
        .get_output()
        .stdout
        .clone();
    let text = String::from_utf8(output).unwrap();
    let names: Vec<&str> = text
        .lines()
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(
        names,
        ["loss", "perplexity", "token_accuracy", "ece", "tokens"]
    );
}

#[test]
fn eval_of_a_token_beyond_the_vocabulary_names_the_line_and_writes_nothing() {
    let case = ReferenceCase::read("qwen2");
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (
        dir.path().join("rows.jsonl"),
        dir.path().join("out.safetensors"),
    );
    std::fs::write(
        &data,
        "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 256]}\n",
    )
    .unwrap();
    let mut command = qlora();
    command
        .arg("eval")
        .arg("--model")
        .arg(&case.dir)
        .arg("--data")
        .arg(&data)
        .arg("--logprobs")
        .arg(&out);
    command
        .assert()
        .code(1)
        .stderr(predicate::str::contains("rows.jsonl:2:"));
    assert!(!out.exists());
}

#[test]
fn generate_writes_the_reference_continuation() {
    let case = ReferenceCase::read("llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer(&case, dir.path());
    let generate = || {
        let mut command = qlora();
        command
            .arg("generate")
            .arg("--model")
            .arg(&model)
            .arg("--adapter")
            .arg(case.dir.join("adapter"));
        command.args([
            "--prompt",
            &words(&case.prompt),
            "--max_new_tokens",
            &case.generated.len().to_string(),
        ]);
        command
    };
    let found = stdout_json(generate().arg("--json"));
    assert_eq!(found["ids"], json!(case.generated));
    assert_eq!(found["text"], words(&case.generated));
    assert_eq!(found["finish"], "length");
    generate()
        .assert()
        .success()
        .stdout(words(&case.generated) + "\n");
}

#[test]
fn generate_draws_the_same_text_for_the_same_seed() {
    let case = ReferenceCase::read("qwen3");
    let dir = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer(&case, dir.path());
    let prompt = dir.path().join("prompt.txt");
    std::fs::write(&prompt, words(&case.prompt)).unwrap();
    let text = |seed: &str| {
        let mut command = qlora();
        command
            .arg("generate")
            .arg("--model")
            .arg(&model)
            .arg("--prompt-file")
            .arg(&prompt);
        command.args([
            "--raw",
            "--temperature",
            "1.0",
            "--top_k",
            "50",
            "--top_p",
            "0.95",
            "--seed",
            seed,
        ]);
        stdout_json(command.args(["--max_new_tokens", "12", "--json"]))["text"].clone()
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn generate_refuses_what_cannot_be() {
    let case = ReferenceCase::read("qwen3");
    let dir = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer(&case, dir.path());
    let generate = |arguments: &[&str]| {
        let mut command = qlora();
        command
            .arg("generate")
            .arg("--model")
            .arg(&model)
            .args(arguments)
            .assert()
    };
    generate(&[]).code(2);
    generate(&["--prompt", "w1", "--prompt-file", "x"]).code(2);
    generate(&["--prompt", "w1", "--chat", "--raw"]).code(2);
    generate(&["--prompt", ""])
        .code(1)
        .stderr(predicate::str::contains("prompt"));
    let without_template = generate(&["--prompt", "w1", "--chat"]).code(1);
    without_template.stderr(predicate::str::contains("no chat template"));
    let negative = generate(&["--prompt", "w1", "--temperature=-1"]).code(1);
    negative.stderr(predicate::str::contains("temperature"));
}

#[test]
fn a_session_writes_what_is_written_without_one() {
    let case = ReferenceCase::read("qwen3");
    let decoder = case.decoder();
    let options = GenerateOptions {
        max_new_tokens: 6,
        stop_ids: Vec::new(),
    };
    let greedy = || Sampler::new(SamplingOptions::default()).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    let mut session = Session::new(&decoder, 64, None).unwrap();
    let mut text = case.prompt.clone();
    let branch = text[..text.len() - 2].to_vec();
    // Turns that go on, then the same again, a text that parts from the last one, and one that is a beginning of it.
    let mut prompts = Vec::new();
    for turn in 0..3 {
        prompts.push(text.clone());
        let fresh = generate(&decoder, &text, &options, &mut greedy(), go_on).unwrap();
        text.extend(fresh.ids);
        text.extend([turn, 7]);
    }
    prompts.push(prompts[2].clone());
    prompts.push([&branch[..], &[3, 1, 4]].concat());
    prompts.push(branch);
    for prompt in prompts {
        let expected = generate(&decoder, &prompt, &options, &mut greedy(), go_on).unwrap();
        let found = session
            .write(&prompt, &options, &mut greedy(), go_on)
            .unwrap();
        assert_eq!(found, expected, "{prompt:?}");
    }
    let too_long = vec![1; 65];
    assert!(
        session
            .write(&too_long, &options, &mut greedy(), go_on)
            .is_err()
    );
    assert!(session.write(&[], &options, &mut greedy(), go_on).is_err());
}

#[test]
fn chat_remembers_the_conversation_until_it_is_cleared() {
    let case = ReferenceCase::read("llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer(&case, dir.path());
    let template = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    let chat = |more: &[&str], input: &str| {
        let mut command = qlora();
        command.arg("chat").arg("--model").arg(&model);
        let command = command.args(["--max_new_tokens", "4"]).args(more);
        let output = command.write_stdin(input).assert().success();
        let output = output.get_output().clone();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(output.stdout), text(output.stderr))
    };
    let generated = |prompt: &str| {
        let mut command = qlora();
        command.arg("generate").arg("--model").arg(&model);
        let arguments = ["--raw", "--max_new_tokens", "4", "--prompt", prompt];
        let output = command.args(arguments).assert().success();
        String::from_utf8(output.get_output().stdout.clone()).unwrap()
    };
    let first = generated("w1 w10 w2 w3");
    let second = generated(&format!("w1 w10 w2 w1 {} w2 w1 w20 w2 w3", first.trim()));
    let alone = generated("w1 w20 w2 w3");
    assert_ne!(second, alone);

    let (answers, _) = chat(&[], "w10\n\nw20\n/clear\nw20\n/exit\nw10\n");
    assert_eq!(answers, [&*first, &*second, &*alone].concat());
    let (answers, _) = chat(&["--system", "w5"], "w10\n/clear\nw10\n");
    let with_system = generated("w1 w5 w2 w1 w10 w2 w3");
    assert_eq!(answers, [&*with_system, &*with_system].concat());
    let (answers, notes) = chat(&["--max_seq_len", "4"], "w10\n");
    assert!(
        answers.is_empty() && notes.contains("--max_seq_len"),
        "{answers} {notes}"
    );

    std::fs::remove_file(model.join("chat_template.jinja")).unwrap();
    let mut command = qlora();
    let refused = command
        .arg("chat")
        .arg("--model")
        .arg(&model)
        .assert()
        .code(1);
    refused.stderr(predicate::str::contains("no chat template"));
}

#[test]
fn eval_reads_rows_as_training_does() {
    let case = ReferenceCase::read("qwen3");
    let dir = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer(&case, dir.path());
    let write = |name: &str, row: Value| {
        let path = dir.path().join(name);
        std::fs::write(&path, format!("{row}\n")).unwrap();
        path
    };
    let named = write(
        "named.jsonl",
        json!({"question": "w1 w2", "answer": "w3 w4"}),
    );
    let plain = write("plain.jsonl", json!({"input": "w1 w2", "output": "w3 w4"}));
    let eval = |data: &std::path::Path, more: &[&str]| {
        let mut command = qlora();
        command.arg("eval").arg("--model").arg(&model);
        command.arg("--data").arg(data).args(more).arg("--json");
        command
    };
    let columns = ["--dataset_columns", "input=question,output=answer"];
    let expected = stdout_json(&mut eval(&plain, &[]));
    assert_eq!(stdout_json(&mut eval(&named, &columns)), expected);
    eval(&plain, &["--max_seq_len", "0"]).assert().failure();
    let mut without_data = qlora();
    without_data.arg("eval").arg("--model").arg(&model);
    without_data.args(["--mmlu", "nowhere", "--max_seq_len", "8"]);
    without_data.assert().code(2);
}

/// As on a full disk.
#[cfg(target_os = "linux")]
#[test]
fn results_that_cannot_be_written_are_an_error_and_no_panic() {
    let full = || {
        std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    for arguments in [
        &["plan", "--shape", "llama-7b"][..],
        &["train", "--preset", "guanaco-7b", "--print-config"],
    ] {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("qlora"));
        let output = command.args(arguments).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(
            message.starts_with("error: writing to stdout: "),
            "{message}"
        );
    }
}
