//! The language model of a model that also sees images: it is computed, trained, quantized and merged as one that stands
//! alone, under the names that transformers and PEFT give it; what the model sees with is carried along.

mod reference_case;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use candle_core::DType;
use qlora::IGNORE_INDEX;
use qlora::export::{Merged, MergedQuantizer};
use qlora::model::{ActivationPolicy, DecoderConfig, InitLoraWeights, ModelTensor};
use qlora::quant::{FrozenWeight, QuantizeOptions};
use qlora::store::{
    Adapter, AdapterConfig, Checkpoint, Existing, INITIAL_ADAPTER, Quantization, QuantizeJob,
    SafetensorsWriter, TargetModules, TensorSource, quantize, vision_part,
};
use reference_case::{
    ReferenceCase, largest_difference, micro_batch, relative_error, sequences, values,
};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

/// One with what it sees with in 16 bits, and files with the names that transformers writes; one all in 4 bits, with the names
/// that its modules have; one whose files never had others.
const CASES: [&str; 3] = ["gemma3_vision", "mistral3", "qwen3_vl"];

fn merged(case: &ReferenceCase, dtype: DType) -> Merged {
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    let adapter = Adapter::read(&case.adapter).unwrap();
    Merged::new(checkpoint, Some(&adapter), None, Some(dtype)).unwrap()
}

fn write(merged: &Merged, in_4_bits: bool, destination: &Path) {
    let dir = merged.model_dir(destination, Existing::Refuse, u64::MAX);
    let mut quantizer = MergedQuantizer(merged);
    let quantization = in_4_bits.then_some(Quantization {
        options: merged.quantize_options(),
        quantizer: &mut quantizer,
    });
    dir.write(merged, quantization, |_| ()).unwrap();
}

fn config(model: &Path) -> Value {
    serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap()
}

fn weight_names(model: &Checkpoint) -> BTreeSet<String> {
    model.weight_names().map(str::to_string).collect()
}

/// The names of what a model sees with.
fn seeing(model: &Checkpoint) -> Vec<String> {
    let names = model.weight_names().map(str::to_string);
    let seeing: Vec<_> = names.filter(|name| vision_part(name).is_some()).collect();
    assert!(seeing.len() > 10, "{seeing:?}");
    seeing
}

fn exact_values(weight: &FrozenWeight) -> Vec<f32> {
    let mut values = vec![0.0; weight.shape().iter().product()];
    weight.read_range(0, &mut values);
    values
}

#[test]
fn logits_loss_and_gradients_are_those_of_transformers_and_peft() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let (decoder, batch) = (case.decoder(), case.batch());
        let logits = values(&decoder.logits(sequences(&batch)).unwrap());
        let difference = largest_difference(&logits, &case.logits.concat());
        assert!(difference < 1e-4, "{name}: {difference}");
        let targets = batch.target_count();
        let micro_batches = [micro_batch(&batch, None)];
        let policies = [ActivationPolicy::Keep, ActivationPolicy::Recompute];
        let d_loss = 1.0 / targets as f32;
        let losses = decoder.backward(&micro_batches, d_loss, &policies).unwrap();
        let losses = losses.into_iter().next().unwrap().read().unwrap();
        let loss = losses.iter().map(|l| f64::from(l.loss)).sum::<f64>() / targets as f64;
        assert!(
            (loss - f64::from(case.loss)).abs() < 1e-5 * loss,
            "{name}: {loss}"
        );
        let mut grads: Vec<_> = decoder
            .trainables()
            .map(|(name, t)| (name, values(&t.grad)))
            .collect();
        grads.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(grads.len(), case.grads.len(), "{name}");
        for ((tensor, found), (expected_name, expected)) in grads.iter().zip(&case.grads) {
            assert_eq!(tensor, expected_name);
            let error = relative_error(found, expected);
            assert!(error < 1e-4, "{name} {tensor}: {error}");
        }
        assert!(batch.labels.contains(&IGNORE_INDEX));
    }
}

