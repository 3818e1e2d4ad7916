//! A training run. [`Trainer::step`] is the whole of an optimizer step: read it first.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::checkpoint::{Checkpoint, PartialStep, TrainerState};
use super::config::{OnNonFinite, TrainConfig};
use super::fingerprint::Fingerprint;
use super::initial_adapter;
use super::matrix_dropout;
use super::metrics::{EvalRecord, StepRecord};
use super::optimizer::Optimizer;
use super::plan::{Engine, LongestBatch, Plan, Workload};
use super::resume::Resumed;
use super::run_data::RunData;
use super::schedule::Schedule;
use crate::data::{Batch, Example, SequenceOrder, Tokenizer};
use crate::device::{Placement, available_memory_bytes};
use crate::infer::{EVALUATION_TOKENS, LogProbs, evaluate_within, sequences};
use crate::model::{
    Decoder, DecoderConfig, InitLoraWeights, MicroBatch, Regularization, block_sizes, dense_linears,
};
use crate::ops::dropout::Dropout;
use crate::ops::linear_cross_entropy::{self, Losses};
use crate::ops::matrix_dropout::MatrixDropout;
use crate::ops::neftune::Noise;
use crate::store::{
    self, Adapter, AdapterConfig, Disk, FileWatch, Initialization, MatrixDropoutSettings,
    SystemDisk,
};
use crate::{Error, Result};

/// A decoder with its adapter, its data, and where the run stands.
pub struct Trainer {
    pub(super) config: TrainConfig,
    pub(super) adapter_config: AdapterConfig,
    pub(super) matrix_dropout: Option<MatrixDropoutSettings>,
    /// Which weights the adapter is a change of, where those are not the original ones.
    initialization: Option<Initialization>,
    pub(super) decoder: Decoder,
    workload: Workload,
    plan: Plan,
    data: RunData,
    order: SequenceOrder,
    pub(super) optimizer: Optimizer,
    pub(super) schedule: Schedule,
    pub(super) total_steps: usize,
    pub(super) state: TrainerState,
    pub(super) fingerprint: Fingerprint,
    /// The mapped weight files of the base model.
    base_files: FileWatch,
    pub(super) disk: Arc<dyn Disk>,
    /// The checkpoints of the run directory when the run began or was last left.
    pub(super) known_checkpoints: Vec<PathBuf>,
    pub(super) resumed: Option<Resumed>,
}

/// What a trainer has in memory before its first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loaded {
    /// Of the base.
    Weights,
    /// With their gradients.
    Adapters,
    /// Its moments.
    Optimizer,
}

/// A micro-batch, with the training rows that it is made of.
struct SourcedBatch {
    batch: Batch,
    rows: Vec<usize>,
}

/// So many steps in a row may be skipped (`on_non_finite`): after more, it is the run that is broken and not a row.
const MAX_SKIPPED_IN_A_ROW: usize = 10;

impl Trainer {
    /// Loads model and data, makes or loads the adapter, and takes up a checkpoint where the config says so. Writes
    /// nothing.
    ///
    /// # Errors
    /// Whatever is wrong with the config, the model, the data or the checkpoint.
    pub fn new(config: TrainConfig, placement: &Placement) -> Result<Self> {
        Self::watched(config, placement, |_| ())
    }

