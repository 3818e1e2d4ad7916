//! What is there from the first step of a run to the last: weights, adapters and the states of the optimizer.

use super::footprint::{Footprint, Item};
use super::{Engine, Moments, Workload};
use crate::device::{Residence, Residency, Side};
use crate::model::{ModelTensor, Module, RopeScaling, TRAINED_ALIGNMENT};
use crate::ops::linear;
use crate::ops::paged;
use crate::ops::table::PagedTable;
use crate::ops::weight::{DenseCache, Weight};
use crate::train::optimizer::{self, MIN_8BIT_ELEMENTS, PAGE_ELEMENTS};

/// Values of the tables that every 4-bit weight brings along: the 8-bit map and the 4-bit code, in f32.
const TABLE_VALUES: u64 = 256 + 16;

impl Workload {
    /// What is there from the first step to the last.
    pub(super) fn lasting(&self) -> Footprint {
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
    pub(super) fn head_page_bytes(&self) -> u64 {
        PagedTable::slot_bytes(self.model.vocab_size, self.model.hidden_size)
    }

    /// Whether the head comes to the device in parts.
    pub(super) fn pages_head(&self) -> bool {
        self.engine == Engine::Kernels && self.residence.head == Some(Side::Host)
    }

    /// Pinned memory of the host for such a head.
    pub(super) fn host_head_bytes(&self) -> u64 {
        match self.pages_head() {
            true => 2 * self.vocabulary_values() as u64,
            false => 0,
        }
    }

    /// Of the embedding or of the head.
    pub(super) fn vocabulary_values(&self) -> usize {
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
            let (d_out, d_in) = self.model.linear_shape(*module);
            let n = d_out * d_in;
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
        let shapes = ModelTensor::all(model).into_iter();
        let shapes = shapes.map(|tensor| tensor.shape(model));
        let vectors: usize = shapes.filter(|shape| shape.len() == 1).flatten().sum();
        // Cosines and sines of rotary_dim / 2 frequencies, of short batches beside those of long ones.
        let has_one_for_queries = model.rope.query_scaling.is_some();
        let tables = 1 + usize::from(model.local_rope.is_some()) + usize::from(has_one_for_queries);
        let short = match model.rope.scaling {
            RopeScaling::LongRope {
                original_max_position_embeddings: original,
                ..
            } if model.rope.is_long(self.positions) => original.next_power_of_two(),
            _ => 0,
        };
        let positions = self.positions.next_power_of_two() + short;
        let rotary = tables * positions * model.rotary_dim;
        4 * (vectors + rotary) as u64
    }

    /// The linear layers with an adapter, and its rank.
    pub(super) fn adapted(&self) -> impl Iterator<Item = (Module, usize)> {
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

    pub(super) fn is_paged(&self) -> bool {
        self.residence.optimizer == Side::Host
    }

    fn moment_bytes(&self) -> u64 {
        self.trained_tensors().map(|n| self.moments.bytes(n)).sum()
    }

    /// Moments and lower halves, where they live in host memory.
    pub(super) fn host_optimizer_bytes(&self) -> u64 {
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
