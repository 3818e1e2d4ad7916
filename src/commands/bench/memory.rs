//! `qlora bench memory`: what a run takes of memory, part by part, as planned and as measured.

use std::path::PathBuf;
use std::time::Instant;

use qlora::device::Placement;
use qlora::train::plan::{Item, Plan};
use qlora::train::{Loaded, Trainer};
use serde_json::json;

use super::sampler::{Sampler, Samples};
use super::synthetic_trainer::{Prepared, SyntheticArgs, training_flag};
use super::{machine, plot};
use crate::commands::{ConfigFlags, activations, on_the_host};

#[derive(Debug, clap::Args)]
#[command(mut_args = training_flag)]
pub struct Args {
    #[command(flatten)]
    model: SyntheticArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Draw the memory over a step
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    #[command(flatten)]
    flags: ConfigFlags,
}

/// A part of the memory that can be measured, with the items of the plan that it is made of.
struct Part {
    name: &'static str,
    items: &'static [Item],
    measured: Option<u64>,
}

impl Part {
    fn planned(&self, plan: &Plan) -> u64 {
        self.items.iter().map(|item| plan.peak.bytes(*item)).sum()
    }
}

const WEIGHTS: &[Item] = &[
    Item::Codes,
    Item::Scales,
    Item::Slots,
    Item::Vocabulary,
    Item::Vectors,
    Item::Dequantized,
];
const ADAPTERS: &[Item] = &[Item::Adapters, Item::Gradients];
const MOMENTS: &[Item] = &[Item::Moments];
const STEP: &[Item] = &[
    Item::Activations,
    Item::Working,
    Item::LossChunk,
    Item::Threads,
];
const PIECES: &[Item] = &[Item::Pieces];
const LIBRARIES: &[Item] = &[Item::Libraries];

pub fn run(args: Args) -> anyhow::Result<()> {
    let prepared = Prepared::new(&args.model, &args.flags, 0)?;
    let placement = &prepared.placement;
    let used = || placement.used_memory_bytes();
    let before = used();
    let mut loaded = Vec::new();
    let tell_memory = |_: &anyhow::Error| {
        if let Some(memory) = placement.runtime_memory() {
            eprintln!("when it failed: {memory:?}");
        }
    };
    let trainer = prepared.trainer(|what| loaded.push((what, used())));
    let mut trainer = trainer.inspect_err(tell_memory)?;
    let Steps {
        samples,
        peak,
        seconds,
        tokens,
    } = steps(&mut trainer, placement).inspect_err(tell_memory)?;
    let libraries = prepared.libraries_bytes();
    let in_pieces = placement.runtime_memory();
    let in_pieces = in_pieces.map(|memory| memory.peak_reserved_bytes - memory.peak_bytes);
    let over = |bytes: Option<u64>, from: Option<u64>| Some(bytes?.saturating_sub(from?));
    let after = |what: Loaded| {
        let found = loaded.iter().find(|(known, _)| *known == what);
        found.and_then(|(_, bytes)| *bytes)
    };
    let [weights, adapters, optimizer] =
        [Loaded::Weights, Loaded::Adapters, Loaded::Optimizer].map(after);
    let part = |name, items, measured| Part {
        name,
        items,
        measured,
    };
    let parts = [
        part("weights", WEIGHTS, over(weights, before)),
        part("adapters and gradients", ADAPTERS, over(adapters, weights)),
        part("optimizer moments", MOMENTS, over(optimizer, adapters)),
        part("a step", STEP, over(peak, optimizer)),
        part("memory in pieces", PIECES, in_pieces),
        part("CUDA and its libraries", LIBRARIES, libraries),
    ];
    let beside = in_pieces.unwrap_or(0) + libraries.unwrap_or(0);
    let all = over(peak, before).map(|bytes| bytes + beside);
    let plan = trainer.plan();
    if let Some(path) = &args.plot {
        plot::memory(path, &samples, before.unwrap_or(0))?;
    }
    if args.json {
        let config = trainer.config();
        let parts = parts.iter().map(|part| {
            json!({
                "part": part.name,
                "planned_bytes": part.planned(plan),
                "measured_bytes": part.measured,
            })
        });
        let report = json!({
            "bench": "memory",
            "shape_name": prepared.shape_name(),
            "max_seq_len": config.longest_sequence(),
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "lora_r": trainer.workload().largest_rank(),
            "optim": config.optim,
            "vram_limit": config.vram_limit.map(|limit| limit.0),
            "activations": activations(plan),
            "not_on_the_device": on_the_host(plan),
            "parts": parts.collect::<Vec<_>>(),
            "planned_bytes": plan.peak.total(),
            "measured_bytes": all,
            "host_bytes": plan.host.total(),
            "step_seconds": seconds,
            "tokens_per_step": tokens,
            "device": config.device,
            "compute_dtype": prepared.placement.compute_dtype,
            "machine": machine::describe(placement),
            "shape": prepared.shape,
        });
        outln!("{report}");
        return Ok(());
    }
    outln!("{:<28}{:>14}{:>14}", "", "planned", "measured");
    for part in &parts {
        if part.planned(plan) > 0 || part.measured.is_some_and(|bytes| bytes > 0) {
            print_row(part.name, part.planned(plan), part.measured);
        }
    }
    print_row("in all", plan.peak.total(), all);
    outln!("\nactivations: {}", activations(plan));
    if !placement.uses_kernels() {
        outln!(
            "zeros take memory from the first step on: moments and gradients are measured with it"
        );
    }
    on_the_host(plan).iter().for_each(|words| outln!("{words}"));
    Ok(())
}

fn print_row(name: &str, planned: u64, measured: Option<u64>) {
    let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    let measured_text = measured.map_or("unknown".into(), megabytes);
    let difference = measured.filter(|_| planned > 0).map(|measured| {
        let share = measured as f64 / planned as f64 - 1.0;
        format!("{:>+9.1} %", 100.0 * share)
    });
    outln!(
        "{name:<28}{:>14}{measured_text:>14}{}",
        megabytes(planned),
        difference.unwrap_or_default()
    );
}

struct Steps {
    /// Memory over the last step.
    samples: Samples,
    /// The most in any step; on the CPU, where that is sampled, the most in the last.
    peak: Option<u64>,
    seconds: Vec<f64>,
    /// Of one step.
    tokens: usize,
}

fn steps(trainer: &mut Trainer, placement: &Placement) -> anyhow::Result<Steps> {
    placement.reset_peak_memory()?;
    let (mut samples, mut seconds, mut tokens) = (Samples::new(), Vec::new(), 0);
    for _ in 0..trainer.total_steps() {
        let sampler = Sampler::start(placement);
        let started = Instant::now();
        let step = trainer.step();
        seconds.push(started.elapsed().as_secs_f64());
        samples = sampler.stop();
        tokens = step?.tokens;
    }
    let peak = match placement.runtime_memory() {
        Some(memory) => Some(memory.peak_bytes),
        None => samples.iter().map(|(_, bytes)| *bytes).max(),
    };
    Ok(Steps {
        samples,
        peak,
        seconds,
        tokens,
    })
}
