//! `qlora bench speed`: the rate of whole optimizer steps, against what the device can multiply.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use qlora::device::anonymous_memory_bytes;
use serde_json::json;

use super::synthetic_trainer::{Prepared, SyntheticArgs, training_flag};
use super::{kernels, machine, plot, split};
use crate::commands::{ConfigFlags, activations, on_the_host};

/// Steps before the ones that count.
const WARM_UP_STEPS: usize = 1;
/// Steps after them, for where the time goes.
const SPLIT_STEPS: usize = 1;

#[derive(Debug, clap::Args)]
#[command(mut_args = training_flag)]
pub struct Args {
    #[command(flatten)]
    model: SyntheticArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Draw where the time goes
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    #[command(flatten)]
    flags: ConfigFlags,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let prepared = Prepared::new(&args.model, &args.flags, WARM_UP_STEPS + SPLIT_STEPS)?;
    let placement = &prepared.placement;
    let mut trainer = prepared.trainer(|_| ())?;
    let counted = trainer.total_steps() - WARM_UP_STEPS - SPLIT_STEPS;
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
    let peak_memory_bytes = placement.peak_memory_bytes();
    let anonymous_memory_bytes = anonymous_memory_bytes();
    let split = split::of_step(&mut trainer, placement)?;
    let median = median(&step_seconds).context("no step was counted")?;
    let tokens_per_second = tokens as f64 / median;
    let plan = trainer.plan();
    let (workload, config) = (trainer.workload(), trainer.config());
    let flops = workload.flops(plan.kept_blocks()) * workload.micro_batches as f64;
    let limit = kernels::product_rate(placement, workload.rows, prepared.shape.hidden_size)?;
    let share = flops / median / limit;
    if let Some(path) = &args.plot {
        plot::split(path, &split)?;
    }
    if args.json {
        let report = json!({
            "bench": "speed",
            "shape_name": prepared.shape_name(),
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
            "tokens_per_step": tokens,
            "max_seq_len": config.longest_sequence(),
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "lora_r": trainer.workload().largest_rank(),
            "lora_dropout": config.lora_dropout.unwrap_or(0.0),
            "optim": config.optim,
            "vram_limit": config.vram_limit.map(|limit| limit.0),
            "peak_memory_bytes": peak_memory_bytes,
            "anonymous_memory_bytes": anonymous_memory_bytes,
            "activations": activations(plan),
            "not_on_the_device": on_the_host(plan),
            "flops_per_step": flops,
            "product_flops_per_second": limit,
            "share_of_compute_floor": share,
            "split_seconds": serde_json::Map::from_iter(
                split.iter().map(|(part, seconds)| (part.clone(), (*seconds).into()))
            ),
            "threads": rayon::current_num_threads(),
            "device": config.device,
            "compute_dtype": placement.compute_dtype,
            "machine": machine::describe(placement),
            "shape": prepared.shape,
            "version": env!("CARGO_PKG_VERSION"),
        });
        outln!("{report}");
        return Ok(());
    }
    let gigabytes = |bytes: Option<u64>| match bytes {
        Some(bytes) => format!("{:.2} GB", bytes as f64 / 1e9),
        None => "unknown".into(),
    };
    outln!(
        "{tokens_per_second:.1} tokens/s (median of {counted} steps of {tokens} tokens), peak memory {}, activations: {}, {} threads",
        gigabytes(peak_memory_bytes),
        activations(plan),
        rayon::current_num_threads()
    );
    outln!(
        "{:.3} TFLOP/s, {:.0} % of the {:.3} that a product of this width reaches",
        flops / median / 1e12,
        100.0 * share,
        limit / 1e12
    );
    let all: f64 = split.iter().map(|(_, seconds)| seconds).sum();
    for (part, seconds) in &split {
        outln!("{part:<30}{seconds:>9.3} s{:>6.1} %", 100.0 * seconds / all);
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
