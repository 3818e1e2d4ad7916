//! The subcommands, one file each, and what they share: config keys as flags, threads, errors on one line.

/// Writes to stdout, as `print!` does; if that fails, the program ends with an error instead of a panic.
macro_rules! out {
    ($($part:tt)*) => { $crate::commands::write_out(format_args!($($part)*)) };
}

/// The same with a line feed.
macro_rules! outln {
    ($($part:tt)*) => { out!("{}\n", format_args!($($part)*)) };
}

pub mod bench;
pub mod chat;
mod config_flags;
mod data_sources;
pub mod demo;
mod ensemble_args;
pub mod eval;
pub mod export;
pub mod generate;
mod hub;
pub mod inspect;
pub mod interrupt;
pub mod mapped_file_fault;
mod model_args;
mod models;
pub mod plan;
pub mod quantize;
mod sampling_args;
mod shape_args;
mod text_stream;
pub mod train;
pub mod verify;

pub use config_flags::{ConfigFlags, DataFlags, LoraFlags, RowFlags};
pub use ensemble_args::EnsembleArgs;
pub use model_args::ModelArgs;
pub use sampling_args::SamplingArgs;
pub use shape_args::ShapeArgs;

use std::io::Write;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use qlora::device::{ComputeDtype, Dequantized, DeviceKind, Placement, Residence, Residency, Side};
use qlora::train::plan::Plan;

/// The user stopped the run; what was done is saved. Ends with status 130.
#[derive(Debug, thiserror::Error)]
#[error("interrupted{0}")]
pub struct Interrupted(pub String);

/// An error and its causes on one line, without causes that the line already tells.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    line
}

/// What `out!` does.
pub fn write_out(text: std::fmt::Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        note(&format!("error: writing to stdout: {error}"));
        std::process::exit(1);
    }
}

/// A line on stderr, above the progress bar where one is shown.
pub fn log(bar: &ProgressBar, line: String) {
    bar.suspend(|| note(&line));
}

/// A bar on stderr that counts bytes, hidden where that is not a terminal.
fn byte_progress_bar() -> anyhow::Result<ProgressBar> {
    let template = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left  {msg}";
    let style = ProgressStyle::with_template(template).context("progress bar")?;
    Ok(ProgressBar::new(0).with_style(style))
}

/// A line on stderr, or nothing where nobody reads it any more.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Opens a device; says so where products in bf16 gain nothing there.
pub fn open(device: DeviceKind, compute_dtype: Option<ComputeDtype>) -> qlora::Result<Placement> {
    let placement = Placement::open(device, compute_dtype)?;
    let is_slow = !placement.uses_kernels()
        && placement.compute_dtype == ComputeDtype::Bf16
        && !qlora::ops::is_bf16_fast();
    if is_slow {
        note(
            "--compute_dtype bf16: this processor has neither AMX nor the AVX512-BF16 of AMD, f32 is faster",
        );
    }
    Ok(placement)
}

/// Lets a run go on when the reader of its output is gone (`qlora train 2>&1 | head`): what it makes are files.
pub fn outlive_closed_pipe() {
    #[cfg(unix)]
    // SAFETY: SIG_IGN is a valid disposition.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}

/// Lets a closed pipe end the program, as `head` expects, instead of an error.
pub fn die_quietly_on_closed_pipe() {
    #[cfg(unix)]
    // SAFETY: called first in `main`, before any thread or handler exists; SIG_DFL is a valid disposition.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Lets the allocator keep what is freed: a step takes and frees the same large buffers again and again, and pages that
/// go back to the system have to be faulted in and zeroed each time (6 % of a step on the CPU).
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: called first in `main`; mallopt only sets parameters, and a value it refuses changes nothing.
    unsafe {
        // The largest threshold glibc takes.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        // The heaps of other threads are given back as soon as they are empty, whatever the thresholds.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives freed memory back to the system after all: for a figure that is not to count it.
pub fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it only touches what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What a plan does with activations, in words.
pub fn activations(plan: &Plan) -> String {
    let all = plan.policies.len();
    let kept = match plan.kept_blocks() {
        0 => "recompute".to_string(),
        kept if kept == all => "keep".into(),
        kept => format!("keep in {kept} of {all} blocks"),
    };
    match plan.offloaded_blocks() {
        0 => kept,
        offloaded => format!("{kept}, {offloaded} of {all} inputs in host memory"),
    }
}

/// What a plan leaves on the host, in words; nothing where all is on the device.
pub fn on_the_host(plan: &Plan) -> Vec<&'static str> {
    let Residence {
        weights,
        dequantized,
        embedding,
        head,
        optimizer,
    } = plan.residence;
    let on_host = Some(Side::Host);
    [
        (weights != Residency::Resident, "weights are streamed"),
        (
            dequantized == Dequantized::Weight,
            "one weight is dequantized at a time",
        ),
        (embedding == on_host, "the embedding is in host memory"),
        (head == on_host, "the head is in host memory"),
        (optimizer == Side::Host, "optimizer moments are paged"),
    ]
    .into_iter()
    .filter_map(|(is_so, words)| is_so.then_some(words))
    .collect()
}

/// A number of threads, at least 1.
pub fn parse_threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads) if threads > 0 => Ok(threads),
        _ => Err("expected an integer of at least 1".to_string()),
    }
}

/// Runs `f` on one of the threads that share its work, as many as there are cores unless a number is given: an operation then
/// has one thread less to wake (2 % of a training step). The number is that of the whole program and can be given once.
pub fn on_threads(
    threads: Option<usize>,
    f: impl FnOnce() -> anyhow::Result<()> + Send,
) -> anyhow::Result<()> {
    if let Some(threads) = threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let built = pool.build_global();
        built.with_context(|| format!("cannot use {threads} threads"))?;
    }
    rayon::scope(|_| f())
}
