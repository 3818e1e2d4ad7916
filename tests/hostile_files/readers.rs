//! Every reader of files that come from elsewhere, as a function of bytes. The same functions are the targets of cargo-fuzz.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use qlora::Error;
use qlora::data::{ChatTemplate, GenerationPrompt, LoadOptions, Tokenizer, load};
use qlora::device::Placement;
use qlora::export::{
    GgufBase, GgufModel, GgufType, modelfile, read_gguf_adapter, write_gguf_model,
};
use qlora::model::{Decoder, DecoderConfig, ModelTensor, WeightSource};
use qlora::quant::{DenseTensor, FrozenWeight};
use qlora::store::{Adapter, Checkpoint, GgufFile, MappedFile, TensorSource, TensorSpec};
use qlora::train::{TrainConfig, checkpoint};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::REPOSITORY;

/// A reader that is given hostile bytes.
pub struct Reader {
    /// Also the name of its corpus in `tests/corpus` and of its fuzz target.
    pub name: &'static str,
    /// Puts the files in a new directory that the reader needs beside the hostile one.
    prepare: fn(&Path),
    /// Reads `bytes` as a file of that directory. Whatever they are, it returns.
    read: fn(&Path, &[u8]),
}

/// A directory in which a reader finds its files.
pub struct Scratch {
    dir: tempfile::TempDir,
    reader: &'static Reader,
}

impl Scratch {
    pub fn new(reader: &'static Reader) -> Self {
        // In memory where the system has a place for it: millions of files are written.
        let memory = Path::new("/dev/shm");
        let dir = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        let dir = dir.unwrap();
        (reader.prepare)(dir.path());
        Self { dir, reader }
    }

    pub fn read(&self, bytes: &[u8]) {
        (self.reader.read)(self.dir.path(), bytes);
    }
}

pub const READERS: [Reader; 16] = [
    Reader {
        name: "safetensors",
        prepare: model_config_file,
        read: safetensors,
    },
    Reader {
        name: "shard_index",
        prepare: shards,
        read: shard_index,
    },
    Reader {
        name: "model_config",
        prepare: nothing,
        read: model_config,
    },
    Reader {
        name: "tokenizer",
        prepare: nothing,
        read: tokenizer,
    },
    Reader {
        name: "chat_template",
        prepare: nothing,
        read: chat_template,
    },
    Reader {
        name: "adapter_config",
        prepare: adapter_files,
        read: adapter_config,
    },
    Reader {
        name: "adapter_weights",
        prepare: adapter_files,
        read: adapter_weights,
    },
    Reader {
        name: "gguf",
        prepare: nothing,
        read: gguf,
    },
    Reader {
        name: "checkpoint",
        prepare: checkpoint_files,
        read: run_checkpoint,
    },
    Reader {
        name: "data_jsonl",
        prepare: nothing,
        read: |dir, bytes| data(dir, "data.jsonl", bytes),
    },
    Reader {
        name: "data_json",
        prepare: nothing,
        read: |dir, bytes| data(dir, "data.json", bytes),
    },
    Reader {
        name: "data_csv",
        prepare: nothing,
        read: |dir, bytes| data(dir, "data.csv", bytes),
    },
    Reader {
        name: "data_parquet",
        prepare: nothing,
        read: |dir, bytes| data(dir, "data.parquet", bytes),
    },
    Reader {
        name: "data_gzip",
        prepare: nothing,
        read: |dir, bytes| data(dir, "data.jsonl.gz", bytes),
    },
    Reader {
        name: "data_zstd",
        prepare: nothing,
        read: |dir, bytes| data(dir, "data.jsonl.zst", bytes),
    },
    Reader {
        name: "run_config",
        prepare: nothing,
        read: run_config,
    },
];

pub fn reader(name: &str) -> &'static Reader {
    let found = READERS.iter().find(|reader| reader.name == name);
    found.unwrap_or_else(|| panic!("there is no reader {name}"))
}

fn corpus(name: &str) -> PathBuf {
    Path::new(REPOSITORY).join("tests/corpus").join(name)
}

fn put(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(dir.join(name), bytes).unwrap();
}

fn put_seed(dir: &Path, name: &str, seed: &str) {
    put(dir, name, fs::read(corpus(seed)).unwrap());
}

fn nothing(_dir: &Path) {}

fn model_config_file(dir: &Path) {
    put(dir, "config.json", "{}");
}

/// A weight file: its header, every tensor as stored, and every weight in bitsandbytes' layout.
fn safetensors(dir: &Path, bytes: &[u8]) {
    put(dir, "model.safetensors", bytes);
    if let Ok(file) = MappedFile::open(&dir.join("model.safetensors")) {
        for name in file.names() {
            let _ = (file.bytes(&name), file.tensor(&name));
        }
        let _ = (file.metadata("format"), file.tensors());
    }
    if let Ok(model) = Checkpoint::open(dir) {
        let names: Vec<String> = model.names().map(str::to_string).collect();
        for name in names {
            if let Ok(FrozenWeight::Quantized(params)) = model.weight(&name) {
                // A weight that was read is valid: its elements are no more than twice its bytes.
                params.dequantize(&mut vec![0f32; params.numel()]);
            }
        }
        let _ = model.fingerprint();
    }
}

