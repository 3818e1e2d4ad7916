//! GGUF files read again as models and adapters.

use std::fs;
use std::path::{Path, PathBuf};

use qlora::Error;
use qlora::export::{
    GgufBase, GgufModel, GgufType, is_gguf_adapter, read_gguf_adapter, write_gguf_model,
};
use qlora::model::WeightSource;
use qlora::quant::FrozenWeight;
use qlora::store::{Adapter, GgufFile};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::adapter::{of_peft, product};
use super::files::*;
use super::model::{config_of, configs, write};

/// A random model of this config in a file.
struct Written {
    model: Model,
    path: PathBuf,
    _dir: TempDir,
}

impl Written {
    fn of(config: &Value, file_type: GgufType) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let model = Model::random(config);
        write(&model, config, file_type, &path).unwrap();
        Self {
            model,
            path,
            _dir: dir,
        }
    }

    fn read(&self, base: &Value) -> qlora::Result<GgufModel> {
        GgufModel::new(GgufFile::open(&self.path)?, base_of(base, &tokenizer_dir()))
    }

    /// Why it is no model of this base.
    fn refusal(&self, base: &Value) -> String {
        let error = self.read(base).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
        error.to_string()
    }
}

fn base_of<'a>(config: &'a Value, dir: &'a Path) -> GgufBase<'a> {
    GgufBase {
        config,
        dir,
        name: "",
    }
}

fn weight(model: &GgufModel, name: &str) -> Vec<f32> {
    match model.weight(name).unwrap() {
        FrozenWeight::Dense(weight) => weight.to_f32_vec(),
        FrozenWeight::Quantized(_) => panic!("{name}"),
    }
}

/// A file with `replacement` where the bytes `found` were, which are as many.
fn replaced(path: &Path, found: &[u8], replacement: &[u8]) {
    let mut file = fs::read(path).unwrap();
    let mut windows = file.windows(found.len());
    let at = windows.position(|window| window == found).unwrap();
    assert_eq!(found.len(), replacement.len());
    file[at..][..found.len()].copy_from_slice(replacement);
    fs::write(path, file).unwrap();
}

#[test]
fn a_model_is_read_as_it_was_written() {
    for config in configs() {
        let written = Written::of(&config, GgufType::F32);
        let read = written.read(&config).unwrap();
        assert_eq!(*read.config(), decoder(&config));
        for (name, tensor) in &written.model.0 {
            let (found, expected) = (weight(&read, name), tensor.to_f32_vec());
            // Of the weights of Gemma's norms the file has those with 1 added.
            let exact = config["model_type"] != "gemma3_text" || !name.ends_with("norm.weight");
            let tolerance = if exact { 0.0 } else { 1.2e-7 };
            let is_close = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance;
            assert!(found.iter().zip(&expected).all(is_close), "{name}");
            assert_eq!(read.vector(name).unwrap().shape, tensor.shape);
        }
        let dir = tokenizer_dir();
        let differences = read.tokenizer_differences(&base_of(&config, &dir));
        assert_eq!(differences.unwrap(), [] as [&str; 0]);
    }
}

#[test]
fn narrower_types_come_back_as_what_is_stored() {
    const NAME: &str = "model.layers.1.mlp.down_proj.weight";
    let config = config_with_vocabulary("llama_gqa");
    for file_type in [GgufType::F16, GgufType::Bf16, GgufType::Q8_0] {
        let written = Written::of(&config, file_type);
        let stored = Gguf::read(&written.path).values("blk.1.ffn_down.weight");
        let read = weight(&written.read(&config).unwrap(), NAME);
        // The products of a Q8_0 block are read in f16.
        let tolerance = if file_type == GgufType::Q8_0 {
            1e-3
        } else {
            0.0
        };
        let exact = written.model.0[NAME].to_f32_vec();
        assert_ne!(stored, exact);
        for (read, stored) in read.iter().zip(&stored) {
            assert!((read - stored).abs() <= tolerance * stored.abs());
        }
    }
}

