//! What a run takes of the device's memory, by item, before it starts; which activations it can keep, and how fast it will be.
//!
//! Weights, adapters and optimizer states follow from the shapes. What one micro-batch adds is found by going through a
//! step with sizes instead of values (`step`), so that the peak is that of the longest batch at its worst moment.

mod choice;
mod run;
mod speed;
mod step;

pub use choice::STREAM_SLOTS;
pub use run::LongestBatch;
pub use speed::Rates;

use crate::device::{ComputeDtype, Residence, Residency, Side};
use crate::model::{ActivationPolicy, DecoderConfig, Module, TRAINED_ALIGNMENT};
use crate::ops::adamw::moments_8bit::BLOCK_SIZE;
use crate::ops::linear;
use crate::ops::linear_cross_entropy;
use crate::ops::paged;
use crate::ops::table::PagedTable;
use crate::ops::weight::{DenseCache, Weight};
use crate::quant::BlockSizes;
use crate::train::config::Optim;
use crate::train::optimizer::{self, MIN_8BIT_ELEMENTS, PAGE_ELEMENTS};

/// What a process takes of a GPU beside tensors: 636 to 645 MB on an H200 with driver 580 and CUDA 13.0.
const LIBRARIES_BYTES: u64 = 612 << 20;
/// For so many bytes that a step takes one is set aside for free memory in pieces too small for what comes next: 5.3 to 6.3 %
/// of a step's were in pieces in five runs of 33B and 65B models on an H200, whatever lay there beside them.
const STEP_TO_PIECES: u64 = 14;
/// Values of the tables that every 4-bit weight brings along: the 8-bit map and the 4-bit code, in f32.
const TABLE_VALUES: u64 = 256 + 16;

/// A part of the memory of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// 4-bit codes of the linear layers.
    Codes,
    /// Their block scales, and the scales of those.
    Scales,
    /// Linear layers that a 4-bit model has in 16 bits.
    Dense,
    /// Codes and scales of the blocks that are there at a time, where weights are streamed.
    Slots,
    /// Embedding and head.
    Vocabulary,
    /// Weights of the norms, biases, and the rotary table.
    Vectors,
    /// Values of the adapters and of what is trained whole, the lower halves of their masters included.
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
    /// What the threads of the CPU pack operands of products into.
    Threads,
    /// What the allocator of a device cannot use because it is in pieces.
    Pieces,
    /// The context of CUDA with the kernels in it, and the workspace of cuBLAS.
    Libraries,
}

impl Item {
    pub const ALL: [Self; 16] = [
        Self::Codes,
        Self::Scales,
        Self::Dense,
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
        Self::Threads,
        Self::Pieces,
        Self::Libraries,
    ];

