//! An adapter that is merged into its model predicts what the two predict, in every kind and every format that is written.

mod emulated;
mod reference_case;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use candle_core::DType;
use emulated::placement_test;
use qlora::device::Placement;
use qlora::export::{Merged, MergedQuantizer};
use qlora::infer::agreement;
use qlora::model::{Decoder, DecoderConfig, InitLoraWeights, Module};
use qlora::quant::{DenseTensor, FrozenWeight, Params4bit};
use qlora::store::{
    Adapter, AdapterConfig, Checkpoint, Existing, GgufFile, ModelDir, Quantization, TensorSource,
    WriteReport,
};
use reference_case::{ADAPTER_CASES, CASES, ReferenceCase, largest_difference, sequences, values};
use serde_json::{Value, json};

fn merged(case: &ReferenceCase, dtype: Option<DType>) -> Merged {
    let adapter = Adapter::read(&case.adapter).unwrap();
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    Merged::new(checkpoint, Some(&adapter), None, dtype).unwrap()
}

/// Writes it to `destination`, in shards of at most `max_shard_bytes`.
fn write(
    merged: &Merged,
    in_4_bits: bool,
    destination: &Path,
    max_shard_bytes: u64,
) -> WriteReport {
    let dir = ModelDir {
        generation_config: None,
        origin: merged.origin(),
        config: merged.config_json(),
        destination,
        existing: Existing::Refuse,
        max_shard_bytes,
    };
    let mut quantizer = MergedQuantizer(merged);
    let quantization = in_4_bits.then_some(Quantization {
        options: merged.quantize_options(),
        quantizer: &mut quantizer,
    });
    dir.write(merged, quantization, |_| ()).unwrap()
}

fn config(model: &Path) -> Value {
    serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap()
}

#[test]
fn a_merged_model_has_the_logits_of_peft() {
    let cases = CASES.map(ReferenceCase::read).into_iter();
    let of_adapters = ADAPTER_CASES.map(ReferenceCase::of_adapter);
    for case in cases.chain(of_adapters) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let merged = merged(&case, Some(DType::F32));
        write(&merged, false, &out, u64::MAX);
        let name = case.adapter.display();
        assert_eq!(merged.rounding_error(), Some(0.0), "{name}");
        let difference = largest_difference(&case.logits_of(&out), &case.logits.concat());
        assert!(difference < 1e-4, "{name}: {difference}");
        let config = config(&out);
        assert!(config.get("quantization_config").is_none(), "{name}");
        let dtype = config.get("dtype").or(config.get("torch_dtype"));
        assert_eq!(dtype.unwrap(), "float32", "{name}");
    }
}

placement_test!(
    a_merged_model_on_a_device_predicts_as_on_the_cpu,
    |placement| {
        let case = ReferenceCase::read("qwen3");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        write(&merged(&case, None), false, &out, u64::MAX);
        let load =
            |model: &Path, at| Decoder::load(&Checkpoint::open(model).unwrap(), None, at).unwrap();
        let cpu = Placement::cpu();
        let (on_cpu, on_device) = (load(&out, &cpu), load(&out, placement));
        let base = load(&case.dir, &cpu);
        let [found, without] = agreement(&on_cpu, [&on_device, &base], &case.examples).unwrap();
        assert!(
            found.kl < 1e-3 && found.kl < 0.05 * without.kl,
            "{found:?} {without:?}"
        );
    }
);

#[test]
fn tied_embeddings_part_only_where_one_of_them_was_trained() {
    let is_tied = |model: &Path| {
        let has_head = Checkpoint::open(model).unwrap().contains("lm_head.weight");
        let config = DecoderConfig::from_json(&config(model), model).unwrap();
        assert_eq!(config.tie_word_embeddings, !has_head);
        config.tie_word_embeddings
    };
    for (name, stays_tied) in [("tied_embedding", false), ("tied_head", false)] {
        let case = ReferenceCase::of_adapter(name);
        assert!(is_tied(&case.dir), "{name}");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        write(&merged(&case, None), false, &out, u64::MAX);
        assert_eq!(is_tied(&out), stays_tied, "{name}");
    }
    let tied = CASES.map(ReferenceCase::read).into_iter();
    let tied: Vec<_> = tied.filter(|case| is_tied(&case.dir)).collect();
    assert!(!tied.is_empty());
    for case in tied {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        write(&merged(&case, None), false, &out, u64::MAX);
        assert!(is_tied(&out), "{}", case.dir.display());
    }
}