    /// [`new`](Self::new), which tells `watch` what it has just put into memory.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn watched(
        mut config: TrainConfig,
        placement: &Placement,
        mut watch: impl FnMut(Loaded),
    ) -> Result<Self> {
        if let Some(dtype) = config.compute_dtype
            && dtype != placement.compute_dtype
        {
            let reason = "is not what the model is placed in";
            return Err(Error::config("compute_dtype", reason));
        }
        expect_own_directory(&config)?;
        initial_adapter::choose(&mut config)?;
        let initialization = Initialization::of_model(&config.model_name_or_path)?;
        let base = store::Checkpoint::open(&config.model_name_or_path)?;
        let model = DecoderConfig::from_json(base.config(), &base.config_path())?;
        let mut tokenizer = Tokenizer::find(&config.model_name_or_path)?;
        if let Some(tokenizer) = &mut tokenizer {
            config.settle_date(tokenizer);
        }
        let data = RunData::load(&config, tokenizer.as_ref(), Some(model.vocab_size))?;
        let mut order = data.order(&config);
        let adapter = config.adapter.as_ref().map(Adapter::read).transpose()?;
        let start = config.matrix_dropout_of_adapter()?;
        let matrix_dropout = matrix_dropout::settings(&config, start.as_ref());
        let mut adapter_config = match (&adapter, &config.adapter) {
            (Some(Adapter { config: found, .. }), Some(dir)) => {
                config.adapter_config_of(found, dir, &model)?
            }
            _ => config.new_adapter_config(),
        };
        let masked = matrix_dropout.as_ref();
        matrix_dropout::set_alpha(&mut adapter_config, masked, start.as_ref());
        let quantize = config.quantization_of(&base);
        let blocks = block_sizes(&base, &model, config.quantize_options())?;
        let dense = dense_linears(&base, &model, quantize)?;
        let engine = Engine::of(placement);
        let longest = order.longest_sequence();
        let longest_evaluated = data.longest_eval_row();
        let workload = |config: &TrainConfig| {
            let batch = LongestBatch::full(config.per_device_train_batch_size, longest);
            let batch = LongestBatch {
                positions: batch.positions.max(longest_evaluated),
                ..batch
            };
            let lora = &adapter_config;
            let workload = Workload::new(model.clone(), blocks, engine, lora, batch);
            Workload {
                dense: dense.clone(),
                host_limit: available_memory_bytes(),
                ..workload.with_settings(config, lora.lora_dropout, masked)
            }
        };
        workload(&config).expect_possible(&adapter_config)?;
        let (config, plan) = config.with_micro_batches_that_fit(|config| {
            Plan::of_run(config, &workload(config), placement)
        })?;
        let workload = workload(&config);
        let placement = Placement {
            residence: plan.residence,
            ..placement.clone()
        };
        let mut decoder = Decoder::load(&base, quantize, &placement)?;
        watch(Loaded::Weights);
        if let Some(host) = decoder.host_memory() {
            let (inputs, bytes) = plan.offloaded_inputs(&workload);
            host.reserve(inputs, bytes, &placement.device)?;
        }
        match (&adapter, &config.adapter) {
            (Some(adapter), Some(dir)) => {
                let adapter = Adapter {
                    config: adapter_config.clone(),
                    ..adapter.clone()
                };
                decoder.load_adapter(&adapter).map_err(does_not_fit(dir))?;
            }
            _ => {
                let init = config.init_lora_weights.unwrap_or(InitLoraWeights::Default);
                decoder.add_lora(&adapter_config, init, config.seed)?;
            }
        }
        watch(Loaded::Adapters);
        let optimizer = Optimizer::new(&config, &decoder)?;
        watch(Loaded::Optimizer);
        let batch = config.per_device_train_batch_size * config.gradient_accumulation_steps;
        let total_steps = match config.epochs() {
            Some(epochs) => (order.sequences(epochs) / batch as f64).ceil().max(1.0) as usize,
            None => config.max_steps as usize,
        };
        let mut trainer = Self {
            workload,
            plan,
            order,
            optimizer,
            schedule: Schedule::from_config(&config, total_steps),
            state: TrainerState {
                total_steps,
                ..TrainerState::default()
            },
            fingerprint: Fingerprint::new(&config, &base, data.train_examples())?,
            base_files: base.watch(),
            disk: Arc::new(SystemDisk),
            known_checkpoints: Vec::new(),
            resumed: None,
            adapter_config,
            matrix_dropout,
            initialization: initialization.map(|(_, record)| record),
            decoder,
            data,
            total_steps,
            config,
        };
        trainer.resume()?;
        Ok(trainer)
    }

    /// The same run with its checkpoints on another disk.
    pub fn on_disk(mut self, disk: Arc<dyn Disk>) -> Self {
        self.disk = disk;
        self
    }

    /// One optimizer step: forward and backward of each micro-batch, clip, update.
    ///
    /// The loss is the sum of the token losses over the number of labels in all micro-batches together, so that how the
    /// rows are divided among micro-batches does not matter.
    ///
    /// # Errors
    /// [`Error::NonFiniteStep`] if the loss or the gradient is not finite and that is to stop the run; the adapter is as
    /// before then.
    pub fn step(&mut self) -> Result<StepRecord> {
        match self.step_unless(|| false)? {
            Some(record) => Ok(record),
            None => unreachable!("nothing asked for a pause"),
        }
    }

    /// A step, or what is left of it, unless `pauses` says between two micro-batches that it is to be left there: then
    /// [`TrainerState::partial_step`] tells what is done, the gradients hold its sums, and the next call goes on.
    pub(super) fn step_unless(&mut self, pauses: impl Fn() -> bool) -> Result<Option<StepRecord>> {
        let started = Instant::now();
        let micro_batches = self.next_micro_batches();
        let targets = |m: &SourcedBatch| m.batch.target_count();
        let targets: usize = micro_batches.iter().map(targets).sum();
        let d_loss = 1.0 / targets as f32;
        let (mut done, loss_sum) = match self.state.partial_step.take() {
            Some(partial) => (partial.micro_batches, partial.loss_sum),
            None => {
                self.optimizer.zero_grad(&self.decoder)?;
                (0, 0.0)
            }
        };
        let instances = self.workload.instances();
        let mut losses = StepLosses::after(loss_sum, instances);
        let inputs: Vec<_> = micro_batches
            .iter()
            .enumerate()
            .map(|(number, SourcedBatch { batch, .. })| MicroBatch {
                sequences: sequences(batch),
                labels: &batch.labels,
                regularization: self.regularization(number),
            })
            .collect();
        for together in inputs[done..].chunks(self.plan.together) {
            let policies = &self.plan.policies;
            let queued = self.decoder.backward(together, d_loss, policies)?;
            losses.queued.extend(queued);
            done += together.len();
            if done < micro_batches.len() && pauses() {
                losses.read()?;
                // What is not finite is dealt with at the end of the step.
                if losses.sum.is_finite() {
                    self.state.partial_step = Some(PartialStep {
                        micro_batches: done,
                        loss_sum: losses.sum,
                    });
                    return Ok(None);
                }
            }
        }
        // Read when all is queued: a device works on meanwhile.
        losses.read()?;
        let loss = losses.sum / targets as f64;
        let grad_norm = self.optimizer.grad_norm(&self.decoder)?;
        let learning_rate = self.schedule.learning_rate(self.state.global_step);
        let mut skipped_rows = Vec::new();
        if loss.is_finite() && grad_norm.is_finite() {
            self.optimizer
                .update(&mut self.decoder, learning_rate, grad_norm)?;
            self.state.optimizer_updates += 1;
            self.state.skipped_in_a_row = 0;
        } else {
            let suspects = suspects(&micro_batches, &losses.is_finite);
            skipped_rows = suspects
                .iter()
                .map(|&row| self.data.row_name(row))
                .collect();
            self.expect_skip_allowed(loss, grad_norm, &skipped_rows)?;
            self.state.skipped_in_a_row += 1;
        }
        self.advance();
        let tokens = micro_batches.iter().map(|m| m.batch.token_count()).sum();
        // A clock that does not move in a step does not make a speed that JSON cannot hold.
        let seconds = started.elapsed().as_secs_f64().max(1e-9);
        Ok(Some(StepRecord {
            step: self.state.global_step,
            epoch: self.state.epoch,
            loss,
            grad_norm,
            learning_rate,
            tokens,
            tokens_per_second: tokens as f64 / seconds,
            peak_memory_bytes: self.decoder.placement().peak_memory_bytes(),
            skipped_rows,
        }))
    }

    /// Scores the evaluation rows; `None` if the run has none.
    pub fn evaluate(&self) -> Result<Option<EvalRecord>> {
        if self.data.eval_len().is_none() {
            return Ok(None);
        }
        let of = |batch_tokens| {
            let rows = self.data.eval_examples().into_iter().flatten();
            evaluate_within(batch_tokens, &self.decoder, rows, LogProbs::Omit, |_, _| {
                Ok(())
            })
        };
        let planned = self.workload.rows;
        let evaluation = match of(EVALUATION_TOKENS) {
            Err(Error::OutOfDeviceMemory { .. }) if planned < EVALUATION_TOKENS => of(planned)?,
            found => found?,
        };
        Ok(Some(EvalRecord {
            step: self.state.global_step,
            eval_loss: evaluation.loss,
            eval_perplexity: evaluation.perplexity,
            eval_token_accuracy: evaluation.token_accuracy,
        }))
    }

    /// All that a checkpoint needs, copied to host memory.
    ///
    /// # Errors
    /// [`Error::Malformed`] if a weight file of the base model was changed since it was mapped: what was computed then is
    /// not worth saving.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        self.expect_base_unchanged()?;
        Ok(Checkpoint {
            state: self.state.clone(),
            fingerprint: self.fingerprint.clone(),
            adapter: self.decoder.adapter(&self.adapter_config)?,
            matrix_dropout: self.matrix_dropout,
            initialization: self.initialization.clone(),
            moments: self.optimizer.state()?,
            gradients: match self.state.partial_step {
                None => Default::default(),
                Some(_) => self.gradients()?,
            },
        })
    }

    /// # Errors
    /// [`Error::Malformed`] naming the weight file of the base model that was changed since it was mapped.
    pub(super) fn expect_base_unchanged(&self) -> Result<()> {
        self.base_files.expect_unchanged()
    }

    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    pub fn data(&self) -> &RunData {
        &self.data
    }

    /// Optimizer steps of the whole run, and of those the ones that are done.
    pub fn total_steps(&self) -> usize {
        self.total_steps
    }

    pub fn steps_done(&self) -> usize {
        self.state.global_step
    }

    /// What the memory of the run was planned from.
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// The memory of the run, and what its blocks keep.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What was taken up and what was passed over, if the run continues an earlier one.
    pub fn resumed(&self) -> Option<&Resumed> {
        self.resumed.as_ref()
    }

    fn next_micro_batches(&mut self) -> Vec<SourcedBatch> {
        let rows = self.config.per_device_train_batch_size;
        (0..self.config.gradient_accumulation_steps)
            .map(|micro_batch| {
                let start = self.state.examples_seen + (micro_batch * rows) as u64;
                let rows: Vec<usize> = (start..start + rows as u64)
                    .flat_map(|position| self.order.rows(position).to_vec())
                    .collect();
                let examples: Vec<Example> = rows
                    .iter()
                    .map(|&row| self.data.train_example(row))
                    .collect();
                SourcedBatch {
                    batch: Batch::from_examples(&examples.iter().collect::<Vec<_>>()),
                    rows,
                }
            })
            .collect()
    }

    /// What is random in a micro-batch of the next step.
    fn regularization(&self, micro_batch: usize) -> Regularization {
        let (seed, step) = (self.config.seed, self.state.global_step);
        let p = self.adapter_config.lora_dropout;
        let alpha = self.config.neftune_noise_alpha.unwrap_or(0.0);
        let matrix_dropout = self.matrix_dropout.and_then(|settings| {
            let instances = self.config.lora_matrix_dropout_instances;
            MatrixDropout::new(settings.p, seed, (step, micro_batch), instances)
        });
        Regularization {
            dropout: Dropout::new(p, seed, step, micro_batch),
            matrix_dropout,
            noise: Noise::new(alpha, seed, step, micro_batch),
        }
    }

    fn advance(&mut self) {
        let batch =
            self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps;
        self.state.global_step += 1;
        self.state.examples_seen += batch as u64;
        self.state.epoch = self.order.epochs(self.state.examples_seen);
    }

    fn expect_skip_allowed(&self, loss: f64, grad_norm: f64, rows: &[String]) -> Result<()> {
        let skips = self.config.on_non_finite == OnNonFinite::Skip;
        if skips && self.state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW {
            return Ok(());
        }
        Err(Error::NonFiniteStep {
            step: self.state.global_step + 1,
            loss,
            grad_norm,
            dataset: self.config.dataset.to_string(),
            rows: rows.to_vec(),
            hint: match skips {
                true => "so were the steps before it; lower learning_rate",
                false => "lower learning_rate, look at these rows, or set on_non_finite = \"skip\"",
            },
        })
    }
}

