//! The fixtures of `tests/fixtures/make_engine.py`: a 4-bit checkpoint, an adapter, and what transformers and PEFT compute.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use qlora::data::{Batch, Example};
use qlora::device::Placement;
use qlora::model::{Decoder, MicroBatch, Regularization, Sequences};
use qlora::ops::dropout::Dropout;
use qlora::store::{Adapter, Checkpoint};
use qlora::train::{TrainConfig, Trainer};
use safetensors::tensor::{Dtype, SafeTensors};

pub const CASES: [&str; 24] = [
    "llama_mha",
    "llama_gqa",
    "llama_odd",
    "mistral",
    "mistral_sw",
    "qwen2",
    "qwen3",
    "qwen2_yarn",
    "smollm3",
    "gemma3",
    "ministral3",
    "granite",
    "olmo2",
    "olmo3",
    "seed_oss",
    "exaone4",
    "cwm",
    "gemma",
    "gemma2",
    "phi3",
    "phi3_longrope",
    "glm4",
    "glm",
    "hyperclovax",
];

/// The cases that have a training run.
pub const TRAINED_CASES: [&str; 3] = ["llama_gqa", "qwen3", "gemma3"];

/// PEFT adapters of other kinds than plain LoRA, by `tests/fixtures/make_adapters.py`.
pub const ADAPTER_CASES: [&str; 10] = [
    "rslora_q_v",
    "patterns",
    "one_layer",
    "dora",
    "dora_patterns",
    "modules_to_save",
    "tied_embedding",
    "tied_head",
    "dora_olmo2",
    "scaled_embedding",
];

/// One of [`CASES`] or of [`ADAPTER_CASES`].
pub struct ReferenceCase {
    /// The checkpoint.
    pub dir: PathBuf,
    pub adapter: PathBuf,
    /// The file with what follows.
    pub reference: PathBuf,
    /// The rows of the batch, without padding.
    pub examples: Vec<Example>,
    /// Logits of each row, `[T * V]`.
    pub logits: Vec<Vec<f32>>,
    pub loss: f32,
    pub prompt: Vec<u32>,
    /// What greedy decoding writes after `prompt`.
    pub generated: Vec<u32>,
    /// Name in the PEFT file -> gradient, sorted by name.
    pub grads: Vec<(String, Vec<f32>)>,
}

impl ReferenceCase {
    pub fn read(name: &str) -> Self {
        let dir = fixtures().join("engine").join(name);
        Self::read_in(dir.clone(), &dir)
    }

    /// One of [`ADAPTER_CASES`].
    pub fn of_adapter(name: &str) -> Self {
        let dir = fixtures().join("adapters").join(name);
        let base = std::fs::read_to_string(dir.join("base")).unwrap();
        Self::read_in(fixtures().join("engine").join(base.trim()), &dir)
    }

    /// The adapter and what it computes, in `case`, of the checkpoint in `dir`.
    fn read_in(dir: PathBuf, case: &Path) -> Self {
        let reference = case.join("reference.safetensors");
        let bytes = std::fs::read(&reference).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (ids, shape) = integers(&tensors, "input_ids");
        let (mask, _) = integers(&tensors, "attention_mask");
        let (labels, _) = integers(&tensors, "labels");
        let padded_logits = floats(&tensors, "logits");
        let t = shape[1];
        let vocab_size = padded_logits.len() / ids.len();
        let mut examples = Vec::new();
        let mut logits = Vec::new();
        for row in 0..shape[0] {
            let len = mask[row * t..(row + 1) * t].iter().sum::<i64>() as usize;
            let span = row * t..row * t + len;
            examples.push(Example {
                input_ids: ids[span.clone()].iter().map(|&id| id as u32).collect(),
                labels: labels[span.clone()].to_vec(),
                line: row + 1,
            });
            logits.push(padded_logits[span.start * vocab_size..span.end * vocab_size].to_vec());
        }
        let mut grads: Vec<_> = tensors
            .names()
            .into_iter()
            .filter_map(|name| {
                Some((
                    name.strip_prefix("grad.")?.to_string(),
                    floats(&tensors, name),
                ))
            })
            .collect();
        grads.sort_by(|a, b| a.0.cmp(&b.0));
        let as_ids = |name| {
            integers(&tensors, name)
                .0
                .iter()
                .map(|&id| id as u32)
                .collect()
        };
        Self {
            examples,
            logits,
            loss: floats(&tensors, "loss")[0],
            prompt: as_ids("prompt"),
            generated: as_ids("generated"),
            grads,
            adapter: case.join("adapter"),
            reference,
            dir,
        }
    }