fn shards(dir: &Path) {
    model_config_file(dir);
    for shard in ["model-00001-of-00002", "model-00002-of-00002"] {
        let seed = format!("adapter_weights/{shard}.safetensors");
        put_seed(dir, &format!("{shard}.safetensors"), &seed);
    }
    // Outside of the model: an index that reaches it has left its directory.
    fs::create_dir(dir.join("inside")).unwrap();
}

fn shard_index(dir: &Path, bytes: &[u8]) {
    put(dir, "model.safetensors.index.json", bytes);
    if let Ok(model) = Checkpoint::open(dir) {
        for name in model.names() {
            let path = model.file(name).unwrap().path();
            assert_eq!(path.parent(), Some(dir), "a shard outside of the model");
        }
    }
}

fn model_config(_dir: &Path, bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<Value>(bytes) {
        let _ = DecoderConfig::from_json(&value, Path::new("config.json"));
    }
}

const TEXT: &str = "Hello <s>[INST] wörld</s>\n\n  12,345 \u{1F600}";

fn tokenizer(dir: &Path, bytes: &[u8]) {
    // The second file of a tokenizer follows the first after a byte that JSON does not have.
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    put(dir, "tokenizer.json", parts.next().unwrap_or_default());
    put(dir, "tokenizer_config.json", parts.next().unwrap_or(b"{}"));
    if let Ok(tokenizer) = Tokenizer::from_dir(dir) {
        let _ = tokenizer
            .encode_with_offsets(TEXT)
            .map(|e| e.mask(&[0..5, 7..30]));
        if let Ok(ids) = tokenizer.encode_with_specials(TEXT) {
            let _ = tokenizer.decode(&ids, qlora::data::SpecialTokens::Keep);
            ids.iter().for_each(|&id| drop(tokenizer.token_text(id)));
        }
        let _ = (tokenizer.bos_token_id(), tokenizer.vocab_size());
        let _ = modelfile(&tokenizer, "./model.gguf");
        export_vocabulary(dir);
    }
}

/// A model whose tensors cannot be had, so that of its export the tokenizer alone is made.
struct NoTensors;

impl TensorSource for NoTensors {
    fn specs(&self) -> qlora::Result<Vec<TensorSpec>> {
        Ok(Vec::new())
    }

    fn bytes(&self, spec: &TensorSpec) -> qlora::Result<bytes::Bytes> {
        Err(Error::malformed(&spec.name, "is not there"))
    }

    fn tensor(&self, name: &str) -> qlora::Result<DenseTensor> {
        Err(Error::malformed(name, "is not there"))
    }

    fn release(&self, _: &str) -> qlora::Result<()> {
        Ok(())
    }
}

fn small_llama() -> Value {
    json!({
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 1024,
    })
}

fn export_vocabulary(dir: &Path) {
    let config = small_llama();
    let base = GgufBase {
        config: &config,
        dir,
        name: "hostile",
    };
    let out = dir.join("model.gguf");
    let written = write_gguf_model(&NoTensors, base, GgufType::F32, &out, |_| ());
    assert!(written.is_err());
}

fn chat_template(_dir: &Path, bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else {
        return;
    };
    let special_tokens = Map::from_iter([
        ("bos_token".to_string(), Value::from("<s>")),
        ("eos_token".to_string(), Value::from("</s>")),
    ]);
    let markers = vec!["<s>".to_string(), "</s>".to_string()];
    let path = PathBuf::from("chat_template.jinja");
    if let Ok(template) = ChatTemplate::new(path, source.to_string(), special_tokens, markers) {
        let messages = [
            json!({"role": "system", "content": "Be brief."}),
            json!({"role": "user", "content": TEXT}),
            json!({"role": "assistant", "content": "yes"}),
        ];
        let _ = template.render(&messages[..2], None, GenerationPrompt::Yes);
        let _ = template.render_for_training(&messages, None);
    }
}

fn adapter_files(dir: &Path) {
    put_seed(dir, "adapter_config.json", "adapter_config/r_1.json");
    put_seed(
        dir,
        "adapter_model.safetensors",
        "adapter_weights/r_1.safetensors",
    );
    Adapter::read(dir).expect("the seeds are an adapter");
}

fn adapter_config(dir: &Path, bytes: &[u8]) {
    put(dir, "adapter_config.json", bytes);
    if let Ok(adapter) = Adapter::read(dir) {
        let targets = &adapter.config.target_modules;
        let _ = targets.matches("model.layers.0.self_attn.q_proj");
        let _ = (adapter.config.scaling(), adapter.config.to_json());
    }
}

