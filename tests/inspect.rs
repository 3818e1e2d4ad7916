//! `qlora inspect` shows data as training sees it, and what models and adapters are made of.

use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use qlora::data::{LoadOptions, Tokenizer, load};
use qlora::quant::QuantizeOptions;
use qlora::store::{Existing, QuantizeJob, quantize};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

fn inspect(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("qlora").unwrap();
    command.current_dir(dir).arg("inspect").args(arguments);
    command
}

fn stdout(mut command: Command) -> String {
    let output = command.assert().success().stderr("");
    String::from_utf8(output.get_output().stdout.clone()).unwrap()
}

fn json_of(command: Command) -> Value {
    serde_json::from_str(&stdout(command)).unwrap()
}

/// A directory with `model/` (a tokenizer with a ChatML template) and two data files.
fn data_dir() -> tempfile::TempDir {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data");
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for (from, to) in [
        ("tokenizer/tokenizer.json", "tokenizer.json"),
        ("tokenizer/tokenizer_config.json", "tokenizer_config.json"),
        ("templates/chatml.jinja", "chat_template.jinja"),
    ] {
        std::fs::copy(fixtures.join(from), model.join(to)).unwrap();
    }
    std::fs::write(
        model.join("config.json"),
        json!({"vocab_size": 480}).to_string(),
    )
    .unwrap();
    let chat = [
        json!({"messages": [
            {"role": "user", "content": "Count\tthe\u{1b}[31m apples."},
            {"role": "assistant", "content": "12 été 🙂"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes.\nSeven stones."},
        ]}),
        json!({"messages": [{"role": "user", "content": "a long question ".repeat(20)}, {"role": "assistant", "content": "b"}]}),
        json!({"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}),
    ];
    let lines: Vec<String> = chat.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(dir.path().join("chat.jsonl"), lines.concat()).unwrap();
    let tokenized = "{\"input_ids\": [5, 6, 7], \"labels\": [-100, 6, -100]}\n";
    std::fs::write(dir.path().join("tokenized.jsonl"), tokenized).unwrap();
    dir
}

#[test]
fn chat_rows_are_shown_with_their_mask() {
    let dir = data_dir();
    let arguments = [
        "chat.jsonl",
        "--model",
        "model",
        "--max_seq_len",
        "80",
        "--rows",
        "1",
    ];
    insta::assert_snapshot!(stdout(inspect(dir.path(), &arguments)));
}

#[test]
fn tokenized_rows_need_no_model() {
    let dir = data_dir();
    insta::assert_snapshot!(stdout(inspect(dir.path(), &["tokenized.jsonl"])));
}

#[test]
fn json_rows_are_what_training_sees() {
    let dir = data_dir();
    let model = dir.path().join("model");
    for flag in ["--max_seq_len", "--max-seq-len"] {
        let arguments = ["chat.jsonl", "--model", "model", flag, "80", "--json"];
        let found = json_of(inspect(dir.path(), &arguments));
        let options = LoadOptions {
            max_seq_len: Some(80),
            ..LoadOptions::default()
        };
        let tokenizer = Tokenizer::from_dir(&model).unwrap();
        let expected = load(dir.path().join("chat.jsonl"), &options, Some(&tokenizer)).unwrap();
        let rows: Vec<Value> = expected
            .examples()
            .map(|e| json!({"input_ids": e.input_ids, "labels": e.labels}))
            .collect();
        assert_eq!(rows.len(), 3);
        assert_eq!(found["rows"], json!(rows));
        assert_eq!(found["dataset_format"], "messages");
        assert_eq!(found["stats"]["dropped"], 0);
        assert_eq!(found["stats"]["truncated"], 2);
    }
}

#[test]
fn what_is_wrong_and_how_rows_are_laid_together_is_told() {
    let dir = data_dir();
    let rows = [
        json!({"input_ids": [5, 6, 7]}),
        json!({"input_ids": [8, 9], "labels": [-100, -100]}),
        json!({"input_ids": vec![1; 9]}),
    ];
    let lines: Vec<String> = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(dir.path().join("mixed.jsonl"), lines.concat()).unwrap();
    let arguments = [
        "mixed.jsonl",
        "--model",
        "model",
        "--max_seq_len",
        "8",
        "--packing",
        "--rows",
        "0",
    ];
    insta::assert_snapshot!(stdout(inspect(dir.path(), &arguments)));

    let arguments = [&arguments[..], &["--json"]].concat();
    let found = json_of(inspect(dir.path(), &arguments));
    assert_eq!(
        found["findings"]["all_masked"],
        json!({"rows": 1, "first_line": 2})
    );
    assert_eq!(found["batches"]["sequences"], 2);
    assert_eq!(
        (&found["train_rows"], &found["rows"]),
        (&json!(2), &json!([]))
    );
}

#[test]
fn the_page_for_a_browser_shows_the_rows_and_cannot_be_steered_by_them() {
    let dir = data_dir();
    let row = json!({"messages": [{"role": "user", "content": "<script>alert('x')</script> &"}, {"role": "assistant", "content": "12 été"}]});
    std::fs::write(dir.path().join("chat.jsonl"), format!("{row}\n")).unwrap();
    let written = stdout(inspect(
        dir.path(),
        &["chat.jsonl", "--model", "model", "--html", "look.html"],
    ));
    assert_eq!(written, "look.html\n");
    let page = std::fs::read_to_string(dir.path().join("look.html")).unwrap();
    assert!(!page.contains("<script") && page.contains("&lt;"), "{page}");
    assert!(
        page.contains("class=\"t s\">&lt;|im_end|&gt;</span>"),
        "the end token is trained and special: {page}"
    );
    assert!(
        page.contains("1 rows read, 0 dropped, 0 truncated"),
        "{page}"
    );
    assert!(!page.contains("http"), "nothing is loaded from elsewhere");
}

#[test]
fn a_name_on_the_hub_without_a_network_says_what_to_do() {
    let dir = data_dir();
    let mut command = inspect(dir.path(), &["alpaca", "--model", "model"]);
    command
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", dir.path());
    let assert = command.assert().code(1).stdout("");
    assert.stderr(contains("error: alpaca: not a file here, and HF_HUB_OFFLINE is set while tatsu-lab/alpaca is not in"));
    let mut command = inspect(dir.path(), &["org/name"]);
    // Nothing listens there.
    command
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env("HF_HOME", dir.path())
        .env_remove("HF_HUB_OFFLINE");
    let assert = command.assert().code(1).stdout("");
    assert.stderr(contains("org/name cannot be fetched from the Hugging Face hub; without a network, give a local file"));
    let vicuna = inspect(dir.path(), &["vicuna"]).assert().code(1);
    vicuna.stderr(contains("never released"));
}

#[test]
fn a_data_set_in_the_hubs_cache_is_found_by_its_name() {
    let dir = data_dir();
    let repository = dir.path().join("hub/datasets--tatsu-lab--alpaca");
    let snapshot = repository.join("snapshots/abc/data");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::write(repository.join("refs/main"), "abc").unwrap();
    std::fs::write(
        snapshot.join("train-0.jsonl"),
        "{\"instruction\": \"a\", \"output\": \"b\"}\n",
    )
    .unwrap();
    let mut command = inspect(dir.path(), &["alpaca", "--model", "model", "--json"]);
    command
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", dir.path());
    let found = json_of(command);
    assert_eq!(
        (&found["dataset_format"], &found["stats"]["rows"]),
        (&json!("alpaca"), &json!(1))
    );
}

#[test]
fn bad_data_is_one_line_with_file_and_line() {
    let dir = data_dir();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    let beyond = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 480]}\n";
    std::fs::write(dir.path().join("beyond.jsonl"), beyond).unwrap();
    for (arguments, expected) in [
        (
            &["beyond.jsonl", "--model", "model"][..],
            "error: beyond.jsonl:2: `input_ids` has token id 480, beyond the model's vocabulary of 480",
        ),
        (
            &["chat.jsonl"],
            "error: config key `dataset_format`: messages needs the model's tokenizer",
        ),
        (&["missing.jsonl"], "error: missing.jsonl: No such file"),
        (
            &["model/tokenizer.json/x"],
            "error: model/tokenizer.json/x: ",
        ),
        (
            &["empty"],
            "error: empty: has neither config.json (a model) nor adapter_config.json (an adapter)",
        ),
        (&["model"], "error: model: "),
    ] {
        let assert = inspect(dir.path(), arguments).assert().code(1).stdout("");
        assert.stderr(contains(expected));
    }
    let unknown = ["chat.jsonl", "--dataset_format", "alpacca"];
    let assert = inspect(dir.path(), &unknown).assert().code(2).stdout("");
    assert.stderr(contains("`alpacca` is not a dataset format"));
}

/// A checkpoint with one linear layer and one norm in `dir/bf16`, and in `dir/nf4` the same in 4 bits.
fn write_models(dir: &Path) {
    let source = dir.join("bf16");
    std::fs::create_dir(&source).unwrap();
    let config = json!({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1});
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    let bytes = vec![0x3fu8; 2 * 64 * 64];
    let view = |shape: &[usize]| {
        let len = 2 * shape.iter().product::<usize>();
        TensorView::new(Dtype::BF16, shape.to_vec(), &bytes[..len]).unwrap()
    };
    let tensors = [
        ("model.layers.0.self_attn.q_proj.weight", view(&[64, 64])),
        ("model.norm.weight", view(&[64])),
    ];
    let path = source.join("model.safetensors");
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
    let job = QuantizeJob {
        source,
        destination: dir.join("nf4"),
        existing: Existing::Refuse,
        options: QuantizeOptions::default(),
        max_shard_bytes: 1 << 30,
    };
    quantize(&job, |_| {}).unwrap();
}

#[test]
fn a_model_is_counted_by_how_its_weights_are_stored() {
    let dir = tempfile::tempdir().unwrap();
    write_models(dir.path());
    let dense = json_of(inspect(dir.path(), &["bf16", "--json"]));
    assert_eq!(
        dense["types"]["bf16"],
        json!({"tensors": 2, "parameters": 4160, "bytes": 8320})
    );
    assert_eq!(dense["quantization_config"], Value::Null);

    let quantized = json_of(inspect(dir.path(), &["nf4", "--json"]));
    // 64 blocks: a byte each, one nested scale and the offset.
    let weight = json!({"tensors": 1, "parameters": 4096, "bytes": 2048 + 64 + 4 + 4});
    assert_eq!(quantized["types"]["nf4, block 64, double quant"], weight);
    assert_eq!(
        quantized["types"]["bf16"],
        json!({"tensors": 1, "parameters": 64, "bytes": 128})
    );
    assert_eq!(
        (&quantized["kind"], &quantized["tensors"]),
        (&json!("model"), &json!(2))
    );
    assert_eq!(
        quantized["quantization_config"]["bnb_4bit_quant_type"],
        "nf4"
    );
    insta::assert_snapshot!(stdout(inspect(dir.path(), &["nf4"])));
}

/// An adapter of one layer in `dir/adapter`.
fn write_adapter(dir: &Path) {
    let adapter = dir.join("adapter");
    std::fs::create_dir(&adapter).unwrap();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none",
        "target_modules": ["q_proj"], "use_rslora": false, "base_model_name_or_path": "tiny",
    });
    std::fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let bytes = vec![0u8; 4 * 4 * 64];
    let view = |shape: [usize; 2]| TensorView::new(Dtype::F32, shape.to_vec(), &bytes).unwrap();
    let layer = "base_model.model.model.layers.0.self_attn.q_proj";
    let tensors = [
        (format!("{layer}.lora_A.weight"), view([4, 64])),
        (format!("{layer}.lora_B.weight"), view([64, 4])),
    ];
    let path = adapter.join("adapter_model.safetensors");
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
}

