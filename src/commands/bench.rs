//! `qlora bench`: how fast this machine trains, measured on synthetic weights.

mod kernels;

use std::time::Instant;

use anyhow::{Context, bail};
use qlora::device::{Placement, anonymous_memory_bytes};
use qlora::train::{Shape, SyntheticRun, TrainConfig, Trainer};
use serde_json::json;

use super::{ConfigFlags, ShapeArgs};

/// Steps before the ones that count.
const WARM_UP_STEPS: usize = 1;

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
        "Optimizer steps that count, after one to warm up",
    ),
    ("max_seq_len", "256", "Length of every sequence, in tokens"),
];

/// Keys of `qlora train` that a benchmark cannot do as asked: it makes its own model and rows.
const REFUSED: [&str; 12] = [
    "model_name_or_path",
    "adapter",
    "dataset",
    "dataset_weights",
    "dataset_format",
    "dataset_columns",
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

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// Tokens per second and memory of optimizer steps at full length
    Speed(Box<SpeedArgs>),
    /// The rate of each operation, as a share of what the device can copy and multiply
    Kernels(kernels::Args),
}

#[derive(Debug, clap::Args)]
#[command(mut_args = training_flag)]
struct SpeedArgs {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    flags: ConfigFlags,
}

/// A training flag as a benchmark has it.
fn training_flag(flag: clap::Arg) -> clap::Arg {
    let id = flag.get_id().to_string();
    if let Some((_, value, help)) = DEFAULTS.iter().find(|(key, ..)| *key == id) {
        return flag.help(format!("{help} [default: {value}]"));
    }
    let hide = REFUSED.iter().chain(&WITHOUT_EFFECT).any(|key| *key == id);
    if hide { flag.hide(true) } else { flag }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    match args.bench {
        Bench::Speed(args) => speed(*args),
        Bench::Kernels(args) => kernels::run(args),
    }
}

fn speed(args: SpeedArgs) -> anyhow::Result<()> {
    let shape = args.shape.shape(Shape::LLAMA_110M);
    let mut overrides = args.flags.overrides.clone();
    let given = |key: &str| args.flags.overrides.iter().any(|(name, _)| name == key);
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
    if let Some(threads) = config.threads {
        super::use_threads(threads)?;
    }
    let placement = Placement::open(config.device)?;
    let Ok(counted) = usize::try_from(config.max_steps) else {
        bail!("a benchmark needs --max_steps of at least 1");
    };
    let rows = config.per_device_train_batch_size * config.gradient_accumulation_steps;
    eprintln!(
        "writing a synthetic model: {}",
        serde_json::to_string(&shape)?
    );
    let synthetic = SyntheticRun::create(
        &shape,
        rows,
        config.longest_sequence(),
        config.quantize_options(),
    )?;
    config.model_name_or_path = synthetic.model();
    config.dataset = synthetic.dataset().into();
    config.output_dir = synthetic.output_dir();
    config.max_steps = (WARM_UP_STEPS + counted) as i64;

    let mut trainer = Trainer::new(config, &placement)?;
    placement.reset_peak_memory()?;
    let mut step_seconds = Vec::with_capacity(counted);
    let mut tokens = 0;
    for step in 0..WARM_UP_STEPS + counted {
        let started = Instant::now();
        tokens = trainer.step()?.tokens;
        let seconds = started.elapsed().as_secs_f64();
        eprintln!("step {}: {seconds:.3} s", step + 1);
        if step >= WARM_UP_STEPS {
            step_seconds.push(seconds);
        }
    }
    let median = median(&step_seconds).context("no step was counted")?;
    let tokens_per_second = tokens as f64 / median;
    let policy = super::activations(trainer.plan());
    if args.json {
        let report = json!({
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
            "tokens_per_step": tokens,
            "peak_memory_bytes": placement.peak_memory_bytes(),
            "anonymous_memory_bytes": anonymous_memory_bytes(),
            "activations": policy,
            "threads": rayon::current_num_threads(),
            "device": trainer.config().device,
            "shape": shape,
            "version": env!("CARGO_PKG_VERSION"),
        });
        println!("{report}");
    } else {
        let peak = placement
            .peak_memory_bytes()
            .map_or("unknown".into(), |bytes| {
                format!("{:.2} GB", bytes as f64 / 1e9)
            });
        println!(
            "{tokens_per_second:.1} tokens/s (median of {counted} steps of {tokens} tokens), peak memory {peak}, activations: {policy}, {} threads",
            rayon::current_num_threads()
        );
    }
    Ok(())
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}
