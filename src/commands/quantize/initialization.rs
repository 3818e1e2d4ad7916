//! `qlora quantize --init_lora_weights`: the 4-bit weights together with an adapter to start from.

use std::path::Path;

use anyhow::bail;
use qlora::device::{DeviceKind, Placement};
use qlora::model::{DecoderConfig, InitLoraWeights, InitializeOptions, InitializingQuantizer};
use qlora::store::AdapterConfig;
use qlora::train::TrainConfig;

use crate::commands::LoraFlags;
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

    #[command(flatten)]
    lora: LoraFlags,

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
        model: &DecoderConfig,
        source: &Path,
        destination: &Path,
    ) -> anyhow::Result<Option<InitializingQuantizer>> {
        let Some(method) = self.init_lora_weights else {
            return Ok(None);
        };
        let config = TrainConfig::load_partial(None, &self.lora.overrides)?;
        let adapter = AdapterConfig {
            base_model_name_or_path: Some(destination.display().to_string()),
            ..config.new_adapter_config()
        };
        model.expect_targets(&adapter)?;
        model.expect_patterns(&adapter)?;
        let options = InitializeOptions {
            method,
            adapter,
            quantization_iterations: self.quantization_iterations(method)?,
            seed: self.seed.unwrap_or(0),
            device: Placement::open(self.device.unwrap_or(DeviceKind::Cpu), None)?.device,
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
