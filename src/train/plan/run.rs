//! The plan of a training run: its workload from the config, and the memory that it may take.

use super::{Engine, LIBRARIES_BYTES, Moments, Plan, Workload};
use crate::device::{Placement, Residence, Residency, Side};
use crate::model::{DecoderConfig, ModuleToSave};
use crate::quant::BlockSizes;
use crate::store::{AdapterConfig, MatrixDropoutSettings};
use crate::train::TrainConfig;
use crate::{Error, Result};

/// The sizes of the longest micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongestBatch {
    /// Its tokens.
    pub rows: usize,
    /// Those that carry loss.
    pub label_rows: usize,
    /// Tokens of its longest sequence.
    pub positions: usize,
}

impl LongestBatch {
    /// Of `sequences` sequences of the longest length, with loss on every token.
    pub fn full(sequences: usize, length: usize) -> Self {
        Self {
            rows: sequences * length,
            label_rows: sequences * length,
            positions: length,
        }
    }
}

impl Engine {
    pub fn of(placement: &Placement) -> Self {
        match placement.uses_kernels() {
            true => Self::Kernels,
            false => Self::Cpu(placement.compute_dtype),
        }
    }
}

impl Workload {
    /// What training the adapters that `lora` puts on `model` takes.
    pub fn new(
        model: DecoderConfig,
        blocks: BlockSizes,
        engine: Engine,
        lora: &AdapterConfig,
        batch: LongestBatch,
    ) -> Self {
        let adapters = model.adapters(lora).into_iter();
        let [embedding, head] = ModuleToSave::ALL.map(|module| {
            let is_trained = lora.modules_to_save.matches(&module.path(&model));
            (!is_trained).then_some(Side::Device)
        });
        let ranks = adapters.map(|block| block.map(|lora| lora.map_or(0, |lora| lora.r)));
        Self {
            ranks: ranks.collect(),
            model,
            blocks,
            dense: Vec::new(),
            engine,
            rows: batch.rows,
            label_rows: batch.label_rows,
            positions: batch.positions,
            moments: Moments::F32,
            dropout: false,
            instances: None,
            dora: lora.use_dora,
            micro_batches: 1,
            residence: Residence {
                embedding,
                head,
                ..Residence::DEVICE
            },
            together: 1,
            offloaded: 0,
            host_limit: None,
        }
    }
}

impl Workload {
    /// The same with what `config` says of the optimizer and of accumulation, with dropout where `lora_dropout` is not 0, and on
    /// matrices where there are settings for that.
    pub fn with_settings(
        self,
        config: &TrainConfig,
        lora_dropout: f64,
        matrix_dropout: Option<&MatrixDropoutSettings>,
    ) -> Self {
        // The memory of the CPU's engine is the host's.
        let optimizer = match config.optim.is_paged() && self.engine == Engine::Kernels {
            true => Side::Host,
            false => Side::Device,
        };
        Self {
            moments: config.optim.into(),
            micro_batches: config.gradient_accumulation_steps,
            dropout: lora_dropout > 0.0,
            instances: matrix_dropout.map(|_| config.lora_matrix_dropout_instances),
            residence: Residence {
                optimizer,
                ..self.residence
            },
            ..self
        }
    }
}

impl Workload {
    /// Refuses an adapter that cannot be trained as the workload would have it.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn expect_possible(&self, adapter: &AdapterConfig) -> Result<()> {
        match adapter.use_dora {
            true if self.instances.is_some() => {
                let reason = "masks the matrices of plain adapters; leave it or use_dora out";
                Err(Error::config("lora_matrix_dropout", reason))
            }
            true if self.residence.optimizer == Side::Host => {
                let reason = "keeps a half of each trained value in host memory, and use_dora reads \
                              the whole of its magnitudes; use adamw_torch or adamw_8bit";
                Err(Error::config("optim", reason))
            }
            _ => Ok(()),
        }
    }
}

impl TrainConfig {
    /// The same steps in micro-batches that fit, if `auto_find_batch_size` asks for that: the largest that leave the weights
    /// on the device, or else the largest that fit at all. Gives the config with its plan.
    ///
    /// # Errors
    /// That of the smallest micro-batch if not even that fits.
    pub fn with_micro_batches_that_fit(
        self,
        plan: impl Fn(&Self) -> Result<Plan>,
    ) -> Result<(Self, Plan)> {
        let whole = self.per_device_train_batch_size;
        let smallest = if self.auto_find_batch_size { 1 } else { whole };
        let sizes = (smallest..=whole).rev();
        let sizes = sizes.filter(|size| whole.is_multiple_of(*size));
        let mut fits = None;
        let mut refusal = None;
        for size in sizes {
            let config = Self {
                per_device_train_batch_size: size,
                gradient_accumulation_steps: self.gradient_accumulation_steps * (whole / size),
                ..self.clone()
            };
            match plan(&config) {
                Ok(plan) if plan.residence.weights == Residency::Resident => {
                    return Ok((config, plan));
                }
                Ok(plan) => fits = fits.or(Some((config, plan))),
                Err(error) => refusal = Some(error),
            }
        }
        fits.ok_or_else(|| refusal.expect("a batch has a row, and none fits"))
    }
}

impl Plan {
    /// The plan of a run: the policies that `gradient_checkpointing` names, or the fastest that fit into `vram_limit` or,
    /// without one, into what is free: all of it on a GPU, half of it on the CPU.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] before anything is loaded. Without a `vram_limit` a run on the CPU
    /// is never refused: its system can swap.
    pub fn of_run(
        config: &TrainConfig,
        workload: &Workload,
        placement: &Placement,
    ) -> Result<Self> {
        let free = placement.free_memory_bytes().unwrap_or(0);
        let limit = config.vram_limit.map(|limit| limit.0);
        match (limit, workload.engine) {
            // What is free does not include what the libraries have taken by now.
            (_, Engine::Kernels) => {
                let free = free + LIBRARIES_BYTES;
                Self::within(
                    workload,
                    config,
                    limit.map_or(free, |limit| limit.min(free)),
                )
            }
            (Some(limit), Engine::Cpu(_)) => Self::within(workload, config, limit),
            (None, Engine::Cpu(_)) => {
                let fitting = Self::within(workload, config, free / 2);
                Ok(fitting.unwrap_or_else(|_| {
                    let kept = kept_by_config(workload, config).unwrap_or(0);
                    Self::keeping(workload, kept)
                }))
            }
        }
    }

    /// The plan within `limit` bytes: with the policies that the config names, else with the fastest that fit.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`], with the smallest change that would fit.
    pub fn within(workload: &Workload, config: &TrainConfig, limit: u64) -> Result<Self> {
        match kept_by_config(workload, config) {
            Some(kept) => Ok(Self::keeping(&workload.way_that_fits(limit, kept)?, kept)),
            None => Self::fitting(workload, limit),
        }
    }
}

/// The blocks that keep their activations by `gradient_checkpointing`, if it is set.
fn kept_by_config(workload: &Workload, config: &TrainConfig) -> Option<usize> {
    Some(match config.gradient_checkpointing? {
        true => 0,
        false => workload.model.num_layers,
    })
}