/// The losses of the micro-batches of a step, added up in their order.
struct StepLosses {
    sum: f64,
    /// Of each micro-batch that was read.
    is_finite: Vec<bool>,
    queued: Vec<Losses>,
    /// Of each micro-batch; its loss is their mean.
    instances: usize,
}

impl StepLosses {
    fn after(sum: f64, instances: usize) -> Self {
        Self {
            sum,
            instances,
            is_finite: Vec::new(),
            queued: Vec::new(),
        }
    }

    /// Waits for the device, where they are on one.
    fn read(&mut self) -> Result<()> {
        for losses in self.queued.drain(..) {
            let total = linear_cross_entropy::total(&losses.read()?) / self.instances as f64;
            self.is_finite.push(total.is_finite());
            self.sum += total;
        }
        Ok(())
    }
}

/// The rows of the micro-batches whose loss is not finite; all of them where every loss is, and so it is the gradient.
/// `is_finite` is of the last micro-batches: those before a pause had a finite loss.
fn suspects(micro_batches: &[SourcedBatch], is_finite: &[bool]) -> Vec<usize> {
    let before = vec![true; micro_batches.len() - is_finite.len()];
    let is_finite = [&before, is_finite].concat();
    let all_finite = !is_finite.contains(&false);
    let suspects = micro_batches.iter().zip(is_finite);
    let suspects = suspects.filter(|(_, finite)| all_finite || !finite);
    let mut rows: Vec<usize> = suspects.flat_map(|(m, _)| m.rows.clone()).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// An adapter beside the weights of a model is loaded with them by transformers.
fn expect_own_directory(config: &TrainConfig) -> Result<()> {
    let [model, run] = [&config.model_name_or_path, &config.output_dir].map(fs::canonicalize);
    match (model, run) {
        (Ok(model), Ok(run)) if model == run => {
            let reason = "is the model's own directory; choose another";
            Err(Error::config("output_dir", reason))
        }
        _ => Ok(()),
    }
}

/// An adapter that was made for another model, named by its directory.
pub(super) fn does_not_fit(adapter: &Path) -> impl FnOnce(Error) -> Error {
    move |error| Error::malformed(adapter, format!("does not fit the model: {error}"))
}