fn adapter_weights(dir: &Path, bytes: &[u8]) {
    put(dir, "adapter_model.safetensors", bytes);
    let _ = Adapter::read(dir);
}

/// The weights of a model that knows nothing.
struct Zeros(DecoderConfig);

impl WeightSource for Zeros {
    fn weight(&self, name: &str) -> qlora::Result<FrozenWeight> {
        self.vector(name).map(FrozenWeight::Dense)
    }

    fn vector(&self, name: &str) -> qlora::Result<DenseTensor> {
        let mut tensors = ModelTensor::all(&self.0).into_iter();
        let tensor = tensors.find(|tensor| tensor.name(&self.0) == name).unwrap();
        let shape = tensor.shape(&self.0);
        let values = vec![0.0; shape.iter().product()];
        Ok(DenseTensor::from_f32_vec(shape, values))
    }
}

/// A file of llama.cpp: every tensor, and what it is as a model and as an adapter.
fn gguf(dir: &Path, bytes: &[u8]) {
    put(dir, "model.gguf", bytes);
    let Ok(file) = GgufFile::open(dir.join("model.gguf")) else {
        return;
    };
    for name in file.names() {
        let _ = file.tensor(name);
    }
    let mut config = small_llama();
    config["vocab_size"] = 16.into();
    let base = GgufBase {
        config: &config,
        dir,
        name: "hostile",
    };
    if let Ok(adapter) = read_gguf_adapter(&file, base) {
        let parsed = DecoderConfig::from_json(&config, Path::new("config.json")).unwrap();
        let zeros = Zeros(parsed.clone());
        let decoder = Decoder::from_source(&zeros, parsed, None, &Placement::cpu());
        let _ = decoder.unwrap().load_adapter(&adapter);
    }
    let Ok(model) = GgufModel::new(file, base) else {
        return;
    };
    for tensor in ModelTensor::all(model.config()) {
        let _ = model.weight(&tensor.name(model.config()));
    }
}

/// A whole checkpoint, in a directory of the name that its state tells.
fn checkpoint_files(dir: &Path) {
    let checkpoint = dir.join("checkpoint-4.1");
    fs::create_dir(&checkpoint).unwrap();
    adapter_files(&checkpoint);
    for name in ["optimizer.safetensors", "gradients.safetensors"] {
        put_seed(&checkpoint, name, "adapter_weights/r_1.safetensors");
    }
    let state = fs::read(corpus("checkpoint/state")).unwrap();
    put(&checkpoint, "trainer_state.json", &state[1..]);
    put_manifest(&checkpoint);
    checkpoint::read(&checkpoint).expect("the seeds are a checkpoint");
}

/// The first byte says which file the others are: the state, the moments or the manifest. The manifest fits the others, or
/// nothing would be read.
fn run_checkpoint(dir: &Path, bytes: &[u8]) {
    let checkpoint = dir.join("checkpoint-4.1");
    let Some((kind, content)) = bytes.split_first() else {
        return;
    };
    let name = match kind {
        b'S' => "trainer_state.json",
        b'O' => "optimizer.safetensors",
        _ => "manifest.json",
    };
    let path = checkpoint.join(name);
    let good = fs::read(&path).unwrap();
    fs::write(&path, content).unwrap();
    if name != "manifest.json" {
        put_manifest(&checkpoint);
    }
    let _ = checkpoint::read(&checkpoint);
    fs::write(&path, good).unwrap();
    put_manifest(&checkpoint);
}

fn put_manifest(dir: &Path) {
    let mut files = Map::new();
    for name in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "gradients.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ] {
        let bytes = fs::read(dir.join(name)).unwrap();
        let digest = Sha256::digest(&bytes);
        let sha256: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        files.insert(name.into(), json!({"bytes": bytes.len(), "sha256": sha256}));
    }
    put(dir, "manifest.json", json!({ "files": files }).to_string());
}

fn data(dir: &Path, name: &str, bytes: &[u8]) {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    let tokenizer = TOKENIZER.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        put_seed(dir.path(), "tokenizer.json", "tokenizer/byte_level");
        put(
            dir.path(),
            "tokenizer_config.json",
            r#"{"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"}"#,
        );
        Tokenizer::from_dir(dir.path()).unwrap()
    });
    put(dir, name, bytes);
    let options = LoadOptions {
        vocab_size: Some(1 << 16),
        ..LoadOptions::default()
    };
    let _ = load(dir.join(name), &options, Some(tokenizer));
}

/// The first byte says which kind of file the others are.
fn run_config(dir: &Path, bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else {
        return;
    };
    let name = match kind {
        b'Y' => "config.yaml",
        b'J' => "config.json",
        _ => "config.toml",
    };
    put(dir, name, content);
    let _ = TrainConfig::load(Some(&dir.join(name)), &[]);
}