    /// The name that users read.
    pub fn name(self) -> &'static str {
        match self {
            Self::Codes => "4-bit weights",
            Self::Scales => "block scales",
            Self::Dense => "16-bit weights",
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
            Self::Threads => "scratch of threads",
            Self::Pieces => "memory in pieces",
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
            peak.add(Item::Pieces, step.total() / STEP_TO_PIECES);
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

impl Workload {
    /// What is there from the first step to the last.
    fn lasting(&self) -> Footprint {
        let model = &self.model;
        let mut lasting = Footprint::default();
        if self.engine == Engine::Kernels {
            let elements = model.block_elements();
            self.add_base(&elements, &mut lasting);
            let dequantized = model.dequantized_elements(self.residence.dequantized);
            let dequantized = DenseCache::capacity(&dequantized) as u64;
            lasting.add(Item::Dequantized, 2 * dequantized);
            lasting.add(Item::Vocabulary, self.vocabulary_bytes());
        }
        if self.engine != Engine::Kernels {
            lasting.add(Item::LossChunk, self.logits_chunk_bytes());
            let threads = rayon::current_num_threads() as u64;
            lasting.add(Item::Threads, threads * linear::THREAD_SCRATCH_BYTES);
        }
        lasting.add(
            Item::Vectors,
            self.vector_bytes() + self.squared_norm_bytes(),
        );
        let trained = self.trained_values();
        lasting.add(Item::Gradients, 4 * trained);
        match self.is_paged() {
            false => {
                lasting.add(Item::Adapters, 4 * trained);
                lasting.add(Item::Moments, self.moment_bytes());
            }
            true => {
                lasting.add(Item::Adapters, 2 * trained);
                lasting.add(Item::Moments, self.page_bytes());
            }
        }
        lasting
    }

    /// Embedding and head of the base, where they are on the device, or what of the head is there at a time.
    fn vocabulary_bytes(&self) -> u64 {
        let Residence {
            embedding, head, ..
        } = self.residence;
        let on_device = |side| side == Some(Side::Device);
        let is_shared = self.model.tie_word_embeddings && on_device(head);
        let matrices = u64::from(on_device(embedding) && !is_shared) + u64::from(on_device(head));
        let pages = if self.pages_head() {
            self.head_page_bytes()
        } else {
            0
        };
        matrices * 2 * self.vocabulary_values() as u64 + pages
    }

    /// What a head takes of the device that comes there in parts.
    fn head_page_bytes(&self) -> u64 {
        PagedTable::slot_bytes(self.model.vocab_size, self.model.hidden_size)
    }

    /// Whether the head comes to the device in parts.
    fn pages_head(&self) -> bool {
        self.engine == Engine::Kernels && self.residence.head == Some(Side::Host)
    }

    /// Pinned memory of the host for such a head.
    fn host_head_bytes(&self) -> u64 {
        match self.pages_head() {
            true => 2 * self.vocabulary_values() as u64,
            false => 0,
        }
    }

    /// Of the embedding or of the head.
    fn vocabulary_values(&self) -> usize {
        self.model.vocab_size * self.model.hidden_size
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
        match self.residence.weights {
            Residency::Resident => {
                lasting.add(Item::Codes, layers * sum(&|n| self.blocks.packed_bytes(n)));
                lasting.add(Item::Scales, layers * sum(&|n| self.blocks.absmax_bytes(n)));
            }
            Residency::Streamed { slots } => {
                let slot = Weight::slot_bytes(elements, self.blocks);
                lasting.add(Item::Slots, (slots * slot) as u64);
            }
        }
        for (_, module) in &self.dense {
            let n = elements[*module as usize];
            let nested = self.blocks.nested_absmax_bytes(n) as u64;
            lasting.remove(Item::Scales, nested + 4 * TABLE_VALUES);
            if self.residence.weights == Residency::Resident {
                lasting.remove(Item::Codes, self.blocks.packed_bytes(n) as u64);
                lasting.remove(Item::Scales, self.blocks.absmax_bytes(n) as u64);
            }
            lasting.add(Item::Dense, 2 * n as u64);
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
        let norms = if model.branch_norms { 4 } else { 2 };
        let block = norms * model.hidden_size + head_norms + biases;
        let vectors = model.num_layers * block + model.hidden_size;
        // Cosines and sines of head_dim / 2 frequencies.
        let has_one_for_queries = model.rope.query_growth.is_some();
        let tables = 1 + usize::from(model.local_rope.is_some()) + usize::from(has_one_for_queries);
        let rotary = tables * self.positions.next_power_of_two() * model.head_dim;
        4 * (vectors + rotary) as u64
    }

    /// The linear layers with an adapter, and its rank.
    fn adapted(&self) -> impl Iterator<Item = (Module, usize)> {
        let ranks = self.ranks.iter();
        let ranks = ranks.flat_map(|layer| Module::ALL.into_iter().zip(layer.iter().copied()));
        ranks.filter(|(_, r)| *r > 0)
    }

    /// Values of each tensor that is trained, with the gap behind it.
    fn trained_tensors(&self) -> impl Iterator<Item = u64> {
        let whole = |is_trained: bool| is_trained.then(|| self.vocabulary_values());
        let of_adapters = self.adapted().flat_map(|(module, r)| {
            let (d_out, d_in) = self.model.linear_shape(module);
            let magnitude = self.dora.then_some(d_out);
            [r * d_in, r * d_out].into_iter().chain(magnitude)
        });
        let embedding = whole(self.trains_embedding()).into_iter();
        let tensors = embedding
            .chain(of_adapters)
            .chain(whole(self.trains_head()));
        tensors.map(|values| values.next_multiple_of(TRAINED_ALIGNMENT) as u64)
    }

    /// What DoRA keeps of the frozen weights' norms.
    fn squared_norm_bytes(&self) -> u64 {
        let rows = self
            .adapted()
            .map(|(module, _)| self.model.linear_shape(module).0);
        match self.dora {
            true => 4 * rows.sum::<usize>() as u64,
            false => 0,
        }
    }

    /// Values of all that is trained, with the gaps between the tensors.
    pub fn trained_values(&self) -> u64 {
        self.trained_tensors().sum()
    }

    fn is_paged(&self) -> bool {
        self.residence.optimizer == Side::Host
    }

    fn moment_bytes(&self) -> u64 {
        self.trained_tensors().map(|n| self.moments.bytes(n)).sum()
    }

    /// Moments and lower halves, where they live in host memory.
    fn host_optimizer_bytes(&self) -> u64 {
        match self.is_paged() {
            true => self.moment_bytes() + 2 * self.trained_values(),
            false => 0,
        }
    }

    /// The slots in which pages of them visit the device.
    fn page_bytes(&self) -> u64 {
        let in_8_bits = |n: u64| self.moments == Moments::EightBit && n >= MIN_8BIT_ELEMENTS as u64;
        let slots = [false, true].map(|wanted| {
            // Tensors of one kind lie together, unless others are between them.
            let longest = self
                .trained_tensors()
                .collect::<Vec<_>>()
                .chunk_by(|a, b| in_8_bits(*a) == in_8_bits(*b))
                .filter(|group| in_8_bits(group[0]) == wanted)
                .map(|group| group.iter().sum::<u64>())
                .max();
            let elements = (longest.unwrap_or(0) as usize).min(PAGE_ELEMENTS);
            let page = optimizer::page(wanted, elements).into_iter();
            page.map(|(dtype, len)| (dtype.size_in_bytes() * len) as u64)
                .sum::<u64>()
        });
        paged::SLOTS as u64 * slots.iter().sum::<u64>()
    }
}