/// The weights of the linear layers with their names, and whether they have an adapter.
fn linears(merged: &Merged, adapter: &Adapter) -> Vec<(String, bool)> {
    let linears = merged.config().linears();
    let weight = |(layer, module): (usize, Module)| {
        let path = merged.config().linear_path(layer, module);
        let name = format!("{path}.weight");
        let a = format!("base_model.model.{path}.lora_A.weight");
        (name, adapter.tensors.contains_key(&a))
    };
    linears.map(weight).collect()
}

#[test]
fn sixteen_bits_are_the_exact_weights_rounded_once_and_what_that_loses_is_told() {
    let case = ReferenceCase::of_adapter("rslora_q_v");
    for dtype in [DType::BF16, DType::F16] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let merged = merged(&case, Some(dtype));
        let report = write(&merged, false, &out, u64::MAX);
        let (mut error, mut change) = (0.0, 0.0);
        let written = Checkpoint::open(&out).unwrap();
        let base = Checkpoint::open(&case.dir).unwrap();
        for (name, has_adapter) in linears(&merged, &Adapter::read(&case.adapter).unwrap()) {
            let exact = merged.tensor(&name).unwrap();
            let stored = written.tensor(&name).unwrap();
            assert_eq!(stored.dtype, dtype);
            assert_eq!(stored.data, exact.to_dtype(&name, dtype).unwrap().data);
            if has_adapter {
                let base = base.weight(&name).unwrap();
                let mut before = vec![0.0; exact.numel()];
                base.read_range(0, &mut before);
                let distance = |a: &[f32], b: &[f32]| -> f64 {
                    let d = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
                    d.sum()
                };
                let exact = exact.to_f32_vec();
                error += distance(&stored.to_f32_vec(), &exact);
                change += distance(&exact, &before);
            }
        }
        let (told, expected) = (merged.rounding_error().unwrap(), (error / change).sqrt());
        assert!((told / expected - 1.0).abs() < 1e-6, "{told} {expected}");
        assert!(expected > 1e-4 && expected < 0.1, "{expected}");
        assert_eq!(report.quantized_tensors, 0);
        assert_eq!(report.written_bytes, report.source_bytes);
    }
}

#[test]
fn in_four_bits_a_weight_without_an_adapter_keeps_its_bits() {
    for name in ["one_layer", "rslora_q_v"] {
        let case = ReferenceCase::of_adapter(name);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let merged = merged(&case, None);
        let report = write(&merged, true, &out, u64::MAX);
        let of_quantization = &config(&out)["quantization_config"];
        assert_eq!(of_quantization["bnb_4bit_quant_type"], "nf4");
        let params = |model: &Path, name: &str| match Checkpoint::open(model).unwrap().weight(name)
        {
            Ok(FrozenWeight::Quantized(params)) => params,
            other => panic!("{name}: {other:?}"),
        };
        let same = |a: &Params4bit, b: &Params4bit| {
            a.packed == b.packed && a.nbytes() == b.nbytes() && a.dtype == b.dtype && {
                let values = |p: &Params4bit| {
                    let mut values = vec![0f32; p.numel()];
                    p.dequantize_range(0, &mut values);
                    values
                };
                values(a) == values(b)
            }
        };
        let linears = linears(&merged, &Adapter::read(&case.adapter).unwrap());
        assert_eq!(report.quantized_tensors, linears.len());
        assert!(linears.iter().any(|(_, has_adapter)| *has_adapter));
        for (name, has_adapter) in linears {
            let (before, after) = (params(&case.dir, &name), params(&out, &name));
            if has_adapter {
                let exact = merged.tensor(&name).unwrap();
                let options = merged.quantize_options();
                let mut expected = Params4bit::quantize(&name, &exact, options).unwrap();
                expected.dtype = before.dtype;
                assert!(same(&after, &expected), "{name}");
                assert!(!same(&after, &before), "{name}");
            } else {
                assert!(same(&after, &before), "{name}");
            }
        }
        let lost = merged.rounding_error().unwrap();
        assert!(lost > 0.0 && lost.is_finite(), "{lost}");
    }
}

