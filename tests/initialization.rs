//! PiSSA, LoftQ and OLoRA are PEFT's: the factors, logits and gradients with them, and what is written beside the base.

mod reference_case;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use candle_core::Device;
use predicates::str::contains;
use qlora::device::Placement;
use qlora::model::{
    ActivationPolicy, ApproximationError, Decoder, InitLoraWeights, InitializeOptions,
    InitializingQuantizer, LoraFactors,
};
use qlora::quant::{DenseTensor, DoubleQuant, FrozenWeight, QuantizeOptions};
use qlora::store::{
    Adapter, AdapterConfig, Checkpoint, Existing, INITIAL_ADAPTER, Initialization, MappedFile,
    ModulePatterns, QuantizeJob, RelativeTo, TargetModules, quantize_with,
};
use reference_case::{
    ReferenceCase, largest_difference, micro_batch, relative_error, sequences, values,
};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use tempfile::TempDir;

const RANK: usize = 8;
const WEIGHTS: [&str; 2] = ["small", "large"];
/// The layer that a weight of the fixture is put into.
const LAYER: &str = "model.layers.0.mlp.down_proj";

fn fixture(name: &str) -> DenseTensor {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/initialization/weights.safetensors");
    MappedFile::open(&path).unwrap().tensor(name).unwrap()
}

fn options(method: &str, lora_alpha: f64) -> InitializeOptions {
    InitializeOptions {
        method: method.parse().unwrap(),
        adapter: AdapterConfig {
            base_model_name_or_path: None,
            revision: None,
            r: RANK,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            use_rslora: false,
            ..AdapterConfig::default()
        },
        quantization_iterations: 1,
        seed: 3,
        device: Device::Cpu,
        original_model: PathBuf::from("original"),
        initialized_base: PathBuf::from("base"),
    }
}

