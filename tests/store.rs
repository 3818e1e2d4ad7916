//! Weight files: what is read is what is stored, and each broken input has its own error that names the file and tensor.

mod weight_files;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::DType;
use qlora::Error;
use qlora::quant::FrozenWeight;
use qlora::store::{
    AtomicDir, AtomicFile, Checkpoint, Existing, SafetensorsWriter, TensorSpec, text_config,
};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use weight_files::{assert_says, f32s, model_dir, model_with, write_file};

/// A safetensors file from a header and bytes that need not fit together.
fn raw_file(path: &Path, header: &Value, data: &[u8]) {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    fs::write(path, bytes).unwrap();
}

fn open_error(dir: &TempDir) -> String {
    Checkpoint::open(dir.path()).unwrap_err().to_string()
}

#[test]
fn tensors_are_read_as_stored_and_not_copied() {
    let dir = model_with(&[
        ("a", Dtype::F32, vec![2, 2], f32s(&[1.0, -2.0, 3.5, 0.0])),
        ("b", Dtype::BF16, vec![3], vec![1, 2, 3, 4, 5, 6]),
        ("c", Dtype::F16, vec![], vec![7, 8]),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    let a = checkpoint.tensor("a").unwrap();
    assert_eq!(
        (a.dtype, &a.shape[..], &a.data[..]),
        (DType::F32, &[2, 2][..], &f32s(&[1.0, -2.0, 3.5, 0.0])[..])
    );
    assert_eq!(
        a.data.as_ptr(),
        checkpoint.tensor("a").unwrap().data.as_ptr()
    );
    let b = checkpoint.tensor("b").unwrap();
    assert_eq!(
        (b.dtype, &b.shape[..], &b.data[..]),
        (DType::BF16, &[3][..], &[1, 2, 3, 4, 5, 6][..])
    );
    let c = checkpoint.tensor("c").unwrap();
    assert_eq!(
        (c.dtype, c.shape.len(), &c.data[..]),
        (DType::F16, 0, &[7, 8][..])
    );
    assert!(matches!(
        checkpoint.weight("a").unwrap(),
        FrozenWeight::Dense(_)
    ));
    assert!(!checkpoint.is_quantized());
}

#[test]
fn a_misaligned_tensor_is_aligned_when_read() {
    let values = f32s(&[1.0, 2.0, 3.0]);
    let dir = model_with(&[
        ("odd", Dtype::U8, vec![1], vec![9]),
        ("x", Dtype::F32, vec![3], values.clone()),
    ]);
    let x = Checkpoint::open(dir.path()).unwrap().tensor("x").unwrap();
    assert_eq!(x.data.as_ptr().addr() % 4, 0);
    assert_eq!(x.data, values);
}

#[test]
fn a_released_tensor_reads_the_same_again() {
    let values: Vec<f32> = (0..5000).map(|i| i as f32).collect();
    let dir = model_with(&[
        ("a", Dtype::F32, vec![5000], f32s(&values)),
        ("b", Dtype::F32, vec![1], f32s(&[7.0])),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tensor = checkpoint.tensor("a").unwrap();
    assert_eq!(tensor.data, f32s(&values));
    checkpoint.file("a").unwrap().release("a").unwrap();
    checkpoint.file("b").unwrap().release("b").unwrap();
    assert_eq!(tensor.data, f32s(&values));
    assert_eq!(checkpoint.tensor("b").unwrap().data, f32s(&[7.0]));
}

#[test]
fn shards_are_one_checkpoint() {
    let dir = model_dir();
    write_file(
        &dir.path().join("one.safetensors"),
        &[("a", Dtype::F32, vec![1], f32s(&[1.0]))],
    );
    write_file(
        &dir.path().join("two.safetensors"),
        &[("b", Dtype::F32, vec![1], f32s(&[2.0]))],
    );
    write_index(
        &dir,
        json!({"a": "one.safetensors", "b": "two.safetensors"}),
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().data, f32s(&[1.0]));
    assert_eq!(checkpoint.tensor("b").unwrap().data, f32s(&[2.0]));
}

fn write_index(dir: &TempDir, weight_map: Value) {
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs::write(
        dir.path().join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
}

#[test]
fn a_missing_tensor_is_named() {
    let dir = model_with(&[("a", Dtype::F32, vec![1], f32s(&[1.0]))]);
    let error = Checkpoint::open(dir.path())
        .unwrap()
        .weight("b")
        .unwrap_err();
    assert!(
        matches!(&error, Error::MissingTensor { tensor, .. } if tensor == "b"),
        "{error}"
    );
}

#[test]
fn a_tensor_of_another_type_is_refused() {
    let dir = model_with(&[("ids", Dtype::I64, vec![1], vec![0; 8])]);
    let error = Checkpoint::open(dir.path())
        .unwrap()
        .tensor("ids")
        .unwrap_err();
    assert_says(
        &error.to_string(),
        &["`ids`", "bf16, f16 or f32", "I64", "model.safetensors"],
    );
}

#[test]
fn a_missing_config_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert_says(&open_error(&dir), &["config.json", "No such file"]);
}

#[test]
fn a_config_that_is_not_json_is_named() {
    let dir = model_dir();
    fs::write(dir.path().join("config.json"), "{\"a\": ").unwrap();
    assert_says(&open_error(&dir), &["config.json", "not valid JSON"]);
}

#[test]
fn a_directory_without_weights_is_refused() {
    assert_says(
        &open_error(&model_dir()),
        &["neither model.safetensors nor model.safetensors.index.json"],
    );
}

#[test]
fn pickled_weights_are_refused_with_what_to_do() {
    let dir = model_dir();
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    assert_says(
        &open_error(&dir),
        &["pytorch_model.bin", "convert", "save_pretrained"],
    );
}

#[test]
fn an_empty_file_is_refused() {
    let dir = model_dir();
    fs::write(dir.path().join("model.safetensors"), "").unwrap();
    assert_says(&open_error(&dir), &["model.safetensors", "is empty"]);
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let dir = model_with(&[("a", Dtype::F32, vec![4], f32s(&[1.0; 4]))]);
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in 1..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert_says(
            &open_error(&dir),
            &["model.safetensors", "not a complete safetensors file"],
        );
    }
    fs::write(&path, &whole).unwrap();
    assert!(Checkpoint::open(dir.path()).is_ok());
}

#[test]
fn a_huge_header_length_is_refused() {
    let dir = model_dir();
    fs::write(dir.path().join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap();
    assert_says(
        &open_error(&dir),
        &["not a complete safetensors file", "header"],
    );
}

#[test]
fn a_header_that_is_not_json_is_refused() {
    let dir = model_dir();
    let mut bytes = 4u64.to_le_bytes().to_vec();
    bytes.extend(b"{{{{");
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    assert_says(&open_error(&dir), &["model.safetensors", "JSON"]);
}

fn header_error(header: Value, data: &[u8]) -> String {
    let dir = model_dir();
    raw_file(&dir.path().join("model.safetensors"), &header, data);
    open_error(&dir)
}

#[test]
fn overlapping_tensors_are_refused() {
    let header = json!({
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
    });
    assert_says(
        &header_error(header, &[0; 6]),
        &["model.safetensors", "invalid offset", "`b`"],
    );
}

#[test]
fn a_tensor_beyond_the_end_is_refused() {
    let header = json!({"a": {"dtype": "U8", "shape": [400], "data_offsets": [0, 400]}});
    assert_says(
        &header_error(header, &[0; 4]),
        &["not a complete safetensors file"],
    );
}

#[test]
fn offsets_that_run_backwards_are_refused() {
    let header = json!({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}});
    assert_says(
        &header_error(header, &[0; 4]),
        &["not a complete safetensors file", "`a`"],
    );
}

#[test]
fn a_shape_that_overflows_is_refused() {
    let header =
        json!({"a": {"dtype": "F32", "shape": [u64::MAX, u64::MAX], "data_offsets": [0, 4]}});
    assert_says(
        &header_error(header, &[0; 4]),
        &["not a complete safetensors file", "overflow"],
    );
}

#[test]
fn a_shape_that_disagrees_with_the_offsets_is_refused() {
    let header = json!({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}});
    assert_says(
        &header_error(header, &[0; 4]),
        &["not a complete safetensors file", "shape"],
    );
}

#[test]
fn a_shard_outside_the_directory_is_refused() {
    for shard in [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "./x.safetensors",
    ] {
        let dir = model_dir();
        write_index(&dir, json!({"a": shard}));
        assert_says(
            &open_error(&dir),
            &[
                "model.safetensors.index.json",
                "not a file name in this directory",
            ],
        );
    }
}

#[test]
fn a_missing_shard_is_named() {
    let dir = model_dir();
    write_index(&dir, json!({"a": "model-00001-of-00002.safetensors"}));
    assert_says(
        &open_error(&dir),
        &[
            "index.json",
            "`model-00001-of-00002.safetensors` is missing",
        ],
    );
}

#[test]
fn an_index_without_a_weight_map_is_refused() {
    let dir = model_dir();
    fs::write(dir.path().join("model.safetensors.index.json"), "[]").unwrap();
    assert_says(&open_error(&dir), &["index.json", "weight_map"]);
}

#[test]
fn a_shard_that_is_not_a_name_is_refused() {
    let dir = model_dir();
    write_index(&dir, json!({"a": 7}));
    assert_says(&open_error(&dir), &["index.json", "`a`", "7"]);
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let dir = model_dir();
    let a = ("a", Dtype::F32, vec![1], f32s(&[1.0]));
    write_file(
        &dir.path().join("one.safetensors"),
        std::slice::from_ref(&a),
    );
    write_file(
        &dir.path().join("two.safetensors"),
        &[a, ("b", Dtype::F32, vec![1], f32s(&[2.0]))],
    );
    write_index(
        &dir,
        json!({"a": "one.safetensors", "b": "two.safetensors"}),
    );
    assert_says(
        &open_error(&dir),
        &["two.safetensors", "`a`", "one.safetensors"],
    );
}

#[test]
fn a_tensor_the_index_promises_but_no_shard_has_is_named() {
    let dir = model_dir();
    write_file(
        &dir.path().join("one.safetensors"),
        &[("a", Dtype::F32, vec![1], f32s(&[1.0]))],
    );
    write_index(
        &dir,
        json!({"a": "one.safetensors", "b": "one.safetensors"}),
    );
    assert_says(&open_error(&dir), &["index.json", "`b`", "one.safetensors"]);
}

#[test]
fn a_tensor_the_index_does_not_name_is_refused() {
    let dir = model_dir();
    let tensors = [
        ("a", Dtype::F32, vec![1], f32s(&[1.0])),
        ("b", Dtype::F32, vec![1], f32s(&[1.0])),
    ];
    write_file(&dir.path().join("one.safetensors"), &tensors);
    write_index(&dir, json!({"a": "one.safetensors"}));
    assert_says(&open_error(&dir), &["one.safetensors", "`b`"]);
}

/// transformers 5 does not tie them either, whatever the config says.
#[test]
fn a_head_with_values_of_its_own_is_not_the_embedding() {
    let is_untied = |names: [&str; 2], head: f32, config: Value| {
        let values = |last: f32| f32s(&[1.0, -2.0, 3.5, last]);
        let tensor = |name, last| (name, Dtype::F32, vec![2, 2], values(last));
        let dir = model_with(&[tensor(names[0], 0.5), tensor(names[1], head)]);
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let config = checkpoint.config();
        let says = |config: &Value| config["tie_word_embeddings"] == false;
        assert_eq!(says(config), says(text_config(config)));
        says(config)
    };
    let alone = ["model.embed_tokens.weight", "lm_head.weight"];
    let within = [
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    ];
    for config in [json!({}), json!({"tie_word_embeddings": true})] {
        assert!(is_untied(alone, 0.25, config.clone()));
        assert!(!is_untied(alone, 0.5, config.clone()));
        let config = json!({"text_config": config});
        assert!(is_untied(within, 0.25, config.clone()));
        assert!(!is_untied(within, 0.5, config));
    }
    assert!(is_untied(alone, 0.5, json!({"tie_word_embeddings": false})));
}

#[test]
fn a_file_that_is_not_committed_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"half").unwrap();
    assert!(!path.exists());
    drop(file);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    AtomicFile::write(&path, "one").unwrap();
    AtomicFile::write(&path, "two").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "two");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_error_of_writing_does_not_speak_of_the_temporary_name() {
    let dir = tempfile::tempdir().unwrap();
    let error = AtomicFile::create(dir.path().join("none").join("a.txt")).unwrap_err();
    let error = error.to_string();
    assert_says(&error, &["none/a.txt: No such file or directory"]);
    assert!(!error.contains(".partial"), "{error}");
}

