//! A model of random tensors, a tokenizer for it, and a GGUF file as it is read.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value as Field};
use qlora::data::SplitMix64;
use qlora::export::{GgufBase, GgufReport, GgufType, write_gguf_model};
use qlora::model::{DecoderConfig, ModelTensor};
use qlora::quant::DenseTensor;
use qlora::store::{TensorSource, TensorSpec};
use qlora::{Error, Result};
use serde_json::Value;
use tempfile::TempDir;

pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(path)
}

pub fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The config of an engine fixture.
pub fn config(case: &str) -> Value {
    json(fixture("engine").join(case).join("config.json"))
}

/// A directory with a byte-level tokenizer of 424 tokens.
pub fn tokenizer_dir() -> PathBuf {
    fixture("data/tokenizer")
}

/// A config with more rows in its embedding than the tokenizer has tokens.
pub fn config_with_vocabulary(case: &str) -> Value {
    let mut config = config(case);
    let text = match config.get("text_config") {
        Some(_) => &mut config["text_config"],
        None => &mut config,
    };
    text["vocab_size"] = 448.into();
    config
}

pub fn decoder(config: &Value) -> DecoderConfig {
    DecoderConfig::from_json(config, Path::new("config.json")).unwrap()
}

pub fn random(shape: &[usize], seed: u64) -> DenseTensor {
    let mut numbers = SplitMix64::new(seed);
    let numel = shape.iter().product();
    let values: Vec<f32> = (0..numel)
        .map(|_| 2.0 * numbers.uniform() as f32 - 1.0)
        .collect();
    DenseTensor::from_f32(shape.to_vec(), &values)
}

/// The tensors of a model, by the names of the checkpoint.
pub struct Model(pub BTreeMap<String, DenseTensor>);

impl Model {
    pub fn random(config: &Value) -> Self {
        let config = decoder(config);
        let tensors = ModelTensor::all(&config).into_iter().enumerate();
        let named =
            tensors.map(|(seed, t)| (t.name(&config), random(&t.shape(&config), seed as u64)));
        Self(named.collect())
    }
}

impl TensorSource for Model {
    fn specs(&self) -> Result<Vec<TensorSpec>> {
        unreachable!("the types that the source has are not asked for")
    }

    fn bytes(&self, _: &TensorSpec) -> Result<Bytes> {
        unreachable!("the tensors are converted")
    }

    fn tensor(&self, name: &str) -> Result<DenseTensor> {
        let missing = || Error::MissingTensor {
            path: "model".into(),
            tensor: name.into(),
        };
        self.0.get(name).cloned().ok_or_else(missing)
    }

    fn release(&self, _: &str) -> Result<()> {
        Ok(())
    }
}

/// A GGUF file.
pub struct Gguf {
    file: Vec<u8>,
    pub content: Content,
}

impl Gguf {
    pub fn read(path: &Path) -> Self {
        let file = fs::read(path).unwrap();
        let content = Content::read(&mut Cursor::new(&file)).unwrap();
        Self { file, content }
    }

    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .content
            .tensor_infos
            .keys()
            .map(String::as_str)
            .collect();
        names.sort_unstable();
        names
    }

    pub fn dtype(&self, name: &str) -> GgmlDType {
        self.content.tensor_infos[name].ggml_dtype
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.content.tensor_infos[name].shape.dims().to_vec()
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        let mut file = Cursor::new(&self.file);
        let tensor = self.content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let tensor = tensor.dequantize(&Device::Cpu).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The bytes of a tensor as stored.
    pub fn bytes(&self, name: &str, len: usize) -> Vec<u8> {
        let start = self.content.tensor_data_offset + self.content.tensor_infos[name].offset;
        self.file[start as usize..][..len].to_vec()
    }

    pub fn field(&self, key: &str) -> &Field {
        let field = self.content.metadata.get(key);
        field.unwrap_or_else(|| panic!("{key} is not there"))
    }

    pub fn has(&self, key: &str) -> bool {
        self.content.metadata.contains_key(key)
    }

    pub fn u32(&self, key: &str) -> u32 {
        self.field(key).to_u32().unwrap()
    }

    pub fn f32(&self, key: &str) -> f32 {
        self.field(key).to_f32().unwrap()
    }

    pub fn bool(&self, key: &str) -> bool {
        self.field(key).to_bool().unwrap()
    }

    pub fn text(&self, key: &str) -> &str {
        self.field(key).to_string().unwrap()
    }

    pub fn texts(&self, key: &str) -> Vec<&str> {
        let texts = self.field(key).to_vec().unwrap().iter();
        texts
            .map(|text| text.to_string().unwrap().as_str())
            .collect()
    }

    pub fn i32s(&self, key: &str) -> Vec<i32> {
        let numbers = self.field(key).to_vec().unwrap().iter();
        numbers.map(|number| number.to_i32().unwrap()).collect()
    }

    pub fn f32s(&self, key: &str) -> Vec<f32> {
        let numbers = self.field(key).to_vec().unwrap().iter();
        numbers.map(|number| number.to_f32().unwrap()).collect()
    }
}

/// Takes the rows of heads from llama.cpp's order back to that of transformers: even ones first, then odd ones.
pub fn unpermuted(values: &[f32], head_dim: usize, columns: usize) -> Vec<f32> {
    let heads = values.chunks_exact(head_dim * columns);
    let halves = heads.flat_map(|head| {
        let rows: Vec<&[f32]> = head.chunks_exact(columns).collect();
        let half = move |first: usize| {
            let rows = rows.clone();
            (first..head_dim)
                .step_by(2)
                .flat_map(move |row| rows[row].to_vec())
        };
        half(0).chain(half(1)).collect::<Vec<f32>>()
    });
    halves.collect()
}

// The types of tokens in llama.cpp.
pub const NORMAL: i32 = 1;
pub const UNKNOWN: i32 = 2;
pub const CONTROL: i32 = 3;
pub const USER_DEFINED: i32 = 4;
pub const UNUSED: i32 = 5;
pub const BYTE: i32 = 6;

/// A directory with this tokenizer.
pub fn tokenizer(tokenizer: &Value, config: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

/// A model with the tokenizer of `dir`, written and read.
pub fn written_with(dir: &Path, config: &Value) -> qlora::Result<(Gguf, GgufReport)> {
    let base = GgufBase {
        config,
        dir,
        name: "",
    };
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.gguf");
    let report = write_gguf_model(&Model::random(config), base, GgufType::F16, &path, |_| ())?;
    Ok((Gguf::read(&path), report))
}
