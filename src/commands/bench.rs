//! `qlora bench`: how fast this machine trains and in how much memory, measured on synthetic weights.

mod kernels;
mod machine;
mod memory;
mod plot;
mod sampler;
mod speed;
mod split;
mod synthetic_trainer;
mod table;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// Tokens per second of optimizer steps at full length, and where their time goes
    Speed(Box<speed::Args>),
    /// Memory of an optimizer step, part by part: planned and measured
    Memory(Box<memory::Args>),
    /// The rate of each operation, as a share of what the device can copy and multiply
    Kernels(kernels::Args),
    /// Results of speed and memory, as a table in Markdown
    Table(table::Args),
}

pub fn run(args: Args) -> anyhow::Result<()> {
    match args.bench {
        Bench::Speed(args) => speed::run(*args),
        Bench::Memory(args) => memory::run(*args),
        Bench::Kernels(args) => kernels::run(args),
        Bench::Table(args) => table::run(&args),
    }
}
