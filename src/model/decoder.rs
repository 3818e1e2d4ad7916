//! The decoder: embedding, blocks, final norm and head, over sequences laid one after another without padding.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use candle_core::Tensor;

use super::block::{ActivationPolicy, Block, Layout};
use super::config::DecoderConfig;
use super::kv_cache::{KvCache, LayerCache};
use super::load::{Loader, WeightSource};
use super::lora_dropout::LoraDropout;
use super::lora_linear::{LoraLinear, LoraPair};
use super::names::Module;
use super::parameters::{Parameters, Trainable};
use super::rope_tables::RopeTables;
use super::tensors::ModelTensor;
use super::vocabulary::{ModuleToSave, Vocabulary};
use crate::device::{Placement, Residence, Side};
use crate::ops::attention::{Segment, Segments};
use crate::ops::host_memory::HostMemory;
use crate::ops::linear_cross_entropy::{self, Head, Losses};
use crate::ops::matrix_dropout::MatrixDropout;
use crate::ops::neftune::{self, Noise};
use crate::ops::rope::Positions;
use crate::ops::soft_cap::SoftCap;
use crate::ops::table::{PagedTable, Table};
use crate::ops::weight::{BlockStream, Direction, Entered};
use crate::ops::{embedding, rms_norm, scale};
use crate::quant::QuantizeOptions;
use crate::store::Checkpoint;
use crate::{Error, Result};

/// Sequences laid one after another.
///
/// # Shapes
/// `input_ids`, `positions: [N]`; `cu_seqlens: [B + 1]`, from 0 to N.
#[derive(Debug, Clone, Copy)]
pub struct Sequences<'a> {
    pub input_ids: &'a [u32],
    pub positions: &'a [u32],
    pub cu_seqlens: &'a [usize],
}

/// A model: frozen weights, and adapters where they have been added.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: DecoderConfig,
    placement: Placement,
    embedding: Vocabulary,
    blocks: Vec<Block>,
    norm: Tensor,
    /// The embedding again where the two are tied.
    head: Vocabulary,
    /// The longest rotary tables so far, for short batches and for long ones.
    rope: Arc<Mutex<[Arc<RopeTables>; 2]>>,
    parameters: Parameters,
    /// What brings the weights of the blocks, where they do not stay on the device.
    stream: Option<Arc<BlockStream>>,
    /// Where activations wait that are offloaded; `None` where the device is the host.
    host_memory: Option<HostMemory>,
    /// Held by the thread whose pass through the blocks it is.
    pass: Arc<Mutex<()>>,
}

impl Decoder {
    /// Loads a checkpoint to where it is to compute; weights of linear layers that are not in 4 bits are quantized if
    /// `quantize` says how.
    ///
    /// # Errors
    /// [`Error::UnsupportedModel`] for a config that is not understood, [`Error::MissingTensor`] and
    /// [`Error::TensorMismatch`] for weights that do not fit it; [`Error::OutOfDeviceMemory`].
    pub fn load(
        checkpoint: &Checkpoint,
        quantize: Option<QuantizeOptions>,
        placement: &Placement,
    ) -> Result<Self> {
        let config = DecoderConfig::from_json(checkpoint.config(), &checkpoint.config_path())?;
        Self::from_source(checkpoint, config, quantize, placement)
    }

    /// Loads a model of this config from elsewhere than a checkpoint.
    ///
    /// # Errors
    /// Those of [`load`](Self::load).
    pub fn from_source(
        source: &dyn WeightSource,
        config: DecoderConfig,
        quantize: Option<QuantizeOptions>,
        placement: &Placement,
    ) -> Result<Self> {
        let mut loader = Loader::new(source, &config, quantize, placement)?;
        let Residence {
            embedding, head, ..
        } = placement.residence;
        let is_tied = config.tie_word_embeddings;
        let of_head = if is_tied {
            ModuleToSave::Embedding
        } else {
            ModuleToSave::Head
        };
        let is_paged = placement.uses_kernels() && head == Some(Side::Host);
        let head = loader.vocabulary(of_head, head)?;
        let paged = is_paged.then(|| PagedTable::new(&head, &placement.device));
        let paged = paged.transpose()?.map(Arc::new);
        let embedding = match is_tied && head.is_on_device() {
            true => head.clone(),
            false => loader.vocabulary(ModuleToSave::Embedding, embedding)?,
        };
        let blocks = (0..config.num_layers)
            .map(|layer| loader.block(layer))
            .collect::<Result<_>>()?;
        let norm = loader.norm(ModelTensor::FinalNorm, config.logits_scaling)?;
        let stream = loader.stream()?.map(Arc::new);
        Ok(Self {
            norm,
            stream,
            host_memory: placement.uses_kernels().then(HostMemory::default),
            rope: Arc::default(),
            parameters: Parameters::none(&placement.device)?,
            pass: Arc::default(),
            placement: placement.clone(),
            embedding: Vocabulary::frozen(embedding),
            blocks,
            head: Vocabulary {
                paged,
                ..Vocabulary::frozen(head)
            },
            config,
        })
    }

    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The blocks, the lowest first.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The linear layer `module` of block `layer`.
    pub fn linear(&self, layer: usize, module: Module) -> &LoraLinear {
        self.blocks[layer].linear(module)
    }

