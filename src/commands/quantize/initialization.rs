//! `qlora quantize --init_lora_weights`: the 4-bit weights together with an adapter to start from.

use std::path::Path;

use anyhow::bail;
use qlora::device::{DeviceKind, Placement};
use qlora::model::{InitLoraWeights, InitializeOptions, InitializingQuantizer};
use qlora::store::{AdapterConfig, TargetModules};

use crate::commands::model_args::parse_device;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Initialization")]
pub struct InitArgs {
    /// Make the weights together with an adapter, DST/initial_adapter, as PEFT has it: pissa, pissa_niter_N, loftq or
    /// olora
    #[arg(
        long = "init_lora_weights",
        alias = "init-lora-weights",
        value_name = "NAME"
    )]
    init_lora_weights: Option<InitLoraWeights>,

    /// Its rank [default: 64]
    #[arg(
        long = "lora_r",
        alias = "lora-r",
        value_name = "N",
        requires = "init_lora_weights"
    )]
    lora_r: Option<usize>,

    /// Its lora_alpha; it is scaled by lora_alpha / lora_r [default: 16]
    #[arg(
        long = "lora_alpha",
        alias = "lora-alpha",
        value_name = "X",
        requires = "init_lora_weights"
    )]
    lora_alpha: Option<f64>,

    /// Scale it by lora_alpha / sqrt(lora_r)
    #[arg(
        long = "use_rslora",
        alias = "use-rslora",
        requires = "init_lora_weights"
    )]
    use_rslora: bool,

    /// all-linear, a module name, a list of them, or a regex that matches whole module paths [default: all-linear]
    #[arg(long = "lora_target_modules", alias = "lora-target-modules", value_name = "NAMES", value_parser = TargetModules::parse, requires = "init_lora_weights")]
    lora_target_modules: Option<TargetModules>,

    /// How many times loftq quantizes, 1 to 5 [default: 1]
    #[arg(
        long = "loftq_iter",
        alias = "loftq-iter",
        value_name = "N",
        requires = "init_lora_weights"
    )]
    loftq_iter: Option<usize>,

    /// How many times pissa quantizes, 1 to 5: QPiSSA's T [default: 1]
    #[arg(
        long = "qpissa_iter",
        alias = "qpissa-iter",
        value_name = "N",
        requires = "init_lora_weights"
    )]
    qpissa_iter: Option<usize>,

    /// Seed of the random subspace that the largest singular values are looked for in [default: 0]
    #[arg(long, value_name = "N", requires = "init_lora_weights")]
    seed: Option<u64>,

    /// Where its products are made: cpu or cuda [default: cpu]
    #[arg(long, value_name = "NAME", value_parser = parse_device, requires = "init_lora_weights")]
    device: Option<DeviceKind>,
}

impl InitArgs {
    /// What makes the weights of `source` and the adapter, if that is asked for.
    pub fn quantizer(
        &self,
        source: &Path,
        destination: &Path,
    ) -> anyhow::Result<Option<InitializingQuantizer>> {
        let Some(method) = self.init_lora_weights else {
            return Ok(None);
        };
        let r = self.lora_r.unwrap_or(64);
        let lora_alpha = self.lora_alpha.unwrap_or(16.0);
        if r == 0 {
            bail!("--lora_r must be at least 1");
        }
        if !(lora_alpha > 0.0 && lora_alpha.is_finite()) {
            bail!("--lora_alpha must be greater than 0");
        }
        let adapter = AdapterConfig {
            base_model_name_or_path: Some(destination.display().to_string()),
            revision: None,
            r,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules: self
                .lora_target_modules
                .clone()
                .unwrap_or(TargetModules::AllLinear),
            use_rslora: self.use_rslora,
            ..AdapterConfig::default()
        };
        let options = InitializeOptions {
            method,
            adapter,
            quantization_iterations: self.quantization_iterations(method)?,
            seed: self.seed.unwrap_or(0),
            device: Placement::open(self.device.unwrap_or(DeviceKind::Cpu))?.device,
            original_model: source.to_path_buf(),
            initialized_base: destination.to_path_buf(),
        };
        Ok(Some(InitializingQuantizer::new(options)?))
    }

    fn quantization_iterations(&self, method: InitLoraWeights) -> anyhow::Result<usize> {
        let is_loftq = method == InitLoraWeights::Loftq;
        for (flag, value, applies) in [
            ("loftq_iter", self.loftq_iter, is_loftq),
            ("qpissa_iter", self.qpissa_iter, method.is_pissa()),
        ] {
            if value.is_some() && !applies {
                bail!("--{flag} says nothing about --init_lora_weights {method}");
            }
        }
        Ok(self.loftq_iter.or(self.qpissa_iter).unwrap_or(1))
    }
}
