//! What a run takes of the device's memory, by item, before it starts; and which activations it can keep.
//!
//! Weights, adapters and optimizer states follow from the shapes. What one micro-batch adds is found by going through a
//! step with sizes instead of values (`step`), so that the peak is that of the longest batch at its worst moment.

mod run;
mod step;

pub use run::LongestBatch;

use crate::device::Residency;
use crate::model::{ActivationPolicy, DecoderConfig, Module, TRAINED_ALIGNMENT};
use crate::ops::adamw::moments_8bit::BLOCK_SIZE;
use crate::ops::linear_cross_entropy;
use crate::ops::weight::{DenseCache, Weight};
use crate::quant::BlockSizes;
use crate::train::config::Optim;
use crate::train::optimizer::MIN_8BIT_ELEMENTS;
use crate::{Error, Result};

/// What a process takes of a GPU before it has a tensor: an assumption, where no GPU can be asked.
const LIBRARIES_BYTES: u64 = 600 << 20;
/// Values of the tables that every 4-bit weight brings along: the 8-bit map and the 4-bit code, in f32.
const TABLE_VALUES: u64 = 256 + 16;

/// A part of the memory of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// 4-bit codes of the linear layers.
    Codes,
    /// Their block scales, and the scales of those.
    Scales,
    /// Codes and scales of the blocks that are there at a time, where weights are streamed.
    Slots,
    /// Embedding and head.
    Vocabulary,
    /// Weights of the norms, biases, and the rotary table.
    Vectors,
    /// Values of the adapters, the lower halves of their masters included.
    Adapters,
    Gradients,
    /// Moments of the optimizer.
    Moments,
    /// Where the weights of a block are dequantized.
    Dequantized,
    /// What blocks keep from forward for backward.
    Activations,
    /// Tensors of the block and of the head that are being computed.
    Working,
    /// Logits of a chunk of rows.
    LossChunk,
    /// The context of CUDA with the kernels in it, and the workspace of cuBLAS.
    Libraries,
}

impl Item {
    pub const ALL: [Self; 13] = [
        Self::Codes,
        Self::Scales,
        Self::Slots,
        Self::Vocabulary,
        Self::Vectors,
        Self::Adapters,
        Self::Gradients,
        Self::Moments,
        Self::Dequantized,
        Self::Activations,
        Self::Working,
        Self::LossChunk,
        Self::Libraries,
    ];

    /// The name that users read.
    pub fn name(self) -> &'static str {
        match self {
            Self::Codes => "4-bit weights",
            Self::Scales => "block scales",
            Self::Slots => "blocks being streamed",
            Self::Vocabulary => "embedding and head",
            Self::Vectors => "norms, biases, rotary table",
            Self::Adapters => "adapters",
            Self::Gradients => "gradients",
            Self::Moments => "optimizer moments",
            Self::Dequantized => "dequantized block",
            Self::Activations => "kept activations",
            Self::Working => "working tensors",
            Self::LossChunk => "loss chunk",
            Self::Libraries => "CUDA and its libraries",
        }
    }
}

/// Bytes by [`Item`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Footprint([u64; Item::ALL.len()]);

impl Footprint {
    pub fn bytes(&self, item: Item) -> u64 {
        self.0[item as usize]
    }

    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    fn add(&mut self, item: Item, bytes: u64) {
        self.0[item as usize] += bytes;
    }

    fn remove(&mut self, item: Item, bytes: u64) {
        self.0[item as usize] -= bytes;
    }

    fn plus(mut self, other: &Self) -> Self {
        for (own, other) in self.0.iter_mut().zip(other.0) {
            *own += other;
        }
        self
    }
}

/// Where and how a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// In f32 on the CPU: weights stay in the memory map and are dequantized by tiles.
    Cpu,
    /// In bf16 by kernels: weights on the device, a block of them dequantized at a time.
    Kernels,
}