/// PEFT would put adapters on layers of the same names in what the model sees with, and then miss their tensors.
#[test]
fn an_adapter_says_by_paths_where_it_is() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let mut decoder = case.decoder();
        for targets in ["all-linear", "q_proj,v_proj", r".*\.1\.mlp\..*"] {
            let target_modules = TargetModules::parse(targets).unwrap();
            let lora = AdapterConfig {
                r: 2,
                target_modules,
                ..AdapterConfig::default()
            };
            decoder
                .add_lora(&lora, InitLoraWeights::Default, 0)
                .unwrap();
            let dir = tempfile::tempdir().unwrap();
            decoder.adapter(&lora).unwrap().write(dir.path()).unwrap();
            let text = fs::read(dir.path().join("adapter_config.json")).unwrap();
            let written: Value = serde_json::from_slice(&text).unwrap();
            let adapter = Adapter::read(dir.path()).unwrap();
            let names = adapter.tensors.keys();
            let paths = names.filter_map(|name| {
                let path = name.strip_prefix("base_model.model.")?;
                path.strip_suffix(".lora_A.weight")
            });
            assert_eq!(written["target_modules"], json!(paths.collect::<Vec<_>>()));
            let paths = written["target_modules"].as_array().unwrap();
            let decoder_path = "model.language_model.layers.";
            let is_within = |path: &Value| path.as_str().unwrap().starts_with(decoder_path);
            assert!(
                !paths.is_empty() && paths.iter().all(is_within),
                "{name} {targets}"
            );
            decoder.load_adapter(&adapter).unwrap();
        }
    }
}

#[test]
fn a_merged_model_has_all_parts_under_their_names_and_the_logits_of_peft() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let merged_model = merged(&case, DType::F32);
        write(&merged_model, false, &out);
        let difference = largest_difference(&case.logits_of(&out), &case.logits.concat());
        assert!(difference < 1e-4, "{name}: {difference}");
        let config = config(&out);
        assert!(config.get("quantization_config").is_none(), "{name}");
        let (base, merged) = (
            Checkpoint::open(&case.dir).unwrap(),
            Checkpoint::open(&out).unwrap(),
        );
        assert_eq!(weight_names(&merged), weight_names(&base), "{name}");
        for part in ModelTensor::all(merged_model.config()) {
            let path = part.name(merged_model.config());
            let expected = merged.tensor(&path).unwrap().to_f32_vec();
            assert_eq!(merged_model.tensor(&path).unwrap().to_f32_vec(), expected);
        }
        for tensor in seeing(&base) {
            let expected = exact_values(&base.weight(&tensor).unwrap());
            let found = merged.tensor(&tensor).unwrap();
            assert_eq!(found.to_f32_vec(), expected, "{name} {tensor}");
        }
    }
}

fn qlora(args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qlora"));
    let output = command.args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Its layers are called otherwise in the files than in the adapter.
#[test]
fn an_initialization_makes_base_and_adapter_together() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let dir = tempfile::tempdir().unwrap();
        let dense = dir.path().join("dense");
        write(&merged(&case, DType::BF16), false, &dense);
        let [dense, base] = [dense, dir.path().join("base")];
        let adapter = base.join(INITIAL_ADAPTER);
        let [dense, base, adapter] = [&dense, &base, &adapter].map(|path| path.to_str().unwrap());
        let init = [
            "--init_lora_weights",
            "pissa_niter_4",
            "--lora_r",
            "8",
            "--lora_alpha",
            "8",
        ];
        qlora(&[&["quantize", dense, base], &init[..]].concat());
        let compare = [
            "inspect",
            base,
            "--original",
            dense,
            "--adapter",
            adapter,
            "--json",
        ];
        let told: Value = serde_json::from_str(&qlora(&compare)).unwrap();
        let error = |of: &str| told["in_all"][of].as_f64().unwrap();
        assert!(
            error("relative_error") < 0.5 * error("relative_error_of_base"),
            "{told}"
        );
    }
}

