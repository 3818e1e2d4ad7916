//! The `qlora` command: arguments to a subcommand, its error to an exit status.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use commands::{Interrupted, on_threads};

/// 4-bit QLoRA fine-tuning, in the file formats of transformers, PEFT and bitsandbytes.
#[derive(Debug, Parser)]
#[command(name = "qlora", version, max_term_width = 120)]
struct Cli {
    /// CPU threads; all cores if not given
    #[arg(long, global = true, value_name = "N", value_parser = commands::parse_threads)]
    threads: Option<usize>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Try it: quantize, train, question and export a small model that comes with the program
    Demo(commands::demo::Args),
    Quantize(commands::quantize::Args),
    /// Fine-tune: train a LoRA adapter on a 4-bit model
    Train(commands::train::Args),
    /// Say what a training run takes of a GPU's memory, and whether it fits, before it starts
    Plan(Box<commands::plan::Args>),
    /// Measure how well a model predicts the rows of a data file, or answers the questions of MMLU
    Eval(commands::eval::Args),
    /// Write text from a prompt
    Generate(commands::generate::Args),
    /// Talk to a model through its chat template
    Chat(commands::chat::Args),
    Export(commands::export::Args),
    /// Show what is in a data file, a model, an adapter or a GGUF file
    Inspect(commands::inspect::Args),
    /// Hold what a run or an export left against what it does now
    Verify(commands::verify::Args),
    /// Measure speed and memory on synthetic weights
    Bench(commands::bench::Args),
}

fn main() -> ExitCode {
    commands::die_quietly_on_closed_pipe();
    commands::keep_freed_memory();
    commands::mapped_file_fault::explain();
    // clap prints its own errors and ends with status 2.
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", commands::one_line(&error));
            ExitCode::from(if error.is::<Interrupted>() { 130 } else { 1 })
        }
    }
}

fn run(Cli { threads, command }: Cli) -> anyhow::Result<()> {
    match command {
        Command::Quantize(args) => on_threads(threads, || commands::quantize::run(args)),
        Command::Demo(args) => on_threads(threads, || commands::demo::run(args)),
        Command::Plan(args) => on_threads(threads, || commands::plan::run(*args)),
        Command::Eval(args) => on_threads(threads, || commands::eval::run(args)),
        Command::Generate(args) => on_threads(threads, || commands::generate::run(args)),
        Command::Chat(args) => on_threads(threads, || commands::chat::run(args)),
        Command::Export(args) => on_threads(threads, || commands::export::run(args)),
        Command::Inspect(args) => on_threads(threads, || commands::inspect::run(args)),
        Command::Bench(args) => on_threads(threads, || commands::bench::run(args)),
        // The configuration of a run may say how many threads; `threads` is among the flags of it.
        Command::Train(args) => commands::train::run(args),
        Command::Verify(args) => commands::verify::run(args, threads),
    }
}
