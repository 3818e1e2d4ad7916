//! `qlora train`: a config file and flags to a run directory with an adapter.

use std::path::PathBuf;

use qlora::train::TrainConfig;

use super::ConfigFlags;

/// The arguments of `qlora train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Config file: TOML, YAML or JSON with the keys below; flags win over it
    config: Option<PathBuf>,

    #[command(flatten)]
    flags: ConfigFlags,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let config = TrainConfig::load(args.config.as_deref(), &args.flags.overrides)?;
    if let Some(threads) = config.threads {
        super::use_threads(threads)?;
    }
    let _stop = super::interrupt::watch();
    let _device = qlora::device::open(config.device)?;
    anyhow::bail!("the trainer is not part of this build")
}