#[test]
fn shards_hold_what_one_file_holds() {
    let case = ReferenceCase::read("llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    for (in_4_bits, max_shard_bytes) in [(false, 60_000), (true, 60_000)] {
        let (whole, parts) = (
            whole.join(in_4_bits.to_string()),
            parts.join(in_4_bits.to_string()),
        );
        write(&merged(&case, None), in_4_bits, &whole, u64::MAX);
        let report = write(&merged(&case, None), in_4_bits, &parts, max_shard_bytes);
        assert!(report.shards > 1, "{report:?}");
        assert_eq!(case.logits_of(&whole), case.logits_of(&parts));
    }
}

#[test]
fn numbers_that_a_type_does_not_hold_are_refused() {
    let tensor = DenseTensor::from_f32(vec![2], &[1.0, 70000.0]);
    assert!(tensor.to_dtype("w", DType::BF16).is_ok());
    let error = tensor.to_dtype("w", DType::F16).unwrap_err().to_string();
    assert!(error.contains("`w`") && error.contains("70000"), "{error}");
}

fn qlora(arguments: &[&str], directory: &Path) -> Output {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    command
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap()
}

fn failure(arguments: &[&str], directory: &Path) -> String {
    let output = qlora(arguments, directory);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// An adapter and its model in `dir`, as `adapter` and `model`.
fn lay_out(case: &ReferenceCase, dir: &Path) {
    for (from, to) in [(&case.dir, "model"), (&case.adapter, "adapter")] {
        fs::create_dir(dir.join(to)).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, dir.join(to).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    let path = dir.join("adapter/adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["base_model_name_or_path"] = "model".into();
    fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn the_command_exports_and_verify_tells_an_export_from_the_model_below() {
    let case = ReferenceCase::read("llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    lay_out(&case, dir.path());
    let export = |to: &str, more: &[&str]| {
        let arguments = [
            "export",
            "--adapter",
            "adapter",
            "--to",
            to,
            "--out",
            to,
            "--json",
        ];
        let output = qlora(&[&arguments[..], more].concat(), dir.path());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let report = export("merged", &[]);
    assert_eq!(report["base"], "model");
    assert!(report["rounding_error"].as_f64().unwrap() > 0.0);
    export("merged-4bit", &[]);
    export("merged", &["--overwrite", "--dtype", "f32"]);

    let verify = |exported: &str| {
        let of = ["--model", "model", "--adapter", "adapter", "--json"];
        let output = qlora(
            &[&["verify", "export", exported][..], &of].concat(),
            dir.path(),
        );
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), report)
    };
    let (status, report) = verify("merged");
    assert_eq!(status, Some(0));
    assert!(report["exported"]["kl"].as_f64().unwrap().abs() < 1e-6);
    assert_eq!(report["exported"]["same_top_token"], 1.0);
    assert!(report["without_adapter"]["kl"].as_f64().unwrap() > 1e-2);
    assert_eq!(verify("merged-4bit").0, Some(0));
    let (status, report) = verify("model");
    assert_eq!((status, &report["same"]), (Some(1), &false.into()));
}

#[test]
fn what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing() {
    let case = ReferenceCase::read("llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    lay_out(&case, dir.path());
    let export = [
        "export",
        "--adapter",
        "adapter",
        "--to",
        "merged",
        "--out",
        "out",
    ];
    let refused = |more: &[&str], parts: &[&str]| {
        let message = failure(&[&export[..], more].concat(), dir.path());
        assert_eq!(message.trim_end().lines().count(), 1, "{message}");
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in `{message}`");
        }
        assert!(!dir.path().join("out").exists());
    };
    refused(&["--base", "adapter"], &["adapter/config.json"]);
    let other = ReferenceCase::read("qwen3").dir;
    refused(
        &["--base", other.to_str().unwrap()],
        &["adapter: does not fit"],
    );

    fs::rename(dir.path().join("model"), dir.path().join("moved")).unwrap();
    refused(&[], &["was trained on model", "--base DIR"]);
    fs::rename(dir.path().join("moved"), dir.path().join("model")).unwrap();

    // An adapter that belongs to weights which were made with it.
    let record = |relative_to: &str| {
        let record = serde_json::json!({
            "init_lora_weights": "pissa",
            "quantization_iterations": 1,
            "seed": 0,
            "original_model": "original",
            "initialized_base": "pissa-base",
            "adapter_is_relative_to": relative_to,
        });
        fs::write(
            dir.path().join("adapter/initialization.json"),
            record.to_string(),
        )
        .unwrap();
    };
    record("initialized_base");
    refused(&[], &["pissa-base", "adapter_for_original_model"]);
    record("original_model");
    let output = qlora(&export, dir.path());
    assert!(output.status.success(), "{output:?}");

    let message = failure(&export, dir.path());
    assert!(message.contains("--overwrite"), "{message}");
    let message = failure(
        &[&export[..6], &["adapter", "--overwrite"]].concat(),
        dir.path(),
    );
    assert!(message.contains("not a model directory"), "{message}");
    assert!(dir.path().join("adapter/adapter_config.json").exists());
}

/// The model directory of a tokenizer with one of the fixtures' chat templates.
fn with_template(name: &str, add_bos_token: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data");
    let tokenizer = data.join("tokenizer");
    fs::copy(
        tokenizer.join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let config = fs::read(tokenizer.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["add_bos_token"] = add_bos_token.into();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let template = data.join("templates").join(format!("{name}.jinja"));
    fs::copy(template, dir.path().join("chat_template.jinja")).unwrap();
    dir
}

#[test]
fn chat_templates_become_templates_of_ollama_or_are_refused() {
    let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data/templates");
    let mut told = String::new();
    let mut names: Vec<_> = fs::read_dir(templates)
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .path()
                .file_stem()
                .unwrap()
                .to_str()
                .unwrap()
                .to_string()
        })
        .collect();
    names.sort();
    for name in names {
        let dir = with_template(&name, true);
        let tokenizer = qlora::data::Tokenizer::from_dir(dir.path()).unwrap();
        let written = match qlora::export::modelfile(&tokenizer, "./model.gguf") {
            Ok(modelfile) => modelfile,
            Err(error) => {
                let error = error.to_string();
                format!(
                    "error: {}\n",
                    error.replace(dir.path().to_str().unwrap(), "DIR")
                )
            }
        };
        told += &format!("## {name}\n{written}\n");
    }
    insta::assert_snapshot!(told);
}

#[test]
fn a_bos_is_left_to_the_runner_only_where_that_adds_it() {
    for add_bos_token in [false, true] {
        let dir = with_template("gemma", add_bos_token);
        let tokenizer = qlora::data::Tokenizer::from_dir(dir.path()).unwrap();
        let modelfile = qlora::export::modelfile(&tokenizer, "./model.gguf").unwrap();
        let begins = modelfile.contains("TEMPLATE \"\"\"<s><start_of_turn>user");
        assert_eq!(begins, !add_bos_token, "{modelfile}");
    }
}

#[test]
fn files_of_llama_cpp_are_written_and_only_their_own_kind_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    lay_out(&ReferenceCase::read("llama_gqa"), dir.path());
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo/base");
    let demo = demo.to_str().unwrap();
    let of_demo = |to: &'static str, out: &'static str| {
        ["export", "--base", demo, "--to", to, "--out", out]
            .map(str::to_string)
            .to_vec()
    };
    let run = |arguments: &[String], more: &[&str]| {
        let arguments: Vec<&str> = arguments
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        qlora(&arguments, dir.path())
    };
    let ok = |arguments: &[String], more: &[&str]| {
        let output = run(arguments, more);
        assert!(output.status.success(), "{output:?}");
    };
    let refused = |arguments: &[String], more: &[&str], part: &str| {
        let output = run(arguments, more);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    };
    let is_gguf = |file: &str| {
        fs::read(dir.path().join(file))
            .unwrap()
            .starts_with(b"GGUF")
    };
    let size = |file: &str| fs::metadata(dir.path().join(file)).unwrap().len();

    let gguf = of_demo("gguf", "demo.gguf");
    ok(&gguf, &[]);
    let in_bf16 = size("demo.gguf");
    refused(&gguf, &[], "--overwrite");
    ok(&gguf, &["--overwrite", "--dtype", "q8_0"]);
    assert!(is_gguf("demo.gguf") && size("demo.gguf") < in_bf16);
    refused(
        &of_demo("gguf", "model"),
        &["--overwrite"],
        "will not be replaced",
    );
    refused(
        &of_demo("gguf", "adapter/adapter_config.json"),
        &["--overwrite"],
        "will not be replaced",
    );

    let modelfile = of_demo("modelfile", "ollama");
    ok(&modelfile, &[]);
    assert!(is_gguf("ollama/model.gguf"));
    let text = fs::read_to_string(dir.path().join("ollama/Modelfile")).unwrap();
    assert!(text.starts_with("FROM ./model.gguf\n"), "{text}");
    assert!(text.ends_with("PARAMETER stop \"</s>\"\n"), "{text}");
    ok(&modelfile, &["--overwrite"]);
    refused(
        &of_demo("modelfile", "adapter"),
        &["--overwrite"],
        "will not be replaced",
    );

    ok(&of_demo("gguf", "new/directory/demo.gguf"), &[]);

    // A directory of its kind, but with the model in it.
    fs::copy(
        dir.path().join("ollama/Modelfile"),
        dir.path().join("Modelfile"),
    )
    .unwrap();
    let over_its_model = [
        "export",
        "--base",
        "model",
        "--to",
        "modelfile",
        "--out",
        ".",
    ];
    let over_its_model = over_its_model.map(str::to_string);
    refused(&over_its_model, &["--overwrite"], "contains the source");
    assert!(dir.path().join("model/config.json").exists());

    let lora: Vec<String> = [
        "export",
        "--adapter",
        "adapter",
        "--to",
        "gguf-lora",
        "--out",
        "lora.gguf",
    ]
    .map(str::to_string)
    .to_vec();
    ok(&lora, &[]);
    assert!(is_gguf("lora.gguf"));
    refused(&lora, &["--overwrite", "--dtype", "q8_0"], "q8_0");
    refused(&of_demo("gguf-lora", "none.gguf"), &[], "--adapter");
    refused(&of_demo("merged", "none"), &["--dtype", "q8_0"], "q8_0");
    assert!(!dir.path().join("none.gguf").exists() && !dir.path().join("none").exists());
}

#[test]
fn a_model_alone_is_exported_as_its_own_weights() {
    let case = ReferenceCase::read("llama_gqa");
    let checkpoint = || Checkpoint::open(&case.dir).unwrap();
    let merged = Merged::new(checkpoint(), None, None, Some(DType::F32)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged");
    write(&merged, false, &out, u64::MAX);
    assert_eq!(merged.rounding_error(), None);
    let decoder = Decoder::load(&checkpoint(), None, &Placement::cpu()).unwrap();
    let expected = values(&decoder.logits(sequences(&case.batch())).unwrap());
    let difference = largest_difference(&case.logits_of(&out), &expected);
    assert!(difference < 1e-5, "{difference}");
}

/// Copies the demo's model to `dir`, as `model`, and makes an adapter for it that changes what it predicts.
fn lay_out_demo(dir: &Path) {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo/base");
    fs::create_dir(dir.join("model")).unwrap();
    for entry in fs::read_dir(demo).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.join("model").join(path.file_name().unwrap())).unwrap();
    }
    let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, &Placement::cpu()).unwrap();
    let config = AdapterConfig {
        r: 4,
        lora_alpha: 8.0,
        base_model_name_or_path: Some("model".into()),
        ..AdapterConfig::default()
    };
    decoder
        .add_lora(&config, InitLoraWeights::Default, 0)
        .unwrap();
    let mut adapter = decoder.adapter(&config).unwrap();
    for (name, tensor) in &mut adapter.tensors {
        if name.contains("lora_B") {
            let values: Vec<f32> = (0..tensor.numel())
                .map(|i| 0.2 * (i as f32).sin())
                .collect();
            *tensor = DenseTensor::from_f32(tensor.shape.clone(), &values);
        }
    }
    adapter.write(dir.join("adapter")).unwrap();
}

#[test]
fn verify_reads_the_files_of_llama_cpp_again() {
    let dir = tempfile::tempdir().unwrap();
    lay_out_demo(dir.path());
    let export = |of: &str, arguments: &[&str]| {
        let export = [&["export", of, "--out"], arguments].concat();
        let output = qlora(&export, dir.path());
        assert!(output.status.success(), "{output:?}");
    };
    let verify = |file: &str| {
        let of = ["--model", "model", "--adapter", "adapter", "--json"];
        qlora(&[&["verify", "export", file], &of[..]].concat(), dir.path())
    };
    let report = |output: &Output| serde_json::from_slice::<Value>(&output.stdout).unwrap();
    for (file, to, dtype, closest) in [
        ("f32.gguf", "gguf", "f32", 1e-6),
        ("q8_0.gguf", "gguf", "q8_0", 1e-2),
        ("lora.gguf", "gguf-lora", "f32", 1e-6),
    ] {
        export("--adapter=adapter", &[file, "--to", to, "--dtype", dtype]);
        let output = verify(file);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let report = report(&output);
        assert!(report["exported"]["kl"].as_f64().unwrap() < closest);
        assert!(report["without_adapter"]["kl"].as_f64().unwrap() > 0.1);
        assert_eq!(
            (&report["same"], &report["differences"]),
            (&json!(true), &json!([]))
        );
    }

    export("--base=model", &["without.gguf", "--to", "gguf"]);
    let output = verify("without.gguf");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(report(&output)["same"], false);

    // The model's tokenizer is no more what it was.
    let template = dir.path().join("model/chat_template.jinja");
    fs::write(template, "{{ messages[0].content }}").unwrap();
    let output = verify("f32.gguf");
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("does not have the tokenizer"), "{message}");
    let report = report(&output);
    assert!(
        report["differences"][0]
            .as_str()
            .unwrap()
            .starts_with("tokenizer.chat_template is")
    );
    assert!(report["exported"]["kl"].as_f64().unwrap() < 1e-6);
}