#[test]
fn an_adapter_is_shown_with_its_settings() {
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path());
    let found = json_of(inspect(dir.path(), &["adapter", "--json"]));
    assert_eq!(
        (&found["kind"], &found["r"]),
        (&json!("adapter"), &json!(4))
    );
    assert_eq!(
        (&found["lora_alpha"], &found["scaling"]),
        (&json!(8.0), &json!(2.0))
    );
    assert_eq!(found["target_modules"], json!(["q_proj"]));
    assert_eq!(found["matrix_dropout"], Value::Null);
    assert_eq!(
        found["types"]["f32"],
        json!({"tensors": 2, "parameters": 512, "bytes": 2048})
    );
    insta::assert_snapshot!(stdout(inspect(dir.path(), &["adapter"])));
}

#[test]
fn the_masks_beside_an_adapter_are_shown_and_a_damaged_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path());
    let file = dir.path().join("adapter/lora_matrix_dropout.json");
    let settings =
        json!({"lora_matrix_dropout": 0.25, "lora_matrix_dropout_scale": "none", "seed": 17});
    std::fs::write(&file, settings.to_string()).unwrap();
    let found = json_of(inspect(dir.path(), &["adapter", "--json"]));
    assert_eq!(found["matrix_dropout"], settings);
    insta::assert_snapshot!(stdout(inspect(dir.path(), &["adapter"])));
    for (text, expected) in [
        ("{\"lora_matrix_dropout\": 0.25", "EOF"),
        ("{\"lora_matrix_dropout\": 0.25}", "missing field"),
        (&settings.to_string().replace("none", "half"), "`half`"),
        (
            &settings.to_string().replace("0.25", "1.0"),
            "not in [0, 1)",
        ),
        (&settings.to_string().replace("17", "-1"), "-1"),
    ] {
        std::fs::write(&file, text).unwrap();
        let assert = inspect(dir.path(), &["adapter"]).assert().code(1);
        let named = contains("error: adapter/lora_matrix_dropout.json: ");
        assert.stdout("").stderr(named.and(contains(expected)));
    }
}

#[test]
fn a_gguf_file_is_shown_by_its_types_and_keys() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let gguf = |file: &str| stdout(inspect(&fixtures, &[file]));
    insta::assert_snapshot!(gguf("fixtures/gguf/types.gguf") + &gguf("corpus/gguf/adapter.gguf"));
    let found = json_of(inspect(&fixtures, &["corpus/gguf/model.gguf", "--json"]));
    assert_eq!(found["kind"], "gguf");
    assert_eq!(found["metadata"]["llama.block_count"], 1);
    assert_eq!(found["types"]["q8_0"]["tensors"], 9);
}

#[test]
fn a_page_is_made_of_data_alone() {
    let dir = tempfile::tempdir().unwrap();
    write_models(dir.path());
    let page = ["nf4", "--html", "page.html"];
    let assert = inspect(dir.path(), &page).assert().code(1).stdout("");
    assert.stderr(contains("--html is for data"));
}