/// What decides how much memory a run takes.
#[derive(Debug, Clone)]
pub struct Workload {
    pub model: DecoderConfig,
    pub blocks: BlockSizes,
    pub engine: Engine,
    /// The adapter's rank of each linear layer, `[L][7]`; 0 for a layer without one.
    pub ranks: Vec<[usize; Module::ALL.len()]>,
    /// Tokens of the longest micro-batch.
    pub rows: usize,
    /// Those that carry loss.
    pub label_rows: usize,
    /// Tokens of the longest sequence.
    pub positions: usize,
    pub moments: Moments,
    /// Whether the adapters' inputs have dropout.
    pub dropout: bool,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    pub residency: Residency,
    /// Micro-batches that go through a block one after another, while its weights are there.
    pub together: usize,
}

/// How the optimizer keeps its two moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moments {
    F32,
    /// 8-bit codes with an f32 scale for each block of 256.
    EightBit,
}

impl Moments {
    /// Of a tensor of `values` values.
    fn bytes(self, values: u64) -> u64 {
        match self {
            Self::EightBit if values >= MIN_8BIT_ELEMENTS as u64 => {
                2 * (values + 4 * values.div_ceil(BLOCK_SIZE as u64))
            }
            _ => 2 * 4 * values,
        }
    }
}

impl From<Optim> for Moments {
    fn from(optim: Optim) -> Self {
        match optim {
            Optim::AdamwTorch => Self::F32,
            Optim::Adamw8bit => Self::EightBit,
        }
    }
}

impl Workload {
    fn value_bytes(&self) -> u64 {
        match self.engine {
            Engine::Cpu => 4,
            Engine::Kernels => 2,
        }
    }

    fn rank(&self, layer: usize, module: Module) -> usize {
        self.ranks[layer][module as usize]
    }

    fn lowest_adapter(&self) -> Option<usize> {
        let has_adapter = |ranks: &[usize; 7]| ranks.iter().any(|&r| r > 0);
        self.ranks.iter().position(has_adapter)
    }

    /// Widths of queries and of keys.
    fn head_widths(&self) -> (usize, usize) {
        let model = &self.model;
        (
            model.num_heads * model.head_dim,
            model.num_kv_heads * model.head_dim,
        )
    }

    /// Rows whose logits are there at a time.
    fn loss_chunk_rows(&self) -> usize {
        match self.engine {
            Engine::Cpu => linear_cross_entropy::chunk_rows(self.model.vocab_size),
            Engine::Kernels => linear_cross_entropy::chunk_rows_on_device(self.model.vocab_size),
        }
        .min(self.label_rows)
    }
}

/// The memory of a run and the policies it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// At the worst moment of a step.
    pub peak: Footprint,
    /// One for each block.
    pub policies: Vec<ActivationPolicy>,
    pub residency: Residency,
    /// Micro-batches that go through a block one after another, while its weights are there.
    pub together: usize,
}

impl Plan {
    /// The plan with these policies, one for each block.
    pub fn with_policies(workload: &Workload, policies: Vec<ActivationPolicy>) -> Self {
        let step = step::peak(workload, &policies);
        Self {
            peak: workload.lasting().plus(&step),
            policies,
            residency: workload.residency,
            together: workload.together,
        }
    }

    /// The plan in which the upper `kept` blocks keep their activations: those are read first in backward, and what they
    /// free is there for the blocks below to compute theirs again.
    pub fn keeping(workload: &Workload, kept: usize) -> Self {
        let layers = workload.model.num_layers;
        let policy = |layer| match layer + kept >= layers {
            true => ActivationPolicy::Keep,
            false => ActivationPolicy::Recompute,
        };
        Self::with_policies(workload, (0..layers).map(policy).collect())
    }

    /// The fastest plan within `limit` bytes. Weights stay on the device if they fit; else they are streamed, and as many
    /// micro-batches as fit go through a block together. Then as many blocks keep their activations as fit.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] if none fits, with the smallest change that would.
    pub fn fitting(workload: &Workload, limit: u64) -> Result<Self> {
        let way = workload.way_that_fits(limit, 0)?;
        let fits = |kept: usize| Self::keeping(&way, kept).peak.total() <= limit;
        let counts: Vec<usize> = (1..=workload.model.num_layers).collect();
        let kept = counts.partition_point(|&kept| fits(kept));
        Ok(Self::keeping(&way, kept))
    }