/// The names of its tensors and paths changed with transformers 4.52.
#[test]
fn an_adapter_of_an_older_transformers_is_read_and_one_on_the_vision_tower_is_told() {
    let case = ReferenceCase::read("gemma3_vision");
    let adapter = Adapter::read(&case.adapter).unwrap();
    let renamed = |old: &str, new: &str| {
        let tensors = adapter.tensors.iter();
        let tensors = tensors.map(|(name, tensor)| (name.replace(old, new), tensor.clone()));
        tensors.collect::<BTreeMap<_, _>>()
    };
    let dir = tempfile::tempdir().unwrap();
    let old = renamed("model.language_model.", "language_model.model.");
    let paths = old.keys().filter_map(|name| {
        let path = name.strip_prefix("base_model.model.")?;
        path.strip_suffix(".lora_A.weight")
    });
    let paths: Vec<&str> = paths.collect();
    let is_old = |path: &&str| path.starts_with("language_model.model.layers.");
    assert!(paths.len() == 14 && paths.iter().all(is_old));
    // Written as it is: the config's paths are not made new.
    let config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": paths});
    fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    let weights = dir.path().join("adapter_model.safetensors");
    SafetensorsWriter::write_f32(&weights, &old, BTreeMap::new()).unwrap();
    let mut decoder = case.decoder();
    decoder
        .load_adapter(&Adapter::read(dir.path()).unwrap())
        .unwrap();
    let found = values(&decoder.logits(sequences(&case.batch())).unwrap());
    assert!(largest_difference(&found, &case.logits.concat()) < 1e-4);
    let on_vision = renamed(
        "model.language_model.layers.1.",
        "model.vision_tower.encoder.layers.1.",
    );
    let on_vision = Adapter {
        config: AdapterConfig {
            target_modules: TargetModules::parse(r".*language_model\.layers\.0\..*_proj").unwrap(),
            ..adapter.config.clone()
        },
        tensors: on_vision,
    };
    let error = decoder.load_adapter(&on_vision).unwrap_err().to_string();
    assert!(
        error.contains("vision_tower") && error.contains("sees images"),
        "{error}"
    );
}

#[test]
fn integers_beside_the_decoder_are_kept_as_they_are() {
    let case = ReferenceCase::read("mistral3");
    let dir = tempfile::tempdir().unwrap();
    let [model, out] = ["model", "out"].map(|name| dir.path().join(name));
    fs::create_dir(&model).unwrap();
    let base = fs::read(case.dir.join("model.safetensors")).unwrap();
    let base = SafeTensors::deserialize(&base).unwrap();
    let positions: Vec<u8> = (0..4i64).flat_map(i64::to_le_bytes).collect();
    let positions = TensorView::new(Dtype::I64, vec![1, 4], &positions).unwrap();
    let name = "model.vision_tower.embeddings.position_ids";
    let tensors = base.tensors().into_iter();
    let tensors = tensors.chain([(name.to_string(), positions.clone())]);
    safetensors::serialize_to_file(tensors, None, &model.join("model.safetensors")).unwrap();
    fs::copy(case.dir.join("config.json"), model.join("config.json")).unwrap();
    let merged = Merged::new(Checkpoint::open(&model).unwrap(), None, None, None).unwrap();
    write(&merged, false, &out);
    let written = fs::read(out.join("model.safetensors")).unwrap();
    let written = SafeTensors::deserialize(&written).unwrap();
    assert_eq!(written.tensor(name).unwrap(), positions);
}

#[test]
fn in_four_bits_only_the_decoder_is_and_transformers_is_told() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let dir = tempfile::tempdir().unwrap();
        let [dense, merged_again, quantized] =
            ["dense", "merged", "quantized"].map(|name| dir.path().join(name));
        write(&merged(&case, DType::BF16), false, &dense);
        write(&merged(&case, DType::BF16), true, &merged_again);
        let job = QuantizeJob {
            source: dense,
            destination: quantized.clone(),
            existing: Existing::Refuse,
            options: QuantizeOptions::default(),
            max_shard_bytes: u64::MAX,
        };
        let report = quantize(&job, |_| ()).unwrap();
        assert_eq!(report.quantized_tensors, 14, "{name}");
        for model in [&merged_again, &quantized] {
            let checkpoint = Checkpoint::open(model).unwrap();
            let in_4_bits = |tensor: &&String| {
                let weight = checkpoint.weight(tensor).unwrap();
                matches!(weight, FrozenWeight::Quantized(_))
            };
            let names = weight_names(&checkpoint);
            assert_eq!(names.iter().filter(in_4_bits).count(), 14, "{name}");
            assert!(
                !seeing(&checkpoint).iter().any(|name| in_4_bits(&name)),
                "{name}"
            );
            let skipped = &config(model)["quantization_config"]["llm_int8_skip_modules"];
            let parts: &[&str] = match name {
                "qwen3_vl" => &["model.visual", "visual", "lm_head"],
                _ => &[
                    "model.multi_modal_projector",
                    "model.vision_tower",
                    "multi_modal_projector",
                    "vision_tower",
                    "lm_head",
                ],
            };
            assert_eq!(*skipped, json!(parts), "{name}");
            let config = DecoderConfig::from_json(checkpoint.config(), model).unwrap();
            assert_eq!(config.num_layers, 2);
        }
        let difference = relative_error(&case.logits_of(&quantized), &case.logits.concat());
        // Random weights are far from being quantized without a loss; other weights differ by more than 1.
        assert!(difference < 0.4, "{name}: {difference}");
    }
}
