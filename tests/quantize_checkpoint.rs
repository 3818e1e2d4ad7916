//! Quantizing a checkpoint: the 4-bit directory holds what was quantized and copied, and a failure leaves nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bytes::Bytes;
use candle_core::DType;
use qlora::quant::{
    Absmax, DenseTensor, DoubleQuant, FrozenWeight, Params4bit, QuantType, QuantizeOptions,
};
use qlora::store::{
    Checkpoint, Existing, QuantizeJob, SafetensorsWriter, TensorSpec, WriteReport, quantize,
};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

const LAYERS: usize = 11;

fn weight_name(layer: usize) -> String {
    format!("model.layers.{layer}.self_attn.q_proj.weight")
}

fn norm_name(layer: usize) -> String {
    format!("model.layers.{layer}.input_layernorm.weight")
}

/// A weight of 5 x 30 elements: a short last block, rows that blocks cross.
fn weight(layer: usize) -> Vec<f32> {
    (0..150)
        .map(|i| ((i * 37 + layer * 11) % 101) as f32 / 50.0 - 1.0)
        .collect()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// A model directory with f32 linear weights, bf16 norms and a tokenizer.
fn source(change: impl FnOnce(&mut BTreeMap<String, Vec<f32>>)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut weights = (0..LAYERS)
        .map(|layer| (weight_name(layer), weight(layer)))
        .collect();
    change(&mut weights);
    let mut tensors: Vec<(TensorSpec, Vec<u8>)> = weights
        .iter()
        .map(|(name, values)| {
            (
                TensorSpec::new(name, Dtype::F32, vec![5, values.len() / 5]),
                f32s(values),
            )
        })
        .collect();
    for layer in 0..LAYERS {
        let bytes = vec![layer as u8; 60];
        tensors.push((
            TensorSpec::new(norm_name(layer), Dtype::BF16, vec![30]),
            bytes,
        ));
    }
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let path = dir.path().join("model.safetensors");
    let mut file = SafetensorsWriter::create(path, &specs, BTreeMap::new()).unwrap();
    for (spec, data) in &tensors {
        file.append(spec, data).unwrap();
    }
    file.finish().unwrap();
    fs::write(
        dir.path().join("config.json"),
        r#"{"model_type": "llama", "custom": [1]}"#,
    )
    .unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), "weights").unwrap();
    dir
}

fn job(source: &Path, destination: &Path) -> QuantizeJob {
    QuantizeJob {
        source: source.to_path_buf(),
        destination: destination.to_path_buf(),
        existing: Existing::Refuse,
        options: QuantizeOptions::default(),
        max_shard_bytes: 1 << 30,
    }
}

