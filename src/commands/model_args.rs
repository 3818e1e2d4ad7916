//! The model that a command works with: `--model`, `--adapter`, `--quant-type`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use qlora::data::Tokenizer;
use qlora::device::{ComputeDtype, DeviceKind, Placement};
use qlora::model::Decoder;
use qlora::quant::{QuantType, QuantizeOptions};
use qlora::store::{Adapter, Checkpoint, INITIAL_ADAPTER, Initialization};

use super::models;

#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// Hugging Face model, its directory or its name on the hub: 4-bit, or bf16/f16/f32
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,

    /// PEFT adapter, its directory or its name on the hub
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// Quantize weights that are not in 4 bits yet, as training does, to nf4 or fp4; unset: as stored
    #[arg(long = "quant_type", alias = "quant-type", value_name = "TYPE", value_parser = parse_quant_type)]
    quant_type: Option<QuantType>,

    /// cpu or cuda
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = parse_device)]
    device: DeviceKind,

    /// What products take their factors in: f32 (unset) or bf16 on the CPU, bf16 on CUDA
    #[arg(long = "compute_dtype", alias = "compute-dtype", value_name = "NAME", value_parser = parse_dtype)]
    compute_dtype: Option<ComputeDtype>,
}

impl ModelArgs {
    /// Puts directories in the place of names on the hub.
    pub fn find(&mut self) -> anyhow::Result<()> {
        models::find(&mut self.model, &mut self.adapter)
    }

    /// The model with its adapter, if one is given.
    pub fn load(&self) -> anyhow::Result<Decoder> {
        let placement = super::open(self.device, self.compute_dtype)?;
        let checkpoint = Checkpoint::open(&self.model)?;
        match &self.adapter {
            Some(adapter) => {
                Initialization::expect_base(adapter, &self.model)?;
                note_as_stored(&checkpoint, self.quant_type);
            }
            None => note_missing_adapter(&self.model),
        }
        let mut decoder = Decoder::load(&checkpoint, self.quantization(), &placement)?;
        if let Some(dir) = &self.adapter {
            decoder
                .load_adapter(&Adapter::read(dir)?)
                .with_context(|| format!("{}: does not fit the model", dir.display()))?;
        }
        Ok(decoder)
    }

    /// The model without an adapter.
    pub fn load_base(&self, placement: &Placement) -> anyhow::Result<Decoder> {
        let checkpoint = Checkpoint::open(&self.model)?;
        Ok(Decoder::load(&checkpoint, self.quantization(), placement)?)
    }

    /// How the model is quantized on load, if it is.
    pub fn quantization(&self) -> Option<QuantizeOptions> {
        quantization(self.quant_type)
    }

    /// The model's tokenizer; `None` if there is none, which is enough for rows of token ids.
    pub fn tokenizer(&self) -> anyhow::Result<Option<Tokenizer>> {
        Ok(Tokenizer::find(&self.model)?)
    }
}

/// How training quantizes weights that are not in 4 bits yet.
pub fn quantization(quant_type: Option<QuantType>) -> Option<QuantizeOptions> {
    quant_type.map(|quant_type| QuantizeOptions {
        quant_type,
        ..QuantizeOptions::default()
    })
}

/// Says where the weights below an adapter are not those that it was trained on.
pub fn note_as_stored(checkpoint: &Checkpoint, quant_type: Option<QuantType>) {
    if quant_type.is_none() && !checkpoint.is_quantized() {
        super::note(&format!(
            "{}: not in 4 bits and used as stored; --quant_type nf4 takes it as training does",
            checkpoint.dir().display()
        ));
    }
}

/// Says where a model is used without the adapter that it was made together with.
pub fn note_missing_adapter(model: &Path) {
    let initial = model.join(INITIAL_ADAPTER);
    if initial.is_dir() {
        super::note(&format!(
            "{}: was made together with an adapter and is used without one; --adapter takes {} or what was trained from it",
            model.display(),
            initial.display()
        ));
    }
}

pub fn parse_quant_type(text: &str) -> Result<QuantType, String> {
    match text.to_ascii_lowercase().as_str() {
        "nf4" => Ok(QuantType::Nf4),
        "fp4" => Ok(QuantType::Fp4),
        _ => Err("expected nf4 or fp4".to_string()),
    }
}

/// A type by the names that the configuration has for it.
pub fn parse_dtype(text: &str) -> Result<ComputeDtype, String> {
    let named = serde_json::from_value(text.into());
    named.map_err(|_| "expected f32 or bf16".to_string())
}

/// A device by the name that the configuration has for it.
pub fn parse_device(text: &str) -> Result<DeviceKind, String> {
    DeviceKind::named(text).ok_or_else(|| "expected cpu or cuda".to_string())
}