/// A model directory whose only linear weights are `weights`.
fn model_of(weights: &[(String, DenseTensor)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let views = weights.iter().map(|(name, weight)| {
        let dtype = match weight.dtype {
            candle_core::DType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        };
        let view = TensorView::new(dtype, weight.shape.clone(), &weight.data).unwrap();
        (format!("{name}.weight"), view)
    });
    let path = dir.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let config = json!({"model_type": "llama"}).to_string();
    fs::write(dir.path().join("config.json"), config).unwrap();
    dir
}

/// Quantizes the model in `source` into a new directory.
fn initialize(source: &Path, options: InitializeOptions, double_quant: DoubleQuant) -> TempDir {
    let home = tempfile::tempdir().unwrap();
    let job = QuantizeJob {
        source: source.to_path_buf(),
        destination: home.path().join("base"),
        existing: Existing::Refuse,
        options: QuantizeOptions {
            double_quant,
            ..QuantizeOptions::default()
        },
        max_shard_bytes: u64::MAX,
    };
    let mut quantizer = InitializingQuantizer::new(options).unwrap();
    quantize_with(&job, &mut quantizer, |_| ()).unwrap();
    home
}

fn factor(adapter: &Adapter, layer: &str, name: &str) -> DenseTensor {
    adapter.tensors[&format!("base_model.model.{layer}.{name}.weight")].clone()
}

/// `s B A` by definition, in f64.
fn scaled_product(a: &DenseTensor, b: &DenseTensor, scaling: f64) -> Vec<f32> {
    let (r, out, ins) = (a.shape[0], b.shape[0], a.shape[1]);
    let (a, b) = (a.to_f32_vec(), b.to_f32_vec());
    let entry = |at: usize| {
        let (i, j) = (at / ins, at % ins);
        let terms = (0..r).map(|t| f64::from(b[i * r + t]) * f64::from(a[t * ins + j]));
        (scaling * terms.sum::<f64>()) as f32
    };
    (0..out * ins).map(entry).collect()
}

/// The factors that the crate makes of a weight of the fixture, and the scaling.
fn our_factors(weight: &str, options: InitializeOptions) -> (DenseTensor, DenseTensor, f64) {
    let source = model_of(&[(LAYER.to_string(), fixture(weight))]);
    let home = initialize(source.path(), options, DoubleQuant::Yes);
    let adapter = Adapter::read(home.path().join("base").join(INITIAL_ADAPTER)).unwrap();
    let scaling = adapter.config.scaling();
    (
        factor(&adapter, LAYER, "lora_A"),
        factor(&adapter, LAYER, "lora_B"),
        scaling,
    )
}

#[test]
fn pissa_takes_the_same_part_of_the_weight_as_peft() {
    for weight in WEIGHTS {
        for method in ["pissa", "pissa_niter_16", "pissa_rslora"] {
            let mut options = options(method.trim_end_matches("_rslora"), 16.0);
            options.adapter.use_rslora = method.ends_with("_rslora");
            let (a, b, scaling) = our_factors(weight, options);
            let peft = |name: &str| fixture(&format!("{weight}.{method}.{name}"));
            let (peft_a, peft_b) = (peft("lora_A"), peft("lora_B"));
            let error = relative_error(
                &scaled_product(&a, &b, scaling),
                &scaled_product(&peft_a, &peft_b, scaling),
            );
            assert!(error < 1e-4, "{weight} {method}: s B A {error}");
            assert_rows_equal_up_to_sign(&a, &peft_a, &format!("{weight} {method}"));
        }
    }
}

/// A singular vector has no sign of its own.
fn assert_rows_equal_up_to_sign(found: &DenseTensor, expected: &DenseTensor, what: &str) {
    let n = found.shape[1];
    let (found, expected) = (found.to_f32_vec(), expected.to_f32_vec());
    for (found, expected) in found.chunks(n).zip(expected.chunks(n)) {
        let negated: Vec<f32> = found.iter().map(|v| -v).collect();
        let error = relative_error(found, expected).min(relative_error(&negated, expected));
        assert!(error < 1e-3, "{what}: {error}");
    }
}

#[test]
fn olora_has_the_factors_of_peft() {
    for weight in WEIGHTS {
        let (a, b, _) = our_factors(weight, options("olora", 4.0));
        for (name, found) in [("lora_A", a), ("lora_B", b)] {
            let expected = fixture(&format!("{weight}.olora.{name}"));
            let error = relative_error(&found.to_f32_vec(), &expected.to_f32_vec());
            assert!(error < 1e-5, "{weight} {name}: {error}");
        }
    }
}

/// `|W - (Q + s B A)|` and `|W - Q|`, relative, after `quantize --init_lora_weights`.
fn approximation(
    weight: &str,
    options: InitializeOptions,
    double_quant: DoubleQuant,
) -> (f64, f64) {
    let source = model_of(&[(LAYER.to_string(), fixture(weight))]);
    let home = initialize(source.path(), options, double_quant);
    let base = Checkpoint::open(home.path().join("base")).unwrap();
    let adapter = Adapter::read(home.path().join("base").join(INITIAL_ADAPTER)).unwrap();
    let (a, b) = (
        factor(&adapter, LAYER, "lora_A").to_f32_vec(),
        factor(&adapter, LAYER, "lora_B").to_f32_vec(),
    );
    let name = format!("{LAYER}.weight");
    let original = FrozenWeight::Dense(fixture(weight));
    let lora = LoraFactors {
        a: &a,
        b: &b,
        r: adapter.config.r,
        scaling: adapter.config.scaling(),
    };
    let base = base.weight(&name).unwrap();
    let error = ApproximationError::measure(&name, &original, &base, Some(lora)).unwrap();
    (error.relative(), error.relative_of_base())
}

#[test]
fn loftq_is_as_close_to_the_weight_as_that_of_peft() {
    // The randomized decomposition of the large one ends where a further iteration gains a thousandth.
    for (weight, factor) in [("small", 1.00001), ("large", 1.005)] {
        let mut before = f64::INFINITY;
        for iterations in 1..=5 {
            let mut options = options("loftq", RANK as f64);
            options.quantization_iterations = iterations;
            let (error, of_base) = approximation(weight, options, DoubleQuant::No);
            let peft = fixture(&format!("{weight}.loftq_{iterations}.error"));
            let peft = f64::from(peft.to_f32_vec()[0]);
            assert!(
                error <= factor * peft,
                "{weight} {iterations}: {error}, PEFT {peft}"
            );
            assert!(
                error > 0.99 * peft,
                "{weight} {iterations}: {error}, PEFT {peft}"
            );
            assert!(error < of_base && error < before, "{weight} {iterations}");
            before = error;
        }
    }
}

#[test]
fn loftq_takes_the_scaling_into_account() {
    // PEFT's does not: there the adapter of lora_alpha = r / 2 would make up for half of what is lost.
    let full = approximation("small", options("loftq", RANK as f64), DoubleQuant::Yes);
    let half = approximation(
        "small",
        options("loftq", RANK as f64 / 2.0),
        DoubleQuant::Yes,
    );
    assert!((full.0 / half.0 - 1.0).abs() < 1e-5, "{full:?} {half:?}");
}

#[test]
fn more_iterations_of_qpissa_come_closer() {
    let error = |iterations| {
        let mut options = options("pissa", 16.0);
        options.quantization_iterations = iterations;
        approximation("large", options, DoubleQuant::Yes).0
    };
    let errors = [1, 2, 5].map(error);
    assert!(errors.is_sorted_by(|a, b| a > b), "{errors:?}");
    assert!(errors[2] < 0.97 * errors[0], "{errors:?}");
}

#[test]
fn training_from_each_initialization_begins_with_the_logits_and_gradients_of_peft() {
    for method in ["pissa", "olora", "loftq"] {
        let case = ReferenceCase::read(&format!("../initialization/{method}"));
        let decoder = case.decoder();
        let batch = case.batch();
        let logits = values(&decoder.logits(sequences(&batch)).unwrap());
        let difference = largest_difference(&logits, &case.logits.concat());
        assert!(difference < 1e-4, "{method}: {difference}");
        let d_loss = 1.0 / batch.target_count() as f32;
        let policies = [ActivationPolicy::Keep; 2];
        decoder
            .backward(&[micro_batch(&batch, None)], d_loss, &policies)
            .unwrap();
        let expected: BTreeMap<_, _> = case.grads.iter().cloned().collect();
        let mut count = 0;
        for (name, trainable) in decoder.trainables() {
            let error = relative_error(&values(&trainable.grad), &expected[&name]);
            assert!(error < 1e-4, "{method} {name}: {error}");
            count += 1;
        }
        assert_eq!(count, expected.len());
    }
}

#[test]
fn the_converted_adapter_makes_the_same_change_of_the_original_weight() {
    for use_rslora in [false, true] {
        let mut options = options("pissa", 16.0);
        options.adapter.use_rslora = use_rslora;
        let source = model_of(&[(LAYER.to_string(), fixture("small"))]);
        let home = initialize(source.path(), options, DoubleQuant::Yes);
        let initial = Adapter::read(home.path().join("base").join(INITIAL_ADAPTER)).unwrap();
        let mut trained = initial.clone();
        for tensor in trained.tensors.values_mut() {
            let values = tensor.to_f32_vec();
            let changed: Vec<f32> = (0..values.len())
                .map(|i| values[i] + 0.01 * (i as f32).sin())
                .collect();
            *tensor = DenseTensor::from_f32(tensor.shape.clone(), &changed);
        }
        let converted = trained.relative_to_original(&initial).unwrap();
        assert_eq!(converted.config.r, 2 * RANK);
        let scaling = initial.config.scaling();
        assert!((converted.config.scaling() / scaling - 1.0).abs() < 1e-12);
        // The files hold it as it is.
        let dir = tempfile::tempdir().unwrap();
        converted.write(dir.path()).unwrap();
        let converted = Adapter::read(dir.path()).unwrap();
        let product = |adapter: &Adapter| {
            let (a, b) = (
                factor(adapter, LAYER, "lora_A"),
                factor(adapter, LAYER, "lora_B"),
            );
            scaled_product(&a, &b, adapter.config.scaling())
        };
        let (after, before) = (product(&trained), product(&initial));
        let change: Vec<f32> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        let error = relative_error(&product(&converted), &change);
        assert!(error < 1e-5, "{error}");
        let other = Adapter {
            config: AdapterConfig {
                lora_alpha: 3.0,
                ..initial.config.clone()
            },
            ..initial.clone()
        };
        let error = trained.relative_to_original(&other).unwrap_err();
        assert!(error.to_string().contains("as the initial adapter"));
    }
}

#[test]
fn layers_that_are_not_targeted_are_quantized_as_ever() {
    let untouched = "model.layers.0.self_attn.q_proj";
    let weights = [
        (LAYER.to_string(), fixture("small")),
        (untouched.to_string(), fixture("small")),
    ];
    let source = model_of(&weights);
    let mut options = options("pissa", 16.0);
    options.adapter.target_modules = TargetModules::parse("down_proj").unwrap();
    let home = initialize(source.path(), options, DoubleQuant::Yes);
    let dir = home.path().join("base");
    let base = Checkpoint::open(&dir).unwrap();
    let packed = |layer: &str| match base.weight(&format!("{layer}.weight")).unwrap() {
        FrozenWeight::Quantized(params) => params.packed,
        FrozenWeight::Dense(_) => panic!("{layer} is not quantized"),
    };
    let nearest =
        qlora::quant::Params4bit::quantize("w", &fixture("small"), QuantizeOptions::default());
    let nearest = nearest.unwrap().packed;
    assert!(packed(untouched) == nearest && packed(LAYER) != nearest);
    let adapter = Adapter::read(dir.join(INITIAL_ADAPTER)).unwrap();
    assert_eq!(adapter.tensors.len(), 2);
    let record = Initialization::read(&dir.join(INITIAL_ADAPTER)).unwrap();
    let record = record.unwrap();
    assert_eq!(record.init_lora_weights, "pissa");
    assert_eq!(record.original_model, "original");
    assert_eq!(record.adapter_is_relative_to, RelativeTo::InitializedBase);
}

#[test]
fn each_layer_has_the_rank_and_the_scaling_of_its_pattern() {
    let other = "model.layers.0.self_attn.q_proj";
    let weights = [
        (LAYER.to_string(), fixture("small")),
        (other.to_string(), fixture("small")),
    ];
    let source = model_of(&weights);
    let mut options = options("pissa", 16.0);
    options.adapter.rank_pattern = ModulePatterns::new([("q_proj".to_string(), 3)]).unwrap();
    options.adapter.alpha_pattern = ModulePatterns::new([("q_proj".to_string(), 30.0)]).unwrap();
    let home = initialize(source.path(), options, DoubleQuant::Yes);
    let dir = home.path().join("base");
    let base = Checkpoint::open(&dir).unwrap();
    let adapter = Adapter::read(dir.join(INITIAL_ADAPTER)).unwrap();
    for (layer, r) in [(LAYER, RANK), (other, 3)] {
        let (a, b) = (
            factor(&adapter, layer, "lora_A"),
            factor(&adapter, layer, "lora_B"),
        );
        assert_eq!((a.shape[0], b.shape[1]), (r, r), "{layer}");
        let name = format!("{layer}.weight");
        let lora = LoraFactors {
            a: &a.to_f32_vec(),
            b: &b.to_f32_vec(),
            r,
            scaling: adapter.config.scaling_of(layer),
        };
        let original = FrozenWeight::Dense(fixture("small"));
        let base = base.weight(&name).unwrap();
        let error = ApproximationError::measure(&name, &original, &base, Some(lora)).unwrap();
        assert!(
            error.relative() < 0.1 && error.relative_of_base() > 0.3,
            "{layer}: {error:?}"
        );
    }
}

#[test]
fn any_number_of_threads_writes_the_same_bytes() {
    let source = model_of(&[(LAYER.to_string(), fixture("large"))]);
    let bytes = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let mut options = options("loftq", 16.0);
        options.quantization_iterations = 2;
        let pool = pool.build().unwrap();
        let home = pool.install(|| initialize(source.path(), options, DoubleQuant::Yes));
        let base = home.path().join("base");
        [
            "model.safetensors",
            "initial_adapter/adapter_model.safetensors",
        ]
        .map(|file| fs::read(base.join(file)).unwrap())
    };
    let one = bytes(1);
    assert!(bytes(2) == one && bytes(3) == one);
}