#[test]
fn a_directory_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("above").join("out");
    let unfinished = AtomicDir::create(&path, Existing::Refuse).unwrap();
    fs::write(unfinished.path().join("a"), "1").unwrap();
    drop(unfinished);
    assert_eq!(fs::read_dir(dir.path().join("above")).unwrap().count(), 0);
    let finished = AtomicDir::create(&path, Existing::Refuse).unwrap();
    fs::write(finished.path().join("a"), "1").unwrap();
    finished.commit().unwrap();
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "1");
}

#[test]
fn an_existing_directory_is_replaced_only_when_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("old"), "1").unwrap();
    let error = AtomicDir::create(&path, Existing::Refuse).unwrap_err();
    assert_says(&error.to_string(), &["out", "already exists"]);
    let new = AtomicDir::create(&path, Existing::Replace).unwrap();
    fs::write(new.path().join("new"), "2").unwrap();
    assert!(path.join("old").exists());
    new.commit().unwrap();
    assert!(path.join("new").exists() && !path.join("old").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_writer_refuses_what_was_not_planned() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let spec = TensorSpec::new("a", Dtype::F32, vec![2]);
    let mut file =
        SafetensorsWriter::create(&path, std::slice::from_ref(&spec), BTreeMap::new()).unwrap();
    assert_says(
        &file.append(&spec, &[0; 4]).unwrap_err().to_string(),
        &["`a`", "8 bytes", "4 bytes"],
    );
    file.append(&spec, &[0; 8]).unwrap();
    assert_says(
        &file.append(&spec, &[0; 8]).unwrap_err().to_string(),
        &["`a`", "second"],
    );
    let more = TensorSpec::new("an_unplanned_name", Dtype::F32, vec![2]);
    file.append(&more, &[0; 8]).unwrap();
    assert_says(
        &file.finish().unwrap_err().to_string(),
        &["x.safetensors", "header"],
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