fn run(job: &QuantizeJob) -> qlora::Result<WriteReport> {
    quantize(job, |_| {})
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn assert_same(read: &Params4bit, ours: &Params4bit) {
    assert_eq!(read.packed, ours.packed);
    assert_eq!(
        (read.quant_type, read.block_size, read.dtype),
        (ours.quant_type, ours.block_size, ours.dtype)
    );
    assert_eq!(read.shape, ours.shape);
    match (&read.absmax, &ours.absmax) {
        (Absmax::Single(read), Absmax::Single(ours)) => assert_eq!(read, ours),
        (
            Absmax::Double {
                codes,
                nested_absmax,
                nested_block_size,
                offset,
            },
            Absmax::Double {
                codes: our_codes,
                nested_absmax: our_nested_absmax,
                nested_block_size: our_nested_block_size,
                offset: our_offset,
            },
        ) => {
            assert_eq!((codes, nested_absmax), (our_codes, our_nested_absmax));
            assert_eq!(
                (nested_block_size, offset.to_bits()),
                (our_nested_block_size, our_offset.to_bits())
            );
        }
        _ => panic!("double quantization differs"),
    }
}

fn assert_holds_the_source(destination: &Path, options: QuantizeOptions) {
    let checkpoint = Checkpoint::open(destination).unwrap();
    for layer in 0..LAYERS {
        let name = weight_name(layer);
        let dense = DenseTensor {
            dtype: DType::F32,
            shape: vec![5, 30],
            data: Bytes::from(f32s(&weight(layer))),
        };
        let FrozenWeight::Quantized(read) = checkpoint.weight(&name).unwrap() else {
            panic!("{name} is not quantized");
        };
        assert_same(
            &read,
            &Params4bit::quantize(&name, &dense, options).unwrap(),
        );
        let norm = checkpoint.tensor(&norm_name(layer)).unwrap();
        assert_eq!(
            (norm.dtype, norm.data),
            (DType::BF16, Bytes::from(vec![layer as u8; 60]))
        );
    }
}

#[test]
fn what_is_written_is_what_was_quantized_and_copied() {
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for double_quant in [DoubleQuant::Yes, DoubleQuant::No] {
            for block_size in [32, 64, 128] {
                let (source, out) = (source(|_| ()), tempfile::tempdir().unwrap());
                let destination = out.path().join("q");
                let options = QuantizeOptions {
                    quant_type,
                    block_size,
                    double_quant,
                };
                let report = run(&QuantizeJob {
                    options,
                    ..job(source.path(), &destination)
                })
                .unwrap();
                assert_eq!(
                    (
                        report.quantized_tensors,
                        report.copied_tensors,
                        report.shards
                    ),
                    (LAYERS, LAYERS, 1)
                );
                assert_holds_the_source(&destination, options);
            }
        }
    }
}

#[test]
fn a_small_shard_size_gives_shards_that_read_as_one() {
    let (source, out) = (source(|_| ()), tempfile::tempdir().unwrap());
    let destination = out.path().join("q");
    let max_shard_bytes = 5000;
    let report = run(&QuantizeJob {
        max_shard_bytes,
        ..job(source.path(), &destination)
    })
    .unwrap();
    assert!(report.shards > 2);
    assert_holds_the_source(&destination, QuantizeOptions::default());
    let index = json_file(&destination.join("model.safetensors.index.json"));
    assert_eq!(index["metadata"]["total_size"], json!(report.written_bytes));
    let last = format!("model-{0:05}-of-{0:05}.safetensors", report.shards);
    assert_eq!(index["weight_map"][weight_name(LAYERS - 1)], json!(last));
    for shard in 1..=report.shards {
        let name = format!("model-{shard:05}-of-{:05}.safetensors", report.shards);
        let bytes = fs::read(destination.join(name)).unwrap();
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(bytes.len() as u64 - 8 - header_bytes <= max_shard_bytes);
    }
}

#[test]
fn the_config_says_how_to_load_it_and_other_files_come_along() {
    let (source, out) = (source(|_| ()), tempfile::tempdir().unwrap());
    let destination = out.path().join("q");
    run(&job(source.path(), &destination)).unwrap();
    assert_eq!(
        names_in(&destination),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    let config = json_file(&destination.join("config.json"));
    assert_eq!(
        (&config["model_type"], &config["custom"]),
        (&json!("llama"), &json!([1]))
    );
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quant_method"], "bitsandbytes");
    assert_eq!(quantization["load_in_4bit"], true);
    assert_eq!(quantization["bnb_4bit_quant_type"], "nf4");
    assert_eq!(quantization["bnb_4bit_use_double_quant"], true);
    assert_eq!(quantization["bnb_4bit_compute_dtype"], "float32");
    assert_eq!(quantization["bnb_4bit_quant_storage"], "uint8");
}

#[test]
fn the_same_source_gives_the_same_bytes() {
    let (source, out) = (source(|_| ()), tempfile::tempdir().unwrap());
    let bytes = |name: &str| {
        let destination = out.path().join(name);
        run(&job(source.path(), &destination)).unwrap();
        fs::read(destination.join("model.safetensors")).unwrap()
    };
    assert_eq!(bytes("one"), bytes("two"));
}

#[test]
fn progress_ends_at_the_size_of_the_source() {
    let (source, out) = (source(|_| ()), tempfile::tempdir().unwrap());
    let mut seen = Vec::new();
    let report = quantize(&job(source.path(), &out.path().join("q")), |progress| {
        seen.push((progress.done_bytes, progress.total_bytes));
    });
    assert!(seen.is_sorted());
    let size = (LAYERS * (150 * 4 + 60)) as u64;
    assert_eq!(
        (seen.len(), *seen.last().unwrap()),
        (2 * LAYERS, (size, size))
    );
    assert_eq!(report.unwrap().source_bytes, size);
}

/// The error of a job that leaves `out` as it was.
fn error_of(job: &QuantizeJob, out: &Path) -> String {
    let before = names_in(out);
    let error = run(job).unwrap_err().to_string();
    assert_eq!(names_in(out), before);
    error
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    }
}

