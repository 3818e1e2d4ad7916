//! What benchmarks measure: a trainer of a model of random weights, on rows of random tokens of full length.

use std::any::Any;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use qlora::device::{self, Placement};
use qlora::train::{Loaded, Shape, SyntheticRun, TrainConfig, Trainer};

use crate::commands::{ConfigFlags, ShapeArgs, open, return_freed_memory};

/// Keys of `qlora train` with another default here, and what they mean here.
const DEFAULTS: [(&str, &str, &str); 3] = [
    (
        "gradient_accumulation_steps",
        "1",
        "Micro-batches in an optimizer step",
    ),
    (
        "max_steps",
        "4",
        "Optimizer steps that count; where speed is measured, after one to warm up",
    ),
    ("max_seq_len", "256", "Length of every sequence, in tokens"),
];

/// Keys of `qlora train` that a benchmark cannot do as asked: it makes its own model and rows.
const REFUSED: [&str; 14] = [
    "preset",
    "model_name_or_path",
    "adapter",
    "dataset",
    "dataset_weights",
    "dataset_format",
    "dataset_columns",
    "chat_template_date",
    "dataset_cache_dir",
    "eval_dataset",
    "group_by_length",
    "packing",
    "per_device_train_batch_tokens",
    "resume_from_checkpoint",
];

/// Keys of `qlora train` that change nothing here: nothing is evaluated or saved, and every row is of full length.
const WITHOUT_EFFECT: [&str; 16] = [
    "output_dir",
    "source_max_len",
    "target_max_len",
    "excess_length_strategy",
    "train_on_source",
    "mask_history",
    "shuffle",
    "max_train_samples",
    "max_eval_samples",
    "eval_dataset_size",
    "per_device_eval_batch_size",
    "num_train_epochs",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "logging_steps",
];

/// What model is to be measured.
#[derive(Debug, clap::Args)]
pub struct SyntheticArgs {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Write the model here and leave it there, or use the one that is there; unset: a temporary directory
    #[arg(long = "synthetic_dir", alias = "synthetic-dir", value_name = "DIR")]
    synthetic_dir: Option<PathBuf>,
}

/// A training flag as a benchmark has it.
pub fn training_flag(flag: clap::Arg) -> clap::Arg {
    let id = flag.get_id().to_string();
    if let Some((_, value, help)) = DEFAULTS.iter().find(|(key, ..)| *key == id) {
        return flag.help(format!("{help} [default: {value}]"));
    }
    if id == "vram_limit" {
        return flag.help(
            "Memory that the run may take, such as 24GiB; on a GPU the rest of it is taken away before the run starts",
        );
    }
    let hide = REFUSED.iter().chain(&WITHOUT_EFFECT).any(|key| *key == id);
    if hide { flag.hide(true) } else { flag }
}

/// A model and rows on disk, and the config of a run on them.
pub struct Prepared {
    pub shape: Shape,
    pub placement: Placement,
    config: TrainConfig,
    /// Those in a temporary directory are removed when this is dropped.
    _files: SyntheticRun,
    /// Memory of the device that nothing may use.
    withheld: Option<Withheld>,
}

struct Withheld {
    bytes: u64,
    _memory: Box<dyn Any + Send>,
}

impl Prepared {
    /// Writes what is to be trained, for so many steps besides those that `--max_steps` asks for.
    pub fn new(
        model: &SyntheticArgs,
        flags: &ConfigFlags,
        steps_besides: usize,
    ) -> anyhow::Result<Self> {
        let shape = model.shape.shape(Shape::LLAMA_110M);
        let mut overrides = flags.overrides.clone();
        let given = |key: &str| flags.overrides.iter().any(|(name, _)| name == key);
        if let Some(key) = REFUSED.into_iter().find(|key| given(key)) {
            bail!("--{key}: a benchmark makes its own model and rows, leave it out");
        }
        for (key, value, _) in DEFAULTS {
            if !given(key) {
                overrides.push((key.to_string(), value.to_string()));
            }
        }
        overrides.push(("shuffle".to_string(), false.to_string()));
        let mut config = TrainConfig::load_partial(None, &overrides)?;
        let placement = open(config.device, config.compute_dtype)?;
        if config.max_steps < 1 {
            bail!("a benchmark needs --max_steps of at least 1");
        }
        eprintln!(
            "writing a synthetic model: {}",
            serde_json::to_string(&shape)?
        );
        let started = Instant::now();
        let rows = config.per_device_train_batch_size * config.gradient_accumulation_steps;
        let (tokens, options) = (config.longest_sequence(), config.quantize_options());
        let files = match &model.synthetic_dir {
            Some(dir) => SyntheticRun::create_in(dir, &shape, rows, tokens, options)?,
            None => SyntheticRun::create(&shape, rows, tokens, options)?,
        };
        eprintln!("written in {:.1} s", started.elapsed().as_secs_f64());
        config.model_name_or_path = files.model();
        config.dataset = files.dataset().into();
        config.output_dir = files.output_dir();
        config.max_steps += steps_besides as i64;
        let withheld = withhold(&config, &placement)?;
        return_freed_memory();
        Ok(Self {
            shape,
            placement,
            config,
            _files: files,
            withheld,
        })
    }

    /// Loads it; `watch` is told what is in memory.
    pub fn trainer(&self, watch: impl FnMut(Loaded)) -> anyhow::Result<Trainer> {
        let started = Instant::now();
        let trainer = Trainer::watched(self.config.clone(), &self.placement, watch)?;
        eprintln!("loaded in {:.1} s", started.elapsed().as_secs_f64());
        Ok(trainer)
    }

    /// What is taken of a device beside tensors.
    pub fn libraries_bytes(&self) -> Option<u64> {
        let beside = self.placement.runtime_memory()?.beside_tensors_bytes();
        let withheld = self.withheld.as_ref().map_or(0, |withheld| withheld.bytes);
        Some(beside.saturating_sub(withheld))
    }

    /// The name of the shape, or its sizes.
    pub fn shape_name(&self) -> String {
        let named = Shape::NAMED.iter().find(|(_, shape)| *shape == self.shape);
        let Shape {
            hidden_size,
            num_hidden_layers,
            ..
        } = self.shape;
        named.map_or_else(
            || format!("{num_hidden_layers} x {hidden_size}"),
            |(name, _)| name.to_string(),
        )
    }
}

/// Takes what is beyond the limit of a run away from it, so that the limit is the device's.
fn withhold(config: &TrainConfig, placement: &Placement) -> anyhow::Result<Option<Withheld>> {
    let (Some(limit), Some(memory)) = (config.vram_limit, placement.runtime_memory()) else {
        return Ok(None);
    };
    let Some(bytes) = memory.total_bytes.checked_sub(limit.0) else {
        bail!("--vram_limit: the device has {} bytes", memory.total_bytes);
    };
    let runtime = device::runtime(&placement.device).context("the device has no runtime")?;
    Ok(Some(Withheld {
        bytes,
        _memory: runtime.withhold(bytes)?,
    }))
}
