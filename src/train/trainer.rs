//! A training run. [`Trainer::step`] is the whole of an optimizer step: read it first.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::checkpoint::{self, TrainerState};
use super::config::{Resume, TrainConfig};
use super::memory::activation_policies;
use super::metrics::{EvalRecord, MetricsWriter, StepRecord};
use super::optimizer::Optimizer;
use super::run_data::RunData;
use super::schedule::Schedule;
use crate::data::{Batch, Example, SequenceOrder, Tokenizer};
use crate::device::Placement;
use crate::infer::{LogProbs, evaluate, sequences};
use crate::model::{ActivationPolicy, Decoder};
use crate::ops::linear_cross_entropy;
use crate::store::{Adapter, AdapterConfig, AtomicFile, Checkpoint};
use crate::{Error, Result};

const METRICS_FILE: &str = "metrics.jsonl";
const CONFIG_FILE: &str = "config.toml";

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    Step(&'a StepRecord),
    Evaluation(&'a EvalRecord),
    Checkpoint(&'a Path),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The final adapter is in the run directory.
    Finished,
    /// Stopped by the caller after this checkpoint.
    Stopped(PathBuf),
}

/// A decoder with its adapter, its data, and where the run stands.
pub struct Trainer {
    config: TrainConfig,
    adapter_config: AdapterConfig,
    decoder: Decoder,
    policies: Vec<ActivationPolicy>,
    data: RunData,
    order: SequenceOrder,
    optimizer: Optimizer,
    schedule: Schedule,
    total_steps: usize,
    state: TrainerState,
}

impl Trainer {
    /// Loads model and data, makes or loads the adapter, and takes up a checkpoint where the config says so. Writes
    /// nothing.
    ///
    /// # Errors
    /// Whatever is wrong with the config, the model, the data or the checkpoint.
    pub fn new(config: TrainConfig, placement: &Placement) -> Result<Self> {
        let mut decoder = Decoder::load(
            &Checkpoint::open(&config.model_name_or_path)?,
            Some(config.quantize_options()),
            placement,
        )?;
        let tokenizer = Tokenizer::find(&config.model_name_or_path)?;
        let vocab_size = decoder.config().vocab_size;
        let data = RunData::load(&config, tokenizer.as_ref(), Some(vocab_size))?;
        let mut order = data.order(&config);
        let adapter_config = match &config.adapter {
            Some(dir) => {
                let adapter = Adapter::read(dir)?;
                decoder.load_adapter(&adapter).map_err(does_not_fit(dir))?;
                adapter.config
            }
            None => {
                let new = new_adapter_config(&config);
                decoder.add_lora(&new, config.seed)?;
                new
            }
        };
        let batch = config.per_device_train_batch_size * config.gradient_accumulation_steps;
        let total_steps = match config.epochs() {
            Some(epochs) => (order.sequences(epochs) / batch as f64).ceil().max(1.0) as usize,
            None => config.max_steps as usize,
        };
        let tokens = order.longest_sequence() * config.per_device_train_batch_size;
        let mut trainer = Self {
            policies: activation_policies(
                decoder.config(),
                placement,
                tokens,
                config.gradient_checkpointing,
            ),
            order,
            optimizer: Optimizer::new(&config, &decoder)?,
            schedule: Schedule::from_config(&config, total_steps),
            state: TrainerState {
                global_step: 0,
                epoch: 0.0,
                examples_seen: 0,
            },
            adapter_config,
            decoder,
            data,
            total_steps,
            config,
        };
        trainer.resume()?;
        Ok(trainer)
    }

    /// One optimizer step: forward and backward of each micro-batch, clip, update.
    ///
    /// The loss is the sum of the token losses over the number of labels in all micro-batches together, so that how the
    /// rows are divided among micro-batches does not matter.
    ///
    /// # Errors
    /// [`Error::Train`] if the loss or the gradient is not finite; the adapter is as before then.
    pub fn step(&mut self) -> Result<StepRecord> {
        let started = Instant::now();
        let micro_batches = self.next_micro_batches();
        let targets: usize = micro_batches.iter().map(Batch::target_count).sum();

        self.optimizer.zero_grad(&self.decoder)?;
        let d_loss = 1.0 / targets as f32;
        let losses = micro_batches.iter().map(|batch| {
            self.decoder
                .backward(sequences(batch), &batch.labels, d_loss, &self.policies)
        });
        // Read when all is queued: a device works on meanwhile.
        let losses = losses.collect::<Result<Vec<_>>>()?;
        let mut loss = 0.0;
        for losses in losses {
            loss += linear_cross_entropy::total(&losses.read()?);
        }
        loss /= targets as f64;
        let grad_norm = self.optimizer.grad_norm(&self.decoder)?;
        self.expect_finite(loss, grad_norm)?;

        let learning_rate = self.schedule.learning_rate(self.state.global_step);
        self.optimizer
            .update(&self.decoder, learning_rate, grad_norm)?;

        self.advance();
        let tokens = micro_batches.iter().map(Batch::token_count).sum();
        Ok(StepRecord {
            step: self.state.global_step,
            epoch: self.state.epoch,
            loss,
            grad_norm,
            learning_rate,
            tokens,
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
            peak_memory_bytes: self.decoder.placement().peak_memory_bytes(),
        })
    }

    /// Trains to the end, or until `stop` is set: evaluates, saves, and keeps the run directory.
    ///
    /// # Errors
    /// Those of [`step`](Self::step), and of writing.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        mut observe: impl FnMut(Event<'_>),
    ) -> Result<Outcome> {
        let dir = self.config.output_dir.clone();
        self.expect_no_other_run()?;
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        AtomicFile::write(dir.join(CONFIG_FILE), self.config.resolved_toml()?)?;
        let mut metrics = match self.state.global_step {
            0 => MetricsWriter::create(dir.join(METRICS_FILE))?,
            step => MetricsWriter::truncate_after(dir.join(METRICS_FILE), step)?,
        };
        while self.state.global_step < self.total_steps {
            let record = self.step()?;
            metrics.write_step(&record)?;
            observe(Event::Step(&record));
            let is_last = record.step == self.total_steps;
            let is_due = |every: usize| is_last || record.step.is_multiple_of(every);
            if is_due(self.config.eval_steps.unwrap_or(self.total_steps))
                && let Some(record) = self.evaluate()?
            {
                metrics.write_eval(&record)?;
                observe(Event::Evaluation(&record));
            }
            let stopped = stop.load(Ordering::Relaxed);
            if stopped || is_due(self.config.save_steps) {
                let path = self.save_checkpoint()?;
                observe(Event::Checkpoint(&path));
                if stopped && !is_last {
                    return Ok(Outcome::Stopped(path));
                }
            }
        }
        self.decoder.adapter(&self.adapter_config)?.write(&dir)?;
        Ok(Outcome::Finished)
    }

    /// Scores the evaluation rows; `None` if the run has none.
    pub fn evaluate(&self) -> Result<Option<EvalRecord>> {
        let Some(rows) = self.data.eval_examples() else {
            return Ok(None);
        };
        let evaluation = evaluate(&self.decoder, rows, LogProbs::Omit, |_, _| Ok(()))?;
        Ok(Some(EvalRecord {
            step: self.state.global_step,
            eval_loss: evaluation.loss,
            eval_perplexity: evaluation.perplexity,
            eval_token_accuracy: evaluation.token_accuracy,
        }))
    }

    /// Writes `checkpoint-N` and removes the oldest ones beyond `save_total_limit`.
    pub fn save_checkpoint(&self) -> Result<PathBuf> {
        let dir = &self.config.output_dir;
        let adapter = self.decoder.adapter(&self.adapter_config)?;
        let path = checkpoint::write(dir, &self.state, &adapter, &self.optimizer)?;
        checkpoint::prune(dir, self.config.save_total_limit)?;
        Ok(path)
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

    /// One policy for each block.
    pub fn policies(&self) -> &[ActivationPolicy] {
        &self.policies
    }

    fn next_micro_batches(&mut self) -> Vec<Batch> {
        let rows = self.config.per_device_train_batch_size;
        (0..self.config.gradient_accumulation_steps)
            .map(|micro_batch| {
                let start = self.state.examples_seen + (micro_batch * rows) as u64;
                let mut examples: Vec<Example> = Vec::new();
                for position in start..start + rows as u64 {
                    let rows = self.order.rows(position);
                    examples.extend(rows.iter().map(|&row| self.data.train_example(row)));
                }
                Batch::from_examples(&examples.iter().collect::<Vec<_>>())
            })
            .collect()
    }

    fn advance(&mut self) {
        let batch =
            self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps;
        self.state.global_step += 1;
        self.state.examples_seen += batch as u64;
        self.state.epoch = self.order.epochs(self.state.examples_seen);
    }

    /// A new run does not mix its checkpoints with those of an earlier one.
    fn expect_no_other_run(&self) -> Result<()> {
        match checkpoint::list(&self.config.output_dir)?.pop() {
            Some(path) if self.state.global_step == 0 => {
                let reason = format!(
                    "{} is from an earlier run; continue it with resume_from_checkpoint, or choose another directory",
                    path.display()
                );
                Err(Error::config("output_dir", reason))
            }
            _ => Ok(()),
        }
    }

    fn expect_finite(&self, loss: f64, grad_norm: f64) -> Result<()> {
        if loss.is_finite() && grad_norm.is_finite() {
            return Ok(());
        }
        Err(Error::Train(format!(
            "step {}: loss {loss}, gradient norm {grad_norm}: not finite; lower learning_rate or look at the rows of this step",
            self.state.global_step + 1
        )))
    }

    fn resume(&mut self) -> Result<()> {
        let dir = match &self.config.resume_from_checkpoint {
            Resume::Never => return Ok(()),
            Resume::From(dir) => dir.clone(),
            Resume::Latest => match checkpoint::list(&self.config.output_dir)?.pop() {
                Some(dir) => dir,
                None => {
                    let reason = format!("{} has no checkpoint", self.config.output_dir.display());
                    return Err(Error::config("resume_from_checkpoint", reason));
                }
            },
        };
        let checkpoint = checkpoint::read(&dir)?;
        let adapter = checkpoint.adapter;
        if self.config.adapter.is_none() {
            expect_same_adapter(&adapter.config, &self.adapter_config, &dir)?;
        }
        self.decoder
            .load_adapter(&adapter)
            .map_err(does_not_fit(&dir))?;
        self.adapter_config = adapter.config;
        self.optimizer = Optimizer::new(&self.config, &self.decoder)?;
        self.optimizer
            .restore(checkpoint.state.global_step, &checkpoint.moments)?;
        self.state = checkpoint.state;
        Ok(())
    }
}

fn new_adapter_config(config: &TrainConfig) -> AdapterConfig {
    AdapterConfig {
        base_model_name_or_path: Some(config.model_name_or_path.display().to_string()),
        revision: None,
        r: config.lora_r,
        lora_alpha: config.lora_alpha,
        lora_dropout: 0.0,
        target_modules: config.lora_target_modules.clone(),
        use_rslora: config.use_rslora,
    }
}

/// An adapter that was made for another model, named by its directory.
fn does_not_fit(adapter: &Path) -> impl FnOnce(Error) -> Error {
    move |error| Error::malformed(adapter, format!("does not fit the model: {error}"))
}

/// A run cannot change the size or the scale of its adapter on the way.
fn expect_same_adapter(
    found: &AdapterConfig,
    configured: &AdapterConfig,
    dir: &Path,
) -> Result<()> {
    for (key, found, configured) in [
        ("lora_r", found.r.to_string(), configured.r.to_string()),
        (
            "lora_alpha",
            found.lora_alpha.to_string(),
            configured.lora_alpha.to_string(),
        ),
        (
            "use_rslora",
            found.use_rslora.to_string(),
            configured.use_rslora.to_string(),
        ),
    ] {
        if found != configured {
            let reason = format!("is {configured}, but {found} in {}", dir.display());
            return Err(Error::config(key, reason));
        }
    }
    Ok(())
}
