//! A model of any shape with random weights, and rows of random tokens: what a benchmark trains on without a checkpoint.
//!
//! Both are ordinary files in a temporary directory, made by the same code that makes real ones, so that a benchmark runs
//! what a user runs.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use candle_core::DType;
use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::model::{DecoderConfig, ModelTensor};
use crate::ops::philox::Uniform;
use crate::quant::{DenseTensor, Params4bit, QuantizeOptions};
use crate::store::{
    AtomicFile, Existing, QuantizeJob, SINGLE_FILE, SafetensorsWriter, TensorSpec, WeightQuantizer,
    quantize_with,
};
use crate::{Error, Result};

/// Everything fits into one shard.
const ONE_SHARD: u64 = u64::MAX;

/// The size of a Llama model, by the names of its `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub vocab_size: usize,
    pub tie_word_embeddings: bool,
}

impl Shape {
    pub const LLAMA_110M: Self = Self::llama(768, 2048, 12, 12, 12, 32_000, true);

    /// The shapes that have a name: of their `config.json`, as Llama models without biases.
    #[rustfmt::skip]
    pub const NAMED: [(&'static str, Self); 13] = [
        ("llama-110m", Self::LLAMA_110M),
        ("tinyllama-1.1b", Self::llama(2048, 5632, 22, 32, 4, 32_000, false)),
        ("llama-7b", Self::llama(4096, 11_008, 32, 32, 32, 32_000, false)),
        ("llama-13b", Self::llama(5120, 13_824, 40, 40, 40, 32_000, false)),
        ("llama-33b", Self::llama(6656, 17_920, 60, 52, 52, 32_000, false)),
        ("llama-65b", Self::llama(8192, 22_016, 80, 64, 64, 32_000, false)),
        ("llama3-8b", Self::llama(4096, 14_336, 32, 32, 8, 128_256, false)),
        ("llama3-70b", Self::llama(8192, 28_672, 80, 64, 8, 128_256, false)),
        ("mistral-7b", Self::llama(4096, 14_336, 32, 32, 8, 32_000, false)),
        ("qwen2.5-7b", Self::llama(3584, 18_944, 28, 28, 4, 152_064, false)),
        ("qwen2.5-14b", Self::llama(5120, 13_824, 48, 40, 8, 152_064, false)),
        ("qwen2.5-32b", Self::llama(5120, 27_648, 64, 40, 8, 152_064, false)),
        ("qwen2.5-72b", Self::llama(8192, 29_568, 80, 64, 8, 152_064, false)),
    ];

    const fn llama(
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        num_key_value_heads: usize,
        vocab_size: usize,
        tie_word_embeddings: bool,
    ) -> Self {
        Self {
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            vocab_size,
            tie_word_embeddings,
        }
    }

    /// The shape called `name`.
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMED
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, shape)| *shape)
    }

    /// What a decoder of this shape is made of.
    ///
    /// # Errors
    /// [`Error::Malformed`] for sizes that do not go together.
    pub fn decoder_config(&self) -> Result<DecoderConfig> {
        DecoderConfig::from_json(&self.config(), Path::new("the shape"))
    }

    fn config(&self) -> serde_json::Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": 1 << 20,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "torch_dtype": "bfloat16",
        })
    }
}

/// The files of a synthetic run. Those in a temporary directory are removed when this is dropped.
#[derive(Debug)]
pub struct SyntheticRun {
    dir: Directory,
}

#[derive(Debug)]
enum Directory {
    Temporary(tempfile::TempDir),
    Kept(PathBuf),
}

impl Directory {
    fn path(&self) -> &Path {
        match self {
            Self::Temporary(dir) => dir.path(),
            Self::Kept(dir) => dir,
        }
    }
}

impl SyntheticRun {
    /// Writes a 4-bit model of `shape`, and `rows` rows of `tokens` random tokens that all carry loss.
    ///
    /// # Errors
    /// [`Error::Io`], or those of a config that cannot be.
    pub fn create(
        shape: &Shape,
        rows: usize,
        tokens: usize,
        options: QuantizeOptions,
    ) -> Result<Self> {
        let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
        let run = Self {
            dir: Directory::Temporary(dir),
        };
        run.write_model(shape, options)?;
        run.write_rows(shape, rows, tokens)?;
        Ok(run)
    }

    /// The same in a directory that stays. A model that an earlier run left there is used again.
    ///
    /// # Errors
    /// As for [`create`](Self::create), and [`Error::Config`] if the model there is another one, or half of one.
    pub fn create_in(
        dir: &Path,
        shape: &Shape,
        rows: usize,
        tokens: usize,
        options: QuantizeOptions,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let run = Self {
            dir: Directory::Kept(dir.to_path_buf()),
        };
        // Written last, so that it stands for a whole model.
        let description = dir.join("model.txt");
        let wanted = format!("{shape:?}\n{options:?}\n");
        match std::fs::read_to_string(&description) {
            Ok(found) if found == wanted => (),
            Err(error) if error.kind() == ErrorKind::NotFound && !run.model().exists() => {
                run.write_model(shape, options)?;
                AtomicFile::write(&description, wanted)?;
            }
            Ok(_) | Err(_) => {
                let reason = format!("{} has another model, or half of one", dir.display());
                return Err(Error::config("synthetic_dir", reason));
            }
        }
        run.write_rows(shape, rows, tokens)?;
        Ok(run)
    }

