//! `qlora bench`: README's table is what it makes of the results in the repository, and small models can be measured.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;

const MARK: &str = "<!-- bench table -->\n\n";

fn stdout(arguments: &[&str]) -> String {
    let mut qlora = Command::cargo_bin("qlora").unwrap();
    let output = qlora
        .args(arguments)
        .assert()
        .success()
        .get_output()
        .stdout
        .clone();
    String::from_utf8(output).unwrap()
}

/// With `UPDATE_DOCS` set, README gets the table.
#[test]
fn the_table_of_the_readme_is_made_of_the_results() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let results = std::fs::read_dir(root.join("benches/results")).unwrap();
    let mut results: Vec<PathBuf> = results.map(|entry| entry.unwrap().path()).collect();
    results.sort();
    let paths = results.iter().map(|path| path.to_str().unwrap());
    let table = stdout(
        &["bench", "table"]
            .into_iter()
            .chain(paths)
            .collect::<Vec<_>>(),
    );
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let (before, after) = readme.split_once(MARK).expect("README has the mark");
    let is_row = |line: &&str| line.starts_with('|');
    let found: String = after.split_inclusive('\n').take_while(is_row).collect();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let rest = &after[found.len()..];
        let gap = if found.is_empty() { "\n" } else { "" };
        let updated = format!("{before}{MARK}{table}{gap}{rest}");
        std::fs::write(root.join("README.md"), updated).unwrap();
        return;
    }
    assert_eq!(found, table);
}

const TINY: [&str; 18] = [
    "--hidden_size",
    "128",
    "--intermediate_size",
    "256",
    "--num_hidden_layers",
    "4",
    "--num_attention_heads",
    "4",
    "--vocab_size",
    "512",
    "--max_seq_len",
    "64",
    "--lora_r",
    "8",
    "--max_steps",
    "2",
    "--json",
    "--plot",
];

fn bench(name: &str, plot: &Path) -> Value {
    let given = [&["bench", name][..], &TINY, &[plot.to_str().unwrap()]].concat();
    let report = serde_json::from_str(&stdout(&given)).unwrap();
    let picture = std::fs::read_to_string(plot).unwrap();
    assert!(picture.starts_with("<svg"), "{picture:.40}");
    report
}

#[test]
fn a_small_model_is_measured_without_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let speed = bench("speed", &dir.path().join("speed.svg"));
    assert_eq!(speed["step_seconds"].as_array().unwrap().len(), 2);
    let split = speed["split_seconds"].as_object().unwrap();
    for part in [
        "products with dequantization",
        "attention",
        "loss",
        "optimizer",
    ] {
        assert!(split[part].as_f64().unwrap() > 0.0, "{part}");
    }
    assert!(
        split
            .values()
            .all(|seconds| seconds.as_f64().unwrap() >= 0.0)
    );
    assert!(speed["share_of_compute_floor"].as_f64().unwrap() > 0.0);
    assert_eq!(speed["compute_dtype"], "f32");
    let memory = bench("memory", &dir.path().join("memory.svg"));
    let parts = memory["parts"].as_array().unwrap().iter();
    let planned: u64 = parts
        .map(|part| part["planned_bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(memory["planned_bytes"], planned);
    assert!(memory["measured_bytes"].as_u64().unwrap() > 0);
}