/// An adapter that changes little is told from none at all.
#[test]
fn verify_takes_no_export_without_the_adapter_for_one_with_it() {
    let dir = tempfile::tempdir().unwrap();
    lay_out_demo(dir.path());
    let adapter = Adapter::read(dir.path().join("adapter")).unwrap();
    let weak = Adapter {
        config: AdapterConfig {
            lora_alpha: 0.05,
            ..adapter.config.clone()
        },
        ..adapter
    };
    weak.write(dir.path().join("weak")).unwrap();
    let run = |arguments: &[&str]| qlora(arguments, dir.path());
    let modelfile = [
        "export",
        "--adapter=weak",
        "--to=modelfile",
        "--out=with",
        "--dtype=f32",
    ];
    assert!(run(&modelfile).status.success());
    let alone = ["export", "--base=model", "--to=gguf", "--out=without.gguf"];
    assert!(run(&alone).status.success());
    let verify = |exported: &str| {
        let output = run(&[
            "verify",
            "export",
            exported,
            "--model=model",
            "--adapter=weak",
            "--json",
        ]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(report["without_adapter"]["kl"].as_f64().unwrap() < 1e-3);
        output.status.code()
    };
    // A directory with a Modelfile is read by the model in it.
    assert_eq!((verify("with"), verify("without.gguf")), (Some(0), Some(1)));
}

/// Training teaches the end that the chat template writes, whether or not the model names it.
#[test]
fn the_end_of_an_answer_goes_along() {
    let dir = tempfile::tempdir().unwrap();
    lay_out_demo(dir.path());
    let model = dir.path().join("model");
    let path = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    let mut halt = added[0].clone();
    (halt["id"], halt["content"]) = (json!(1023), json!("<|halt|>"));
    added.push(halt);
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocabulary.retain(|_, id| *id != 1023);
    // The merge of the token that is gone.
    tokenizer["model"]["merges"].as_array_mut().unwrap().pop();
    fs::write(&path, tokenizer.to_string()).unwrap();
    fs::write(
        model.join("chat_template.jinja"),
        "{% for m in messages %}{{ m.content }}<|halt|>{% endfor %}",
    )
    .unwrap();
    for (to, out) in [("merged", "merged"), ("gguf", "model.gguf")] {
        let export = ["export", "--adapter=adapter", "--to", to, "--out", out];
        let output = qlora(&export, dir.path());
        assert!(output.status.success(), "{output:?}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(told.contains("[2, 1023]"), to == "merged", "{told}");
    }
    let config = fs::read(dir.path().join("merged/generation_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["eos_token_id"], json!([2, 1023]));
    let file = GgufFile::open(dir.path().join("model.gguf")).unwrap();
    assert_eq!(file.json("tokenizer.ggml.eot_token_id"), Some(json!(1023)));
    assert_eq!(file.json("tokenizer.ggml.eos_token_id"), Some(json!(2)));
}