    fn write_model(&self, shape: &Shape, options: QuantizeOptions) -> Result<()> {
        let dense = self.dir.path().join("dense");
        std::fs::create_dir(&dense).map_err(Error::io(&dense))?;
        write_model(&dense, shape)?;
        let job = QuantizeJob {
            source: dense.clone(),
            destination: self.model(),
            existing: Existing::Refuse,
            options,
            max_shard_bytes: ONE_SHARD,
        };
        quantize_with(&job, &mut Synthetic::default(), |_| ())?;
        std::fs::remove_dir_all(&dense).map_err(Error::io(&dense))
    }

    fn write_rows(&self, shape: &Shape, rows: usize, tokens: usize) -> Result<()> {
        let rows = random_rows(shape.vocab_size, rows, tokens);
        AtomicFile::write(self.dataset(), rows)
    }

    pub fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    pub fn dataset(&self) -> PathBuf {
        self.dir.path().join("rows.jsonl")
    }

    pub fn output_dir(&self) -> PathBuf {
        self.dir.path().join("output")
    }
}

/// Makes the 4-bit weights of a model whose dense ones nobody wrote: of the first weight of each shape, from then on with its
/// codes moved along, so that every weight is another one.
#[derive(Default)]
struct Synthetic {
    /// The first weight of a shape, and how many there have been.
    made: BTreeMap<Vec<usize>, (Params4bit, usize)>,
}

impl WeightQuantizer for Synthetic {
    fn quantize(
        &mut self,
        name: &str,
        weight: &DenseTensor,
        options: QuantizeOptions,
    ) -> Result<Params4bit> {
        // Apart from the streams of the other tensors, which are numbered from 0.
        let stream = u32::MAX - self.made.len() as u32;
        let (first, count) = match self.made.entry(weight.shape.clone()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let values = DenseTensor {
                    dtype: DType::BF16,
                    shape: weight.shape.clone(),
                    data: random_bf16(&weight.shape, stream),
                };
                let params = Params4bit::quantize(name, &values, options)?;
                unknown.insert((params, 0))
            }
        };
        let mut packed = first.packed.to_vec();
        let len = packed.len();
        packed.rotate_left(*count % len);
        *count += 1;
        Ok(Params4bit {
            packed: packed.into(),
            ..first.clone()
        })
    }
}

/// Norms of 1, a random embedding and head, and holes for the linear layers, which [`Synthetic`] fills.
fn write_model(dir: &Path, shape: &Shape) -> Result<()> {
    let config_path = dir.join("config.json");
    let config_json = shape.config();
    let config = DecoderConfig::from_json(&config_json, &config_path)?;
    AtomicFile::write(&config_path, config_json.to_string())?;
    // By their names, which number the streams of random values.
    let tensors = ModelTensor::all(&config).into_iter();
    let tensors: BTreeMap<_, _> = tensors
        .map(|t| (t.name(&config), t.shape(&config)))
        .collect();
    let spec = |(name, shape): (String, Vec<usize>)| TensorSpec::new(name, Dtype::BF16, shape);
    let specs: Vec<_> = tensors.into_iter().map(spec).collect();
    let mut file = SafetensorsWriter::create(dir.join(SINGLE_FILE), &specs, BTreeMap::new())?;
    for (number, spec) in specs.iter().enumerate() {
        match spec.name.ends_with("_proj.weight") {
            true => file.leave_hole(spec)?,
            false => file.append(spec, &random_bf16(&spec.shape, number as u32))?,
        }
    }
    file.finish()
}

/// Uniform values with the variance 1 / in for a matrix, 1 for a vector.
fn random_bf16(shape: &[usize], stream: u32) -> Bytes {
    let values: Vec<bf16> = match shape {
        [rows, cols] => {
            let bound = (3.0 / *cols as f32).sqrt();
            let mut values = vec![bf16::ZERO; rows * cols];
            values
                .par_chunks_mut(*cols)
                .enumerate()
                .for_each(|(row, values)| {
                    let mut uniform = Uniform::new(0, [stream, row as u32]);
                    for value in values {
                        *value = bf16::from_f32((2.0 * uniform.next_f32() - 1.0) * bound);
                    }
                });
            values
        }
        _ => vec![bf16::ONE; shape.iter().product()],
    };
    Bytes::copy_from_slice(bytemuck::cast_slice(&values))
}

fn random_rows(vocab_size: usize, rows: usize, tokens: usize) -> String {
    let mut text = String::new();
    for row in 0..rows {
        let mut uniform = Uniform::new(1, [row as u32, 0]);
        let ids: Vec<u32> = (0..tokens)
            .map(|_| (uniform.next_f32() * vocab_size as f32) as u32)
            .collect();
        writeln!(text, "{}", json!({ "input_ids": ids, "labels": ids }))
            .expect("a String takes any text");
    }
    text
}