    /// Blocks that keep their activations.
    pub fn kept_blocks(&self) -> usize {
        let is_kept = |policy: &&ActivationPolicy| **policy == ActivationPolicy::Keep;
        self.policies.iter().filter(is_kept).count()
    }
}

/// Blocks whose weights are on the device or on their way there, where they are streamed: the one that computes and two
/// behind it.
pub const STREAM_SLOTS: usize = 3;

impl Workload {
    /// The ways to run this, the fastest first: with all weights on the device one micro-batch at a time; then streamed, with
    /// all micro-batches of a step together, half of them, and so on.
    fn ways(&self) -> Vec<Self> {
        let alone = Self {
            together: 1,
            ..self.clone()
        };
        if self.engine == Engine::Cpu {
            return vec![alone];
        }
        let streamed = |together| Self {
            together,
            residency: Residency::Streamed {
                slots: STREAM_SLOTS.min(self.model.num_layers),
            },
            ..self.clone()
        };
        let halves = std::iter::successors(Some(self.micro_batches), |&n| {
            (n > 1).then(|| n.div_ceil(2))
        });
        match self.residency {
            Residency::Resident => [alone].into_iter().chain(halves.map(streamed)).collect(),
            Residency::Streamed { .. } => halves.map(streamed).collect(),
        }
    }

    /// The fastest way that fits into `limit` while `kept` blocks keep their activations.
    fn way_that_fits(&self, limit: u64, kept: usize) -> Result<Self> {
        let mut ways = self.ways();
        let fits = |way: &Self| Plan::keeping(way, kept).peak.total() <= limit;
        if let Some(first) = ways.iter().position(fits) {
            return Ok(ways.swap_remove(first));
        }
        let least = ways.last().unwrap_or(self);
        Err(least.does_not_fit(limit, &Plan::keeping(least, kept)))
    }

    /// What is there from the first step to the last.
    fn lasting(&self) -> Footprint {
        let model = &self.model;
        let mut lasting = Footprint::default();
        if self.engine == Engine::Kernels {
            let elements = model.block_elements();
            self.add_base(&elements, &mut lasting);
            lasting.add(
                Item::Dequantized,
                2 * DenseCache::capacity(&elements) as u64,
            );
            let matrices = if model.tie_word_embeddings { 1 } else { 2 };
            let matrix = (model.vocab_size * model.hidden_size) as u64;
            lasting.add(Item::Vocabulary, matrices * 2 * matrix);
            lasting.add(Item::Libraries, LIBRARIES_BYTES);
        }
        lasting.add(Item::Vectors, self.vector_bytes());
        let trained = self.trained_values();
        lasting.add(Item::Adapters, 4 * trained);
        lasting.add(Item::Gradients, 4 * trained);
        let moments = self.trained_tensors().map(|n| self.moments.bytes(n));
        lasting.add(Item::Moments, moments.sum());
        lasting
    }

    /// The 4-bit weights of all blocks, `elements` in each.
    fn add_base(&self, elements: &[usize], lasting: &mut Footprint) {
        let layers = self.model.num_layers as u64;
        let sum = |bytes: &dyn Fn(usize) -> usize| -> u64 {
            elements.iter().map(|&n| bytes(n) as u64).sum()
        };
        let nested = sum(&|n| self.blocks.nested_absmax_bytes(n));
        let tables = 4 * TABLE_VALUES * elements.len() as u64;
        lasting.add(Item::Scales, layers * (nested + tables));
        match self.residency {
            Residency::Resident => {
                lasting.add(Item::Codes, layers * sum(&|n| self.blocks.packed_bytes(n)));
                lasting.add(Item::Scales, layers * sum(&|n| self.blocks.absmax_bytes(n)));
            }
            Residency::Streamed { slots } => {
                let slot = Weight::slot_bytes(elements, self.blocks);
                lasting.add(Item::Slots, (slots * slot) as u64);
            }
        }
    }

