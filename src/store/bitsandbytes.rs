//! bitsandbytes' 4-bit layout: the tensors that stand beside a packed weight and describe it.
//!
//! | name | type | content |
//! |---|---|---|
//! | `weight` | u8, or any type viewed on the same bytes (`quant_storage`) | packed codes |
//! | `weight.absmax` | u8 (double quantization) or f32 | a scale per block |
//! | `weight.quant_map` | f32 `[16]` | the values of the codes |
//! | `weight.nested_absmax`, `weight.nested_quant_map` | f32, f32 `[256]` | the scales of the scales, the values of their codes |
//! | `weight.quant_state.bitsandbytes__nf4` (`__fp4`) | u8 | JSON: types, shape, block sizes, offset |
//!
//! Source: `QuantState.as_dict(packed=True)` of bitsandbytes 0.50.2.

use candle_core::DType;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::checkpoint::Checkpoint;
use super::mapped_file::aligned;
use crate::quant::{Absmax, Params4bit, QuantType};
use crate::{Error, Result};

const STATE_NF4: &str = ".quant_state.bitsandbytes__nf4";
const STATE_FP4: &str = ".quant_state.bitsandbytes__fp4";

/// The JSON state, in the order bitsandbytes writes it.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    quant_type: QuantType,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    #[serde(flatten)]
    nested: Option<NestedState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct NestedState {
    nested_blocksize: usize,
    nested_dtype: String,
    nested_offset: f64,
}

/// The weight that `name` is the state of, if it is one.
pub(super) fn weight_of_state(name: &str) -> Option<&str> {
    name.strip_suffix(STATE_NF4)
        .or_else(|| name.strip_suffix(STATE_FP4))
}

/// The 4-bit weight `name`, or `None` if no state stands beside it.
pub(super) fn read(checkpoint: &Checkpoint, name: &str) -> Result<Option<Params4bit>> {
    let state_name = [STATE_NF4, STATE_FP4]
        .map(|suffix| format!("{name}{suffix}"))
        .into_iter()
        .find(|state| checkpoint.contains(state));
    let Some(state_name) = state_name else {
        return Ok(None);
    };
    let _ = (state_name, aligned, DType::F32, Dtype::F32);
    let _ = |a: Absmax| a;
    Err(Error::malformed(checkpoint.dir(), "not yet"))
}