#[test]
fn a_non_finite_weight_is_refused_with_its_place_and_nothing_is_left() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let source = source(|weights| weights.get_mut(&weight_name(7)).unwrap()[33] = value);
        let out = tempfile::tempdir().unwrap();
        let message = error_of(&job(source.path(), &out.path().join("q")), out.path());
        assert_says(&message, &[&weight_name(7), "element 33", "non-finite"]);
    }
}

#[test]
fn a_model_without_linear_layers_is_refused() {
    let source = source(|weights| {
        weights.clear();
        weights.insert("model.embed_tokens.weight".into(), vec![0.0; 10]);
    });
    let out = tempfile::tempdir().unwrap();
    let message = error_of(&job(source.path(), &out.path().join("q")), out.path());
    assert_says(&message, &["no weight to quantize", "q_proj"]);
}

#[test]
fn a_quantized_model_is_not_quantized_again() {
    let (source, out) = (source(|_| ()), tempfile::tempdir().unwrap());
    let first = out.path().join("q");
    run(&job(source.path(), &first)).unwrap();
    let message = error_of(&job(&first, &out.path().join("again")), out.path());
    assert_says(&message, &["already quantized"]);
    let gptq = r#"{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}"#;
    fs::write(source.path().join("config.json"), gptq).unwrap();
    let message = error_of(&job(source.path(), &out.path().join("gptq")), out.path());
    assert_says(&message, &["already quantized"]);
}

#[test]
fn an_existing_destination_is_replaced_only_when_that_is_asked_for() {
    let (source, out) = (source(|_| ()), tempfile::tempdir().unwrap());
    let destination = out.path().join("q");
    run(&job(source.path(), &destination)).unwrap();
    fs::write(destination.join("mine.txt"), "x").unwrap();
    let again = job(source.path(), &destination);
    assert_says(
        &error_of(&again, out.path()),
        &["already exists", "--overwrite"],
    );
    run(&QuantizeJob {
        existing: Existing::Replace,
        ..again
    })
    .unwrap();
    assert_eq!(
        names_in(&destination),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    assert_eq!(names_in(out.path()), ["q"]);
}

#[test]
fn neither_the_source_nor_anything_but_a_model_is_replaced() {
    let (source, out) = (source(|_| ()), tempfile::tempdir().unwrap());
    let replace = |destination: &Path| QuantizeJob {
        existing: Existing::Replace,
        ..job(source.path(), destination)
    };
    let files = names_in(source.path());
    let message = error_of(&replace(source.path()), out.path());
    assert_says(&message, &["is or contains the source"]);
    let message = error_of(&replace(source.path().parent().unwrap()), out.path());
    assert_says(&message, &["is or contains the source"]);
    assert_eq!(names_in(source.path()), files);
    fs::write(out.path().join("mine.txt"), "x").unwrap();
    let message = error_of(&replace(out.path()), out.path());
    assert_says(&message, &["not a model directory"]);
}