#[test]
fn gaussian_has_the_deviation_of_peft_and_b_is_zero() {
    let case = ReferenceCase::read("llama_mha");
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, &Placement::cpu()).unwrap();
    let config = options("gaussian", 16.0).adapter;
    let mut add = |seed| {
        decoder
            .add_lora(&config, InitLoraWeights::Gaussian, seed)
            .unwrap();
        decoder.adapter(&config).unwrap()
    };
    let adapter = add(1);
    let values = |name: &str| -> Vec<f64> {
        let tensors = adapter.tensors.iter().filter(|(key, _)| key.contains(name));
        tensors
            .flat_map(|(_, tensor)| tensor.to_f32_vec())
            .map(f64::from)
            .collect()
    };
    assert!(values("lora_B").iter().all(|&v| v == 0.0));
    let a = values("lora_A");
    let n = a.len() as f64;
    let mean = a.iter().sum::<f64>() / n;
    let variance = a.iter().map(|v| v * v).sum::<f64>() / n;
    let expected = (1.0 / RANK as f64).powi(2);
    // Five standard errors.
    assert!(mean.abs() < 5.0 * (expected / n).sqrt(), "{mean}");
    assert!((variance / expected - 1.0).abs() < 5.0 * (2.0 / n).sqrt());
    let same = add(1);
    let other = add(2);
    let data = |adapter: &Adapter| -> Vec<u8> {
        let tensors = adapter.tensors.values();
        tensors.flat_map(|tensor| tensor.data.to_vec()).collect()
    };
    assert!(data(&same) == data(&adapter) && data(&other) != data(&adapter));
    for method in ["pissa", "loftq"] {
        let error = decoder.add_lora(&config, method.parse().unwrap(), 1);
        assert!(error.unwrap_err().to_string().contains("qlora quantize"));
    }
}

