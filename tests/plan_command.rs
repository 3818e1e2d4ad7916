//! `qlora plan` as it is typed: its table, its JSON, and how it ends where nothing fits.

use std::process::Output;

use serde_json::Value;

fn plan(arguments: &str) -> Output {
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    command.arg("plan").args(arguments.split(' '));
    command.output().unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

#[test]
fn the_fastest_run_that_fits_is_told_item_by_item() {
    let arguments =
        "--shape llama-65b --max_seq_len 512 --vram 24GiB --tflops 800 --optim paged_adamw_32bit";
    let output = plan(arguments);
    assert!(output.status.success(), "{output:?}");
    insta::assert_snapshot!(text(output.stdout));
}

#[test]
fn without_a_limit_keeping_and_recomputing_stand_side_by_side() {
    let output = plan("--shape llama3-8b --max_seq_len 2048 --lora_r 16");
    assert!(output.status.success(), "{output:?}");
    insta::assert_snapshot!(text(output.stdout));
}

#[test]
fn json_says_what_the_table_does() {
    let output = plan("--shape llama-33b --max_seq_len 512 --vram 48GB --json");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["fits"], true);
    assert_eq!(found["limit_bytes"], 48_000_000_000u64);
    let plan = &found["plans"][0];
    let items = plan["items"].as_object().unwrap().values();
    let sum: u64 = items.map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(plan["total_bytes"], sum);
    assert!(sum <= 48_000_000_000);
}

#[test]
fn what_does_not_fit_ends_with_1_and_the_smallest_change_that_would() {
    let output = plan("--shape llama-65b --max_seq_len 512 --vram 8GiB");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    insta::assert_snapshot!(text(output.stderr));
}
