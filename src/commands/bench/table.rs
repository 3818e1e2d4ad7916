//! `qlora bench table`: results as a table for people.

use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What `qlora bench speed --json` and `qlora bench memory --json` printed
    #[arg(required = true, value_name = "FILE.json")]
    results: Vec<PathBuf>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    for path in &args.results {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let result: Value =
            serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        lines.push(row(&result).with_context(|| {
            format!(
                "{}: not a result of `bench speed` or `bench memory`",
                path.display()
            )
        })?);
    }
    outln!(
        "| model | batch | r | activations | tokens/s | of the floor | memory | planned | machine, commit |"
    );
    outln!("|---|---|---|---|---|---|---|---|---|");
    lines.iter().for_each(|line| outln!("{line}"));
    Ok(())
}

fn row(result: &Value) -> Option<String> {
    let text = |value: &Value| value.as_str().map(String::from);
    let gigabytes = |value: &Value| match value.as_f64() {
        Some(bytes) => format!("{:.2} GB", bytes / 1e9),
        None => "unknown".into(),
    };
    let machine = &result["machine"];
    let limit = &result["vram_limit"];
    let within = match limit.is_null() {
        true => String::new(),
        false => format!("within {}", gigabytes(limit)),
    };
    let (speed, share, memory, planned) = match result["bench"].as_str()? {
        "speed" => (
            format!("{:.0}", result["tokens_per_second"].as_f64()?),
            format!(
                "{:.0} %",
                100.0 * result["share_of_compute_floor"].as_f64()?
            ),
            gigabytes(&result["peak_memory_bytes"]),
            within,
        ),
        "memory" => (
            speed_of_last_step(result).unwrap_or_default(),
            String::new(),
            gigabytes(&result["measured_bytes"]),
            format!("{} {within}", gigabytes(&result["planned_bytes"]))
                .trim_end()
                .to_string(),
        ),
        _ => return None,
    };
    let micro_batches = match result["gradient_accumulation_steps"].as_u64() {
        Some(n) if n > 1 => format!(", {n} micro-batches"),
        _ => String::new(),
    };
    let dropout = match result["lora_dropout"].as_f64() {
        Some(p) if p > 0.0 => format!(", dropout {p}"),
        _ => String::new(),
    };
    let mut activations = text(&result["activations"])?;
    // On a GPU they always are.
    if result["device"] == "cpu" && result["compute_dtype"] == "bf16" {
        activations += "; products in bf16";
    }
    for elsewhere in result["not_on_the_device"].as_array()? {
        activations = format!("{activations}; {}", text(elsewhere)?);
    }
    Some(format!(
        "| {} | {} x {}{micro_batches} | {}{dropout} | {activations} | {speed} | {share} | {memory} | {planned} | {}, {} threads, {} |",
        text(&result["shape_name"])?,
        result["per_device_train_batch_size"].as_u64()?,
        result["max_seq_len"].as_u64()?,
        result["lora_r"].as_u64()?,
        text(&machine["device"])?,
        machine["threads"].as_u64()?,
        machine["commit"].as_str().unwrap_or("commit unknown"),
    ))
}

/// Of a result of `bench memory`, whose first step does what no other has to.
fn speed_of_last_step(result: &Value) -> Option<String> {
    let [_, .., last] = result["step_seconds"].as_array()?.as_slice() else {
        return None;
    };
    let speed = result["tokens_per_step"].as_f64()? / last.as_f64()?;
    Some(format!("{speed:.0}"))
}