fn quantize(arguments: &[&str]) -> Command {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo/base");
    let mut command = Command::cargo_bin("qlora").unwrap();
    command.arg("quantize").arg(demo).args(arguments);
    command
}

#[test]
fn what_cannot_work_is_refused_by_name_and_nothing_is_left() {
    let home = tempfile::tempdir().unwrap();
    let dst = home.path().join("dst");
    let dst = dst.to_str().unwrap();
    for (flags, code, expected) in [
        (
            &["--init_lora_weights", "pissa", "--lora_r", "193"][..],
            1,
            "model.layers.0.mlp.down_proj.weight`: expected at least as many rows and columns as the rank, 193, found [192, 384]",
        ),
        (
            &["--init_lora_weights", "gaussian"],
            1,
            "give it to `qlora train`",
        ),
        (
            &["--init_lora_weights", "loftq", "--loftq_iter", "6"],
            1,
            "`loftq_iter`: must be from 1 to 5",
        ),
        (
            &["--init_lora_weights", "pissa", "--loftq_iter", "2"],
            1,
            "says nothing about --init_lora_weights pissa",
        ),
        (
            &[
                "--init_lora_weights",
                "olora",
                "--lora_target_modules",
                "foo",
            ],
            1,
            "no layer matches `foo`",
        ),
        (&["--init_lora_weights", "eva"], 2, "`eva` is not supported"),
        (&["--lora_r", "8"], 2, "--init_lora_weights"),
    ] {
        let assert = quantize(&[&[dst], flags].concat()).assert().code(code);
        assert.stdout("").stderr(contains(expected));
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0, "{flags:?}");
    }
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    let mut values = fixture("small").to_f32_vec();
    values[130] = f32::NAN;
    let weight = DenseTensor::from_f32(vec![96, 128], &values);
    let source = model_of(&[(LAYER.to_string(), weight)]);
    let home = tempfile::tempdir().unwrap();
    let job = QuantizeJob {
        source: source.path().to_path_buf(),
        destination: home.path().join("base"),
        existing: Existing::Refuse,
        options: QuantizeOptions::default(),
        max_shard_bytes: u64::MAX,
    };
    let mut quantizer = InitializingQuantizer::new(options("pissa", 16.0)).unwrap();
    let error = quantize_with(&job, &mut quantizer, |_| ()).unwrap_err();
    let expected = format!("tensor `{LAYER}.weight`: element 130 is NaN");
    assert!(error.to_string().contains(&expected), "{error}");
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}
