//! `qlora demo` keeps its promise: records nobody taught the base model, from under 10 % right to over 90 %.

use assert_cmd::Command;
use serde_json::Value;

#[test]
fn demo_lifts_heldout_exact_match_from_under_10_to_over_90_percent() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("demo");
    let output = Command::cargo_bin("qlora")
        .unwrap()
        .args(["demo", "--json", "--out"])
        .arg(&out)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");

    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["exact_match_before"].as_f64().unwrap() < 0.1);
    assert!(report["exact_match_after"].as_f64().unwrap() > 0.9);
    assert!(report["exact_match_exported"].as_f64().unwrap() > 0.9);
    assert_eq!(report["adapter"], out.join("adapter").to_str().unwrap());
    for file in [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "base-nf4/model.safetensors",
        "merged/model.safetensors",
        "loss.svg",
        "report.md",
    ] {
        assert!(out.join(file).is_file(), "{file} is missing");
    }
}

#[test]
fn no_heldout_prompt_is_a_training_prompt() {
    let prompts = |file: &str| -> Vec<String> {
        let path = format!("{}/examples/demo/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        let rows = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.map(|row| row["messages"][0]["content"].as_str().unwrap().to_string())
            .collect()
    };
    let training = prompts("train.jsonl");
    let heldout = prompts("heldout.jsonl");
    assert!(heldout.len() >= 100);
    assert!(heldout.iter().all(|prompt| !training.contains(prompt)));
}