    fn vector_bytes(&self) -> u64 {
        let model = &self.model;
        let has_bias = |module: &Module| model.has_bias(*module);
        let biases: usize = Module::ALL
            .into_iter()
            .filter(has_bias)
            .map(|module| model.linear_shape(module).0)
            .sum();
        let head_norms = if model.qk_norm { 2 * model.head_dim } else { 0 };
        let block = 2 * model.hidden_size + head_norms + biases;
        let vectors = model.num_layers * block + model.hidden_size;
        // Cosines and sines of head_dim / 2 frequencies.
        let rotary = self.positions.next_power_of_two() * model.head_dim;
        4 * (vectors + rotary) as u64
    }

    /// Values of each tensor of the adapters, with the gap behind it.
    fn trained_tensors(&self) -> impl Iterator<Item = u64> {
        let ranks = self
            .ranks
            .iter()
            .flat_map(|layer| Module::ALL.into_iter().zip(layer));
        ranks.filter(|(_, r)| **r > 0).flat_map(|(module, &r)| {
            let (d_out, d_in) = self.model.linear_shape(module);
            [d_in, d_out].map(|width| (r * width).next_multiple_of(TRAINED_ALIGNMENT) as u64)
        })
    }

    /// Values of the adapters, with the gaps between their tensors.
    pub fn trained_values(&self) -> u64 {
        self.trained_tensors().sum()
    }

    /// FLOPs of the linear layers, the head and attention for one micro-batch, forward and backward, when the
    /// activations of `kept` blocks are kept.
    ///
    /// A frozen weight takes 2 per element and token in forward and as many for the gradient of its input; attention at
    /// full length 2 `(N + 1)` per query value and product, of which forward has 2 and backward 5.
    pub fn flops(&self, kept: usize) -> f64 {
        let model = &self.model;
        let rows = self.rows as f64;
        let elements: usize = model.block_elements().iter().sum();
        let linear = 2.0 * rows * elements as f64;
        let product = rows * (self.positions + 1) as f64 * self.head_widths().0 as f64;
        let (forward, backward) = (linear + 2.0 * product, linear + 5.0 * product);
        let layers = model.num_layers as f64;
        let again = layers - kept as f64;
        let head = 4.0 * self.label_rows as f64 * (model.vocab_size * model.hidden_size) as f64;
        (layers + again) * forward + layers * backward + head
    }

    /// The refusal of `plan`, with the smallest change that would fit.
    fn does_not_fit(&self, limit: u64, plan: &Plan) -> Error {
        let fits = |other: &Self| Plan::keeping(other, 0).peak.total() <= limit;
        let with_8bit = Self {
            moments: Moments::EightBit,
            ..self.shortened(1)
        };
        let advice = if fits(self) {
            "leave gradient_checkpointing out, or set it to true".into()
        } else if let Some(rows) = self.longest_that_fits(limit) {
            format!(
                "micro-batches of {rows} tokens instead of {} would fit (per_device_train_batch_size, max_seq_len)",
                self.rows
            )
        } else if fits(&with_8bit) {
            "optim adamw_8bit and shorter micro-batches would fit".into()
        } else {
            "take a smaller model or a smaller lora_r".into()
        };
        Error::DoesNotFit {
            needed: plan.peak.total(),
            limit,
            advice,
        }
    }

    /// The same with micro-batches of at most `rows` tokens.
    fn shortened(&self, rows: usize) -> Self {
        Self {
            rows: self.rows.min(rows),
            label_rows: self.label_rows.min(rows),
            positions: self.positions.min(rows),
            ..self.clone()
        }
    }

    /// Tokens of the longest micro-batch that fits into `limit` when every block computes its activations again.
    pub fn longest_that_fits(&self, limit: u64) -> Option<usize> {
        let fits = |rows: usize| Plan::keeping(&self.shortened(rows), 0).peak.total() <= limit;
        if !fits(1) {
            return None;
        }
        let (mut fitting, mut too_long) = (1, self.rows + 1);
        while too_long - fitting > 1 {
            let middle = fitting.midpoint(too_long);
            match fits(middle) {
                true => fitting = middle,
                false => too_long = middle,
            }
        }
        Some(fitting)
    }
}