    /// The checkpoint with its adapter.
    pub fn decoder(&self) -> Decoder {
        self.decoder_at(&Placement::cpu())
    }

    /// The same where `placement` says.
    pub fn decoder_at(&self, placement: &Placement) -> Decoder {
        decoder_with_adapter(&self.dir, &self.adapter, placement)
    }

    pub fn batch(&self) -> Batch {
        Batch::from_examples(&self.examples.iter().collect::<Vec<_>>())
    }

    /// The logits of the batch by the model in `dir`, without an adapter.
    pub fn logits_of(&self, dir: &Path) -> Vec<f32> {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let decoder = Decoder::load(&checkpoint, None, &Placement::cpu()).unwrap();
        values(&decoder.logits(sequences(&self.batch())).unwrap())
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn integers(tensors: &SafeTensors, name: &str) -> (Vec<i64>, Vec<usize>) {
    let tensor = tensors.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::I64, "{name}");
    let values = tensor
        .data()
        .as_chunks::<8>()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b))
        .collect();
    (values, tensor.shape().to_vec())
}

/// The values of an f32 tensor.
pub fn floats(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = tensors.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
    tensor
        .data()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

/// `|found - expected| / |expected|` in the Euclidean norm.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(
        &mut found
            .iter()
            .zip(expected)
            .map(|(f, e)| f64::from(*f) - f64::from(*e)),
    );
    let size = norm(&mut expected.iter().map(|e| f64::from(*e)));
    assert!(size > 0.0, "the reference is zero");
    difference / size
}

/// The largest difference of two entries; NaN if there is one.
pub fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(f, e)| (f - e).abs());
    differences.fold(0.0, |largest, d| {
        if d > largest || d.is_nan() {
            d
        } else {
            largest
        }
    })
}

/// The checkpoint with the adapter in `adapter_dir`.
pub fn decoder_with_adapter(case_dir: &Path, adapter_dir: &Path, placement: &Placement) -> Decoder {
    let checkpoint = Checkpoint::open(case_dir).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, placement).unwrap();
    decoder
        .load_adapter(&Adapter::read(adapter_dir).unwrap())
        .unwrap();
    decoder
}

/// The batch with its labels.
pub fn micro_batch(batch: &Batch, dropout: Option<Dropout>) -> MicroBatch<'_> {
    MicroBatch {
        sequences: sequences(batch),
        labels: &batch.labels,
        regularization: Regularization {
            dropout,
            ..Regularization::default()
        },
    }
}

pub fn sequences(batch: &Batch) -> Sequences<'_> {
    Sequences {
        input_ids: &batch.input_ids,
        positions: &batch.positions,
        cu_seqlens: &batch.cu_seqlens,
    }
}

/// The data of a tensor.
pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The losses of a run's steps, and its adapter after them.
pub fn trained(config: TrainConfig, at: &Placement) -> (Vec<f64>, Vec<Vec<f32>>) {
    let mut trainer = Trainer::new(config, at).unwrap();
    let mut losses = Vec::new();
    while trainer.steps_done() < trainer.total_steps() {
        losses.push(trainer.step().unwrap().loss);
    }
    let adapter = trainer.decoder().trainables();
    (losses, adapter.map(|(_, t)| t.master().unwrap()).collect())
}
