//! What a run takes of the device's memory, by item, before it starts; which activations it can keep, and how fast it will be.
//!
//! Weights, adapters and optimizer states follow from the shapes. What one micro-batch adds is found by going through a
//! step with sizes instead of values (`step`), so that the peak is that of the longest batch at its worst moment.

mod choice;
mod footprint;
mod lasting;
mod run;
mod speed;
mod step;

pub use choice::STREAM_SLOTS;
pub use footprint::{Footprint, Item};
pub use run::LongestBatch;
pub use speed::Rates;

use crate::device::{ComputeDtype, Residence, Side};
use crate::model::{ActivationPolicy, DecoderConfig, Module};
use crate::ops::adamw::moments_8bit::BLOCK_SIZE;
use crate::ops::linear_cross_entropy;
use crate::quant::BlockSizes;
use crate::train::config::Optim;
use crate::train::optimizer::MIN_8BIT_ELEMENTS;

/// What a process takes of a GPU beside tensors: 636 to 646 MB on an H200 with driver 580 and CUDA 13.0.
const LIBRARIES_BYTES: u64 = 616 << 20;

/// What is set aside, in a step that takes `step` bytes, for free memory in pieces too small for what comes next.
///
/// The driver's pool grows by 32 MiB at a time, so that as much can be missing where a few bytes are; steps of 16 tokens had up to
/// 40 MB in pieces. Beside that the pieces grow with a step, but long rows make fewer and larger tensors. On an H200
/// (`benches/results`), steps of 65B in GB and what was in pieces in MB: 1.0 and 132, 6.0 and 396, 7.8 and 489; one of 78,475
/// tokens of 8B, 16.8 and 356.
fn pieces_bytes(step: u64) -> u64 {
    const OF_ANY_STEP: u64 = 64 << 20;
    let of_small_tensors = step / 14;
    let of_large_ones = (256 << 20) + step / 32;
    OF_ANY_STEP + of_small_tensors.min(of_large_ones)
}

/// Where and how a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// On the CPU, in f32 but for products in this type: weights stay in the memory map and are dequantized by tiles.
    Cpu(ComputeDtype),
    /// In bf16 by kernels: weights on the device, a block of them dequantized at a time.
    Kernels,
}

/// What decides how much memory a run takes.
#[derive(Debug, Clone)]
pub struct Workload {
    pub model: DecoderConfig,
    pub blocks: BlockSizes,
    /// The linear layers that are not in 4 bits.
    pub dense: Vec<(usize, Module)>,
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
    /// Instances of a micro-batch where the adapters' matrices have dropout.
    pub instances: Option<usize>,
    /// Whether the adapters are DoRA's.
    pub dora: bool,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    pub residence: Residence,
    /// Micro-batches that go through a block one after another, while its weights are there.
    pub together: usize,
    /// The lowest blocks, at most, whose inputs wait in host memory.
    pub offloaded: usize,
    /// Pinned host memory that the run may take; `None` where nobody knows.
    pub host_limit: Option<u64>,
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
        match optim.is_8bit() {
            false => Self::F32,
            true => Self::EightBit,
        }
    }
}

impl Workload {
    fn value_bytes(&self) -> u64 {
        match self.engine {
            Engine::Cpu(_) => 4,
            Engine::Kernels => 2,
        }
    }

    fn rank(&self, layer: usize, module: Module) -> usize {
        self.ranks[layer][module as usize]
    }

    /// The largest rank of an adapter; 0 if there is none.
    pub fn largest_rank(&self) -> usize {
        self.ranks.iter().flatten().copied().max().unwrap_or(0)
    }

    /// Whether the embedding is trained whole.
    fn trains_embedding(&self) -> bool {
        self.residence.embedding.is_none()
    }

    /// Whether the head is.
    fn trains_head(&self) -> bool {
        self.residence.head.is_none()
    }

    /// The lowest block that backward goes through.
    fn lowest_trained(&self) -> Option<usize> {
        if self.trains_embedding() {
            return Some(0);
        }
        let has_adapter = |ranks: &[usize; Module::ALL.len()]| ranks.iter().any(|&r| r > 0);
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

    fn logits_chunk_bytes(&self) -> u64 {
        4 * (self.loss_chunk_rows() * self.model.vocab_size) as u64
    }

    /// Rows whose logits are there at a time.
    fn loss_chunk_rows(&self) -> usize {
        match self.engine {
            Engine::Cpu(_) => linear_cross_entropy::chunk_rows(self.model.vocab_size),
            Engine::Kernels => linear_cross_entropy::chunk_rows_on_device(self.model.vocab_size),
        }
        .min(self.label_rows)
    }

    /// How many times a micro-batch goes through the model at a time.
    pub fn instances(&self) -> usize {
        self.instances.unwrap_or(1)
    }

    /// The same with the rows of all instances.
    fn stacked(&self) -> Self {
        Self {
            rows: self.rows * self.instances(),
            label_rows: self.label_rows * self.instances(),
            ..self.clone()
        }
    }
}

/// Bytes of pinned host memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostFootprint {
    /// Inputs of blocks that are offloaded, or that of the first on its way from an embedding on the host.
    pub activations: u64,
    /// Moments and the lower halves of the masters.
    pub optimizer: u64,
    /// The head.
    pub head: u64,
}

impl HostFootprint {
    pub fn total(&self) -> u64 {
        self.activations + self.optimizer + self.head
    }
}

/// The memory of a run and the policies it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// At the worst moment of a step.
    pub peak: Footprint,
    pub host: HostFootprint,
    /// One for each block.
    pub policies: Vec<ActivationPolicy>,
    pub residence: Residence,
    /// Micro-batches that go through a block one after another, while its weights are there.
    pub together: usize,
}

impl Plan {
    /// The plan with these policies, one for each block.
    pub fn with_policies(workload: &Workload, policies: Vec<ActivationPolicy>) -> Self {
        let step = step::peak(workload, &policies);
        let mut peak = workload.lasting().plus(&step);
        if workload.engine == Engine::Kernels {
            peak.add(Item::Pieces, pieces_bytes(step.total()));
            peak.add(Item::Libraries, LIBRARIES_BYTES);
        }
        let mut plan = Self {
            peak,
            host: HostFootprint::default(),
            policies,
            residence: workload.residence,
            together: workload.together,
        };
        let (inputs, bytes) = plan.offloaded_inputs(workload);
        plan.host = HostFootprint {
            activations: (inputs * bytes) as u64,
            optimizer: workload.host_optimizer_bytes(),
            head: workload.host_head_bytes(),
        };
        plan
    }

    /// How many inputs of blocks are in host memory at a time, and the bytes of each in the longest micro-batch.
    pub fn offloaded_inputs(&self, workload: &Workload) -> (usize, usize) {
        let rows = workload.stacked().rows;
        let input = rows * workload.model.hidden_size * workload.value_bytes() as usize;
        let is_brought =
            workload.engine == Engine::Kernels && workload.residence.embedding == Some(Side::Host);
        let offloaded = self.offloaded_blocks() * self.together;
        (offloaded.max(usize::from(is_brought)), input)
    }

    /// Blocks that keep their activations.
    pub fn kept_blocks(&self) -> usize {
        self.blocks_with(ActivationPolicy::Keep)
    }

    /// Blocks whose inputs wait in host memory.
    pub fn offloaded_blocks(&self) -> usize {
        self.blocks_with(ActivationPolicy::Offload)
    }

    fn blocks_with(&self, policy: ActivationPolicy) -> usize {
        let has_it = |of_block: &&ActivationPolicy| **of_block == policy;
        self.policies.iter().filter(has_it).count()
    }
}
