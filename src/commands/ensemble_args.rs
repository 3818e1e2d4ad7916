//! Where the masks of an ensemble come from: the file beside the adapter, or flags.

use std::path::Path;

use anyhow::{Context, bail};
use qlora::infer::Ensemble;
use qlora::store::MatrixDropoutSettings;

#[derive(Debug, clap::Args)]
pub struct EnsembleArgs {
    /// Probability that the ensemble drops a feature; unset: that of training, from the file beside the adapter
    #[arg(
        long = "lora_matrix_dropout",
        alias = "lora-matrix-dropout",
        value_name = "P",
        requires = "ensemble"
    )]
    lora_matrix_dropout: Option<f64>,

    /// Seed of the ensemble's masks; unset: that of training, or 0
    #[arg(
        long = "ensemble_seed",
        alias = "ensemble-seed",
        value_name = "S",
        requires = "ensemble"
    )]
    ensemble_seed: Option<u64>,
}

impl EnsembleArgs {
    /// The ensemble of `models` models that `adapter` makes.
    pub fn ensemble(&self, adapter: Option<&Path>, models: usize) -> anyhow::Result<Ensemble> {
        let adapter = adapter.context("--ensemble: masks an adapter; give --adapter")?;
        let settings = MatrixDropoutSettings::read(adapter)?;
        let p = self
            .lora_matrix_dropout
            .or(settings.map(|settings| settings.p));
        let Some(p) = p else {
            bail!(
                "{}: was not trained with lora_matrix_dropout (there is no lora_matrix_dropout.json), so there is nothing to make an ensemble of; --lora_matrix_dropout P masks it all the same",
                adapter.display()
            );
        };
        let seed = self
            .ensemble_seed
            .or(settings.map(|settings| settings.seed));
        Ok(Ensemble::new(p, seed.unwrap_or(0), models)?)
    }
}