/// `tests/fixtures/make_gguf.py` says where the values come from.
#[test]
fn every_type_that_llama_cpp_quantizes_to_is_read() {
    let path = fixture("gguf/types.gguf");
    let expected = qlora::store::MappedFile::open(&fixture("gguf/types.safetensors"));
    let expected = expected.unwrap().tensors().unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.names(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in &expected {
        let read = file.tensor(name).unwrap();
        assert_eq!(read.shape, expected.shape, "{name}");
        let values = expected.to_f32_vec();
        let largest = values.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (read, expected) in read.to_f32_vec().iter().zip(&values) {
            let difference = (read - expected).abs();
            assert!(difference <= 1e-3 * largest, "{name}: {read} {expected}");
        }
    }
}

#[test]
fn what_llama_cpp_would_compute_otherwise_is_told_by_its_key() {
    let of = |case: &str| config_with_vocabulary(case);
    for (case, field, value, parts) in [
        (
            "mistral",
            "rms_norm_eps",
            json!(1e-3),
            ["llama.attention.layer_norm_rms_epsilon", "0.001"],
        ),
        (
            "mistral",
            "num_key_value_heads",
            json!(1),
            ["llama.attention.head_count_kv", "expected 1"],
        ),
        (
            "mistral",
            "num_hidden_layers",
            json!(1),
            ["llama.block_count is 2", "expected 1"],
        ),
        (
            "qwen2",
            "model_type",
            json!("qwen3"),
            ["general.architecture is qwen2", "qwen3"],
        ),
        (
            "llama_mha",
            "attention_bias",
            json!(false),
            ["has tensor `blk.0.attn_k.bias`", "does not have"],
        ),
    ] {
        let mut written = of(case);
        if field == "attention_bias" {
            written[field] = json!(true);
        }
        let written = Written::of(&written, GgufType::F16);
        let mut base = of(case);
        base[field] = value;
        let refusal = written.refusal(&base);
        for part in parts {
            assert!(refusal.contains(part), "`{part}` is not in `{refusal}`");
        }
    }
}

#[test]
fn rotary_frequencies_are_those_of_the_base() {
    let scaled = config_with_vocabulary("llama_gqa");
    let mut otherwise = scaled.clone();
    otherwise["rope_parameters"]["factor"] = json!(4.0);
    let mut linear = scaled.clone();
    linear["rope_parameters"] = json!({
        "rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0,
    });
    let mut plain = scaled.clone();
    plain["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 500000.0 });
    let of = |config: &Value| Written::of(config, GgufType::F16);
    for (written, base, part) in [
        (
            of(&otherwise),
            &scaled,
            "rope_freqs.weight[1] is 4, and 8 by",
        ),
        (of(&scaled), &plain, "has tensor `rope_freqs.weight`"),
        (
            of(&linear),
            &plain,
            "llama.rope.scaling.factor is 2.0, which is not expected",
        ),
        (
            of(&plain),
            &linear,
            "llama.rope.scaling.factor is not there, expected 2.0",
        ),
    ] {
        let refusal = written.refusal(base);
        assert!(refusal.contains(part), "`{part}` is not in `{refusal}`");
    }
    let error = of(&plain).read(&scaled).unwrap_err();
    assert!(matches!(&error, Error::MissingTensor { tensor, .. } if tensor == "rope_freqs.weight"));
}

/// A file of llama.cpp's converter lacks keys that go without saying, and has the head of a tied model not at all.
#[test]
fn a_key_that_is_not_there_stands_for_what_llama_cpp_takes() {
    let config = config_with_vocabulary("llama_mha");
    let written = Written::of(&config, GgufType::F16);
    for key in [
        "attention.head_count_kv",
        "attention.key_length",
        "rope.dimension_count",
        "vocab_size",
    ] {
        // Under a name that is no key of the architecture.
        let found = format!("llama.{key}");
        replaced(
            &written.path,
            found.as_bytes(),
            found.replacen("llama", "other", 1).as_bytes(),
        );
    }
    written.read(&config).unwrap();
    replaced(&written.path, b"llama.block_count", b"other.block_count");
    let refusal = written.refusal(&config);
    assert!(
        refusal.contains("llama.block_count is not there, expected 2"),
        "{refusal}"
    );
}

/// A file with other bytes in the place of some, as many in all.
fn spliced(path: &Path, changes: &[(Vec<u8>, Vec<u8>)]) {
    let mut file = fs::read(path).unwrap();
    let len = file.len();
    for (found, replacement) in changes {
        let at = file.windows(found.len()).position(|bytes| bytes == found);
        let at = at.unwrap();
        file.splice(at..at + found.len(), replacement.iter().copied());
    }
    assert_eq!(file.len(), len);
    fs::write(path, file).unwrap();
}

/// A key as it lies in a file.
fn key(name: &str) -> Vec<u8> {
    let len = name.len() as u64;
    [&len.to_le_bytes(), name.as_bytes()].concat()
}

/// llama.cpp's converter has a list for them, and a key of YaRN that nothing of OLMo's asks for.
#[test]
fn the_windows_of_olmo3_may_be_told_layer_by_layer() {
    let olmo3 = config_of("olmo3");
    let windows = decoder(&olmo3).sliding_window;
    assert_eq!(windows, [Some(12), None]);
    const PATTERN: &str = "olmo2.attention.sliding_window_pattern";
    // The room comes from a key that nothing reads.
    const ROOM: &str = "general.quantization_version";
    let number = [4u32, 2].map(u32::to_le_bytes).concat();
    let list = |layers: [u8; 2]| {
        let types = [9u32, 7].map(u32::to_le_bytes).concat();
        [&types[..], &2u64.to_le_bytes(), &layers].concat()
    };
    for (layers, is_same) in [([1, 0], true), ([0, 1], false)] {
        let written = Written::of(&olmo3, GgufType::F16);
        let room = &ROOM[..ROOM.len() - 10];
        spliced(
            &written.path,
            &[
                (key(ROOM), key(room)),
                (
                    [key(PATTERN), number.clone()].concat(),
                    [key(PATTERN), list(layers)].concat(),
                ),
            ],
        );
        match is_same {
            true => assert_eq!(
                written.read(&olmo3).unwrap().config().sliding_window,
                windows
            ),
            false => assert!(written.refusal(&olmo3).contains(PATTERN)),
        }
    }
    let written = Written::of(&olmo3, GgufType::F16);
    spliced(
        &written.path,
        &[
            (key(ROOM), key(&ROOM[..ROOM.len() - 2])),
            (
                key("olmo2.rope.scaling.yarn_beta_fast"),
                key("olmo2.rope.scaling.yarn_attn_factor"),
            ),
        ],
    );
    written.read(&olmo3).unwrap();
}

/// Before llama.cpp had an architecture for it, its files were llamas.
#[test]
fn a_file_of_mistral_small_may_be_one_of_a_llama() {
    let text = config_with_vocabulary("mistral");
    let mistral3 = json!({
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text,
        "tie_word_embeddings": false,
    });
    let (of_llama, own) = (
        Written::of(&text, GgufType::F32),
        Written::of(&mistral3, GgufType::F32),
    );
    assert_eq!(
        Gguf::read(&own.path).text("general.architecture"),
        "mistral3"
    );
    own.read(&mistral3).unwrap();
    of_llama.read(&mistral3).unwrap();
    assert!(
        own.refusal(&text)
            .contains("general.architecture is mistral3")
    );
    let scaled = config_with_vocabulary("ministral3");
    assert!(
        of_llama
            .refusal(&scaled)
            .contains("general.architecture is llama")
    );
}

/// llama.cpp splits alike under both, and its converter calls the way of Granite's tokenizer by the other one.
#[test]
fn a_way_to_split_may_have_another_name() {
    let config = config_with_vocabulary("granite");
    let files = |name: &str| json(tokenizer_dir().join(name));
    let (mut tokens, settings) = (files("tokenizer.json"), files("tokenizer_config.json"));
    tokens["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    ]});
    let dir = tokenizer(&tokens, &settings);
    let base = base_of(&config, dir.path());
    let path = dir.path().join("model.gguf");
    write_gguf_model(&Model::random(&config), base, GgufType::F16, &path, |_| ()).unwrap();
    let differences = || {
        let read = GgufModel::new(GgufFile::open(&path).unwrap(), base).unwrap();
        read.tokenizer_differences(&base).unwrap()
    };
    assert_eq!(differences(), [] as [&str; 0]);
    replaced(&path, b"smollm", b"refact");
    assert_eq!(differences(), [] as [&str; 0]);
    replaced(&path, b"refact", b"falcon");
    assert_eq!(differences().len(), 1);
}

#[test]
fn a_head_of_its_own_is_told_by_its_tensor() {
    let mut config = config_with_vocabulary("llama_mha");
    config["tie_word_embeddings"] = json!(false);
    let written = Written::of(&config, GgufType::F16);
    let mut tied = config.clone();
    tied["tie_word_embeddings"] = json!(true);
    assert!(!written.read(&tied).unwrap().config().tie_word_embeddings);
    let written = Written::of(&tied, GgufType::F16);
    assert!(written.read(&config).unwrap().config().tie_word_embeddings);
}

#[test]
fn a_window_is_one_that_llama_cpp_does_not_have() {
    let config = config_with_vocabulary("mistral_sw");
    assert_ne!(decoder(&config).sliding_window, [None, None]);
    let read = Written::of(&config, GgufType::F16).read(&config).unwrap();
    assert_eq!(read.config().sliding_window, [None, None]);
}

#[test]
fn another_tokenizer_is_told_by_what_differs() {
    let config = config_with_vocabulary("llama_mha");
    let written = Written::of(&config, GgufType::F16);
    let files = |name: &str| json(tokenizer_dir().join(name));
    let (mut tokens, mut settings) = (files("tokenizer.json"), files("tokenizer_config.json"));
    settings["chat_template"] = "{{ messages }}".into();
    settings["pad_token"] = Value::Null;
    let vocabulary = tokens["model"]["vocab"].as_object_mut().unwrap();
    let last = vocabulary.iter().max_by_key(|(_, id)| id.as_u64()).unwrap();
    let (last, id) = (last.0.clone(), last.1.clone());
    vocabulary.remove(&last);
    vocabulary.insert("another".into(), id.clone());
    let merges = tokens["model"]["merges"].as_array_mut().unwrap();
    merges.pop();
    let dir = tokenizer(&tokens, &settings);
    let read = written.read(&config).unwrap();
    let differences = read.tokenizer_differences(&base_of(&config, dir.path()));
    let differences = differences.unwrap().join("\n");
    for part in [
        "tokenizer.chat_template is",
        &format!("tokenizer.ggml.tokens[{id}] is"),
        "expected \"another\"",
        "tokenizer.ggml.merges[",
    ] {
        assert!(
            differences.contains(part),
            "`{part}` is not in `{differences}`"
        );
    }
}

#[test]
fn an_adapter_adds_what_it_did() {
    for case in [
        "llama_gqa",
        "mistral",
        "qwen2",
        "rslora_q_v",
        "patterns",
        "one_layer",
    ] {
        let (adapter, config) = of_peft(case);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.gguf");
        super::adapter::write(&adapter, &config, GgufType::F32, &path).unwrap();
        let file = GgufFile::open(&path).unwrap();
        assert!(is_gguf_adapter(&file));
        let read = read_gguf_adapter(&file, base_of(&config, Path::new(""))).unwrap();
        assert!(read.tensors.keys().eq(adapter.tensors.keys()), "{case}");
        for name in adapter.tensors.keys() {
            let Some(layer) = name.strip_suffix(".lora_A.weight") else {
                continue;
            };
            let (read, expected) = (added(&read, layer), added(&adapter, layer));
            let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
            assert!(largest > 0.0);
            for (read, expected) in read.iter().zip(&expected) {
                let difference = (read - expected).abs();
                assert!(difference <= 1e-6 * largest, "{case} {layer}");
            }
        }
    }
}

/// What the adapter adds to the weight of a layer.
fn added(adapter: &Adapter, layer: &str) -> Vec<f64> {
    let path = layer.strip_prefix("base_model.model.").unwrap();
    let [a, b] =
        ["lora_A", "lora_B"].map(|part| &adapter.tensors[&format!("{layer}.{part}.weight")]);
    assert!(adapter.config.targets(path));
    let (r, scaling) = (
        adapter.config.rank_of(path),
        adapter.config.scaling_of(path),
    );
    assert_eq!(a.shape[0], r);
    product(&a.to_f32_vec(), &b.to_f32_vec(), r, scaling)
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let (adapter, mut config) = of_peft("llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.gguf");
    super::adapter::write(&adapter, &config, GgufType::F16, &path).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let refusal = |config: &Value| {
        let read = read_gguf_adapter(&file, base_of(config, Path::new("")));
        read.unwrap_err().to_string()
    };
    config["num_hidden_layers"] = 1.into();
    assert!(refusal(&config).contains("14 of its 28 tensors"));
    config["intermediate_size"] = 96.into();
    assert!(refusal(&config).contains("blk.0.ffn_gate.weight.lora_b"));
    assert!(refusal(&self::config("qwen3")).contains("general.architecture is llama"));
    replaced(&path, b"adapter.lora.alpha", b"adapter.lora.omega");
    let file = GgufFile::open(&path).unwrap();
    let (_, config) = of_peft("llama_gqa");
    let read = read_gguf_adapter(&file, base_of(&config, Path::new("")));
    assert!(
        read.unwrap_err()
            .to_string()
            .contains("no adapter.lora.alpha")
    );
}

#[test]
fn a_damaged_file_is_refused_with_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.gguf");
    let refusal = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = GgufFile::open(&path).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
        error.to_string()
    };
    let whole =
        fs::read(Written::of(&config_with_vocabulary("qwen2"), GgufType::F16).path).unwrap();
    assert!(refusal(b"").contains("is empty"));
    assert!(refusal(b"not one of them").contains("does not begin with GGUF"));
    assert!(refusal(&whole[..100]).contains("cannot be read: "));
    assert!(refusal(&whole[..whole.len() - 1]).contains("lies behind the end"));
    let of_key = |key: &str, value: [u8; 4]| {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend((key.len() as u64).to_le_bytes());
        file.extend(key.as_bytes());
        file.extend(4u32.to_le_bytes());
        file.extend(value);
        file
    };
    assert!(refusal(&of_key("general.alignment", [0; 4])).contains("makes no sense"));
    assert!(refusal(&of_key("split.count", [2, 0, 0, 0])).contains("is one of 2 parts"));
}