    /// Every linear layer of the blocks, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = (usize, Module, &LoraLinear)> {
        let blocks = self.blocks.iter().enumerate();
        blocks.flat_map(|(layer, block)| {
            let modules = self.config.modules();
            modules.map(move |module| (layer, module, block.linear(module)))
        })
    }

    /// Where the model computes.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// All that is trained.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Takes every adapter off and puts these on, which are views into `parameters`.
    pub(super) fn set_parameters(
        &mut self,
        parameters: Parameters,
        pairs: Vec<((usize, Module), LoraPair)>,
        [embedding, head]: [Option<Trainable>; ModuleToSave::ALL.len()],
    ) {
        self.embedding.trained = embedding;
        self.head.trained = head;
        for block in &mut self.blocks {
            block.linears_mut().for_each(|linear| linear.lora = None);
        }
        for ((layer, module), pair) in pairs {
            self.blocks[layer].linear_mut(module).lora = Some(pair);
        }
        self.parameters = parameters;
    }

    /// Rotary tables for positions `0..positions`, or more, of a batch whose longest sequence has so many.
    pub fn rope_tables(&self, positions: usize) -> Result<Arc<RopeTables>> {
        let is_long = self.config.rope.is_long(positions);
        let mut longest = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        let longest = &mut longest[usize::from(is_long)];
        if longest.positions() < positions {
            // Not beside the longer ones.
            *longest = Arc::default();
            let (config, positions) = (&self.config, positions.next_power_of_two());
            let tables = RopeTables::new(config, positions, is_long, &self.placement)?;
            *longest = Arc::new(tables);
        }
        Ok(Arc::clone(longest))
    }

    /// The logits of every row in f32, `[N, V]`.
    pub fn logits(&self, sequences: Sequences<'_>) -> Result<Tensor> {
        self.head_logits(&self.hidden_states(sequences, None)?)
    }

    /// What the head is given, `[N, D]`; with masks, that of the model of an ensemble which has them.
    pub fn hidden_states(
        &self,
        sequences: Sequences<'_>,
        masks: Option<MatrixDropout>,
    ) -> Result<Tensor> {
        self.final_norm(&self.infer(sequences, masks)?)
    }

    /// The logits in f32 of rows of [`hidden_states`](Self::hidden_states), `[N, D]` -> `[N, V]`.
    pub fn head_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        linear_cross_entropy::logits(hidden, self.head())
    }

    /// The loss of each row whose label is not [`IGNORE_INDEX`](crate::IGNORE_INDEX); `labels: [N]`.
    pub fn losses(&self, sequences: Sequences<'_>, labels: &[i64]) -> Result<Losses> {
        let last = self.hidden_states(sequences, None)?;
        linear_cross_entropy::forward(&last, self.head(), labels)
    }

    /// The logits `[V]` after the last of `ids`, which follow the tokens that `cache` holds and are added to it.
    pub fn decode(&self, ids: &[u32], cache: &mut KvCache<'_>) -> Result<Tensor> {
        let _pass = self.begin_pass()?;
        let again = cache.ids_to_read_again(ids, &self.config.rope);
        let ids = again.as_deref().unwrap_or(ids);
        let rows = cache.advance(ids)?;
        let positions: Vec<u32> = rows.clone().map(|p| p as u32).collect();
        let segment = Segment {
            queries: 0..ids.len(),
            keys: 0..rows.end,
        };
        let rope = self.rope_tables(rows.end)?;
        let rows = Rows::new(self, &positions, vec![segment], rope)?;
        let layout = rows.layout().masked(cache.masks);
        let mut x = self.embed(ids, None)?;
        for (layer, LayerCache { block, rows }) in cache.layers.iter_mut().enumerate() {
            let _weights = self.enter(layer, Direction::Up)?;
            x = block.decode(&x, &layout, rows)?;
        }
        let last = self.final_norm(&x.narrow(0, ids.len() - 1, 1)?)?;
        Ok(self.head_logits(&last)?.squeeze(0)?)
    }

    /// The last block's output, `[N, D]`, with nothing kept.
    fn infer(&self, sequences: Sequences<'_>, masks: Option<MatrixDropout>) -> Result<Tensor> {
        let _pass = self.begin_pass()?;
        let rows = self.rows(sequences)?;
        let layout = rows.layout().masked(masks);
        let mut x = self.embed(sequences.input_ids, None)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let _weights = self.enter(layer, Direction::Up)?;
            x = block.forward(&x, &layout, ActivationPolicy::Recompute)?.0;
        }
        Ok(x)
    }

    /// Reserves what the blocks share on a device, such as the memory that weights are dequantized into.
    ///
    /// # Errors
    /// While another thread's pass is under way: the two would write over each other's weights.
    pub(super) fn begin_pass(&self) -> Result<Option<MutexGuard<'_, ()>>> {
        if !self.placement.uses_kernels() {
            return Ok(None);
        }
        match self.pass.try_lock() {
            Ok(pass) => Ok(Some(pass)),
            Err(TryLockError::Poisoned(pass)) => Ok(Some(pass.into_inner())),
            Err(TryLockError::WouldBlock) => Err(Error::Train(
                "on a GPU a model computes for one thread at a time".into(),
            )),
        }
    }

    /// Has the weights of a block there until the result is dropped, where they do not stay on the device.
    pub(super) fn enter(&self, layer: usize, direction: Direction) -> Result<Option<Entered<'_>>> {
        let stream = self.stream.as_ref();
        stream
            .map(|stream| stream.enter(layer, direction))
            .transpose()
    }

    /// Where activations wait that are offloaded; `None` where the device is the host.
    pub fn host_memory(&self) -> Option<&HostMemory> {
        self.host_memory.as_ref()
    }

    /// What the first block is given, `[N, D]`; `noise` is what training adds to the embeddings, with where sequences begin.
    pub(super) fn embed(&self, ids: &[u32], noise: Option<(Noise, &[usize])>) -> Result<Tensor> {
        let x = match (&self.host_memory, self.embedding.table()) {
            (Some(host), Table::Frozen(table)) if !table.is_on_device() => {
                embedding::forward_from_host(ids, table, host, &self.placement.device)?
            }
            (_, table) => embedding::forward(ids, table)?,
        };
        if let Some((noise, cu_seqlens)) = noise {
            let noise = noise.in_units_of(self.config.embedding_scale);
            neftune::forward(&x, noise, cu_seqlens)?;
        }
        scale::in_place(&x, self.config.embedding_factor() as f32)?;
        Ok(x)
    }

    /// Adds to `d_table` the gradient of the embedding; `dx: [N, D]`, whose memory is reused, is that of what
    /// [`embed`](Self::embed) gave.
    pub(super) fn embed_backward(&self, dx: &Tensor, ids: &[u32], d_table: &Tensor) -> Result<()> {
        scale::in_place(dx, self.config.embedding_factor() as f32)?;
        embedding::backward(dx, ids, self.config.padding_id, d_table)
    }

    /// What makes logits.
    pub(super) fn head(&self) -> Head<'_> {
        Head {
            table: self.head.table(),
            soft_cap: self.config.logits_soft_cap.map(|cap| SoftCap(cap as f32)),
        }
    }

    /// The embedding or the head.
    pub fn vocabulary(&self, module: ModuleToSave) -> &Vocabulary {
        match module {
            ModuleToSave::Embedding => &self.embedding,
            ModuleToSave::Head => &self.head,
        }
    }

    pub(super) fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm::forward(x, &self.norm, self.config.stream_eps())
    }

    /// The gradient of the final norm's input.
    pub(super) fn final_norm_backward(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        rms_norm::gradient(dy, x, &self.norm, self.config.stream_eps())
    }

    /// Where the rows of a batch stand.
    pub(super) fn rows(&self, sequences: Sequences<'_>) -> Result<Rows> {
        let Sequences {
            input_ids,
            positions,
            cu_seqlens,
        } = sequences;
        let n = input_ids.len();
        if positions.len() != n || cu_seqlens.first() != Some(&0) || cu_seqlens.last() != Some(&n) {
            return Err(Error::Shape {
                op: "decoder",
                expected: format!("{n} positions and sequences from 0 to {n}"),
                found: format!("{} positions, boundaries {cu_seqlens:?}", positions.len()),
            });
        }
        let last = positions.iter().max().map_or(0, |&p| p as usize + 1);
        let segment = |bounds: &[usize]| Segment {
            queries: bounds[0]..bounds[1],
            keys: bounds[0]..bounds[1],
        };
        let segments = cu_seqlens.windows(2).map(segment).collect();
        Rows::new(self, positions, segments, self.rope_tables(last)?)
    }
}

/// What a [`Layout`] borrows, on the device where kernels read it.
pub(super) struct Rows {
    positions: Positions,
    segments: Segments,
    rope: Arc<RopeTables>,
}

impl Rows {
    fn new(
        decoder: &Decoder,
        positions: &[u32],
        segments: Vec<Segment>,
        rope: Arc<RopeTables>,
    ) -> Result<Self> {
        let (positions, segments) = (Positions::new(positions), Segments::from(segments));
        let Placement { device, .. } = &decoder.placement;
        let (positions, segments) = match decoder.placement.uses_kernels() {
            true => (
                positions.on(device)?,
                segments.on(device, &decoder.blocks[0].heads)?,
            ),
            false => (positions, segments),
        };
        Ok(Self {
            positions,
            segments,
            rope,
        })
    }

    /// Without dropout.
    pub(super) fn layout(&self) -> Layout<'_> {
        Layout {
            positions: &self.positions,
            segments: &self.segments,
            rope: &self.rope,
            dropout: LoraDropout::default(),
        }
    }
}
