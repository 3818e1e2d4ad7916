//! bitsandbytes' 4-bit layout: the tensors that stand beside a packed weight and describe it.
//!
//! | name | type | content |
//! |---|---|---|
//! | `weight` | u8, or another type viewed on the same bytes (`quant_storage`) | packed codes |
//! | `weight.absmax` | u8 (double quantization) or f32 | a scale per block |
//! | `weight.quant_map` | f32 `[16]` | the values of the codes |
//! | `weight.nested_absmax` | f32 | the scales of the scales |
//! | `weight.nested_quant_map` | f32 `[256]` | the values of the scales' codes |
//! | `weight.quant_state.bitsandbytes__nf4` (`__fp4`) | u8 | JSON: types, shape, block sizes, offset |
//!
//! Source: `QuantState.as_dict(packed=True)` of bitsandbytes 0.50.2.

use std::path::Path;

use bytes::Bytes;
use candle_core::DType;
use safetensors::Dtype;
use serde::Deserialize;

use super::checkpoint::Checkpoint;
use super::mapped_file::MappedFile;
use super::mapping::aligned;
use super::safetensors_writer::TensorSpec;
use crate::quant::{
    Absmax, DoubleQuant, NESTED_BLOCK_SIZE, Params4bit, QuantType, QuantizeOptions, dynamic_map,
};
use crate::{Error, Result};

const STATE_NF4: &str = ".quant_state.bitsandbytes__nf4";
const STATE_FP4: &str = ".quant_state.bitsandbytes__fp4";

/// How far a stored code map may be from ours, relative: bitsandbytes' own has moved by an ulp between torch releases.
const MAP_TOLERANCE: f32 = 1e-6;

/// An offset that takes as many characters as one can.
const LONGEST_OFFSET: f64 = -1.234_567_890_123_456_7e-100;

#[derive(Deserialize)]
struct State {
    quant_type: QuantType,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// Whether `name` is the state of a 4-bit weight.
pub(super) fn is_state(name: &str) -> bool {
    name.ends_with(STATE_NF4) || name.ends_with(STATE_FP4)
}

fn state_suffix(quant_type: QuantType) -> &'static str {
    match quant_type {
        QuantType::Nf4 => STATE_NF4,
        QuantType::Fp4 => STATE_FP4,
    }
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
    let file = checkpoint.file(&state_name)?;
    let state = parse_state(file, &state_name)?;
    check_map(
        checkpoint,
        &format!("{name}.quant_map"),
        state.quant_type.code(),
    )?;
    let params = Params4bit {
        packed: checkpoint.file(name)?.bytes(name)?,
        absmax: read_absmax(checkpoint, name, &state, file.path())?,
        quant_type: state.quant_type,
        block_size: state.blocksize,
        dtype: parse_dtype(&state_name, &state.dtype)?,
        shape: state.shape,
    };
    params.validate(name)?;
    Ok(Some(params))
}

fn parse_state(file: &MappedFile, state_name: &str) -> Result<State> {
    let json = file.bytes(state_name)?;
    let state: State = serde_json::from_slice(&json).map_err(|error| {
        Error::malformed(
            file.path(),
            format!("tensor `{state_name}` is not a quantization state: {error}"),
        )
    })?;
    if state_name.ends_with(state_suffix(state.quant_type)) {
        Ok(state)
    } else {
        Err(Error::malformed(
            file.path(),
            format!(
                "tensor `{state_name}` says quant_type {:?}",
                state.quant_type
            ),
        ))
    }
}

fn read_absmax(checkpoint: &Checkpoint, name: &str, state: &State, path: &Path) -> Result<Absmax> {
    let absmax = format!("{name}.absmax");
    let nested = format!("{name}.nested_absmax");
    if !checkpoint.contains(&nested) {
        return Ok(Absmax::Single(aligned(
            bytes_of(checkpoint, &absmax, Dtype::F32)?,
            align_of::<f32>(),
        )));
    }
    let missing = |key: &str| {
        Error::malformed(
            path,
            format!("the quantization state of tensor `{name}` has no `{key}`"),
        )
    };
    if let Some(dtype) = state
        .nested_dtype
        .as_deref()
        .filter(|dtype| *dtype != "float32")
    {
        return Err(Error::TensorMismatch {
            tensor: nested,
            expected: "nested_dtype float32".into(),
            found: dtype.into(),
        });
    }
    check_map(
        checkpoint,
        &format!("{name}.nested_quant_map"),
        dynamic_map(),
    )?;
    Ok(Absmax::Double {
        codes: bytes_of(checkpoint, &absmax, Dtype::U8)?,
        nested_absmax: read_f32(checkpoint, &nested)?,
        nested_block_size: state
            .nested_blocksize
            .ok_or_else(|| missing("nested_blocksize"))?,
        offset: state
            .nested_offset
            .ok_or_else(|| missing("nested_offset"))? as f32,
    })
}

fn bytes_of(checkpoint: &Checkpoint, name: &str, expected: Dtype) -> Result<Bytes> {
    let file = checkpoint.file(name)?;
    let found = file.info(name)?.dtype;
    match found == expected {
        true => file.bytes(name),
        false => Err(Error::TensorMismatch {
            tensor: name.to_string(),
            expected: format!("{expected:?}"),
            found: format!("{found:?}"),
        }),
    }
}

fn read_f32(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>> {
    let bytes = bytes_of(checkpoint, name, Dtype::F32)?;
    let words = bytes.as_chunks::<4>().0.iter();
    Ok(words.map(|word| f32::from_le_bytes(*word)).collect())
}

fn check_map(checkpoint: &Checkpoint, name: &str, ours: &[f32]) -> Result<()> {
    let stored = read_f32(checkpoint, name)?;
    let is_close = |(a, b): (&f32, &f32)| (a - b).abs() <= MAP_TOLERANCE * b.abs();
    match stored.len() == ours.len() && stored.iter().zip(ours).all(is_close) {
        true => Ok(()),
        false => Err(Error::TensorMismatch {
            tensor: name.to_string(),
            expected: format!("bitsandbytes' {} code values", ours.len()),
            found: format!("{} values that differ", stored.len()),
        }),
    }
}

fn parse_dtype(state_name: &str, dtype: &str) -> Result<DType> {
    match dtype {
        "bfloat16" => Ok(DType::BF16),
        "float16" => Ok(DType::F16),
        "float32" => Ok(DType::F32),
        other => Err(Error::TensorMismatch {
            tensor: state_name.to_string(),
            expected: "dtype bfloat16, float16 or float32".into(),
            found: other.to_string(),
        }),
    }
}

/// bitsandbytes' name of a 4-bit type.
pub(super) fn quant_type_name(quant_type: QuantType) -> &'static str {
    match quant_type {
        QuantType::Nf4 => "nf4",
        QuantType::Fp4 => "fp4",
    }
}

/// torch's name of a type of weights.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

/// The tensors of a 4-bit weight and their bytes, in the order to write them; the JSON state is the last.
pub(super) fn tensors(name: &str, params: &Params4bit) -> Vec<(TensorSpec, Bytes)> {
    let floats = |values: &[f32]| Bytes::copy_from_slice(bytemuck::cast_slice(values));
    let map = floats(params.quant_type.code());
    let nested = match &params.absmax {
        Absmax::Single(_) => None,
        Absmax::Double {
            nested_block_size,
            offset,
            ..
        } => Some((*nested_block_size, f64::from(*offset))),
    };
    let state = state_json(
        params.quant_type,
        params.block_size,
        params.dtype,
        &params.shape,
        nested,
    );
    let data = match &params.absmax {
        Absmax::Single(absmax) => vec![
            absmax.clone(),
            map,
            params.packed.clone(),
            state.clone().into(),
        ],
        Absmax::Double {
            codes,
            nested_absmax,
            ..
        } => vec![
            floats(nested_absmax),
            floats(dynamic_map()),
            map,
            params.packed.clone(),
            codes.clone(),
            state.clone().into(),
        ],
    };
    specs(name, &params.shape, params.into(), state.len())
        .into_iter()
        .zip(data)
        .collect()
}

/// The tensors that a weight of this shape and type will have, none smaller than it turns out to be.
pub(super) fn planned(
    name: &str,
    shape: &[usize],
    dtype: DType,
    options: QuantizeOptions,
) -> Vec<TensorSpec> {
    let nested = match options.double_quant {
        DoubleQuant::No => None,
        DoubleQuant::Yes => Some((NESTED_BLOCK_SIZE, LONGEST_OFFSET)),
    };
    let state = state_json(options.quant_type, options.block_size, dtype, shape, nested);
    specs(name, shape, options, state.len())
}

fn specs(
    name: &str,
    shape: &[usize],
    options: QuantizeOptions,
    state_bytes: usize,
) -> Vec<TensorSpec> {
    let spec =
        |suffix: &str, dtype, shape| TensorSpec::new(format!("{name}{suffix}"), dtype, shape);
    let n: usize = shape.iter().product();
    let blocks = n.div_ceil(options.block_size);
    let map = spec(".quant_map", Dtype::F32, vec![16]);
    let packed = spec("", Dtype::U8, vec![n.div_ceil(2), 1]);
    let state = spec(
        state_suffix(options.quant_type),
        Dtype::U8,
        vec![state_bytes],
    );
    match options.double_quant {
        DoubleQuant::No => vec![
            spec(".absmax", Dtype::F32, vec![blocks]),
            map,
            packed,
            state,
        ],
        DoubleQuant::Yes => vec![
            spec(
                ".nested_absmax",
                Dtype::F32,
                vec![blocks.div_ceil(NESTED_BLOCK_SIZE)],
            ),
            spec(".nested_quant_map", Dtype::F32, vec![256]),
            map,
            packed,
            spec(".absmax", Dtype::U8, vec![blocks]),
            state,
        ],
    }
}

/// The state as Python's `json.dumps` writes it; `nested` is the nested block size and the offset.
fn state_json(
    quant_type: QuantType,
    block_size: usize,
    dtype: DType,
    shape: &[usize],
    nested: Option<(usize, f64)>,
) -> String {
    let nested = nested.map_or_else(String::new, |(nested_block_size, offset)| {
        format!(
            ", \"nested_blocksize\": {nested_block_size}, \"nested_dtype\": \"float32\", \"nested_offset\": {}",
            python_float(offset)
        )
    });
    format!(
        "{{\"quant_type\": \"{}\", \"blocksize\": {block_size}, \"dtype\": \"{}\", \"shape\": {shape:?}{nested}}}",
        quant_type_name(quant_type),
        dtype_name(dtype),
    )
}

/// Python's `repr` of a finite float: the fewest digits that read back, ties among those to even, and an exponent of two
/// digits below 1e-4 and from 1e16 on.
fn python_float(number: f64) -> String {
    let shortest = format!("{number:e}");
    let (digits, _) = shortest.split_once('e').unwrap_or((&shortest, ""));
    let precision = digits
        .split_once('.')
        .map_or(0, |(_, decimals)| decimals.len());
    // Rust's shortest form breaks ties upwards; with a given precision it rounds them to even, as Python does.
    let rounded = format!("{number:.precision$e}");
    let (digits, exponent) = rounded.split_once('e').unwrap_or((&rounded, "0"));
    if number == 0.0 || (1e-4..1e16).contains(&number.abs()) {
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let decimals = usize::try_from(precision as i32 - exponent)
            .unwrap_or(0)
            .max(1);
        return format!("{number:.decimals$}");
    }
    match exponent.strip_prefix('-') {
        Some(exponent) => format!("{digits}e-{exponent:0>2}"),
        None => format!("{digits}e+{exponent:0>2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (number, python) in [
            (0.13029225170612335, "0.13029225170612335"),
            (f64::from(0.232_181_55_f32), "0.23218154907226562"),
            (123.5, "123.5"),
            (0.0, "0.0"),
            (2.0, "2.0"),
            (0.0001, "0.0001"),
            (9.999999747378752e-05, "9.999999747378752e-05"),
            (1e-5, "1e-05"),
            (1e16, "1e+16"),
            (3.4028234663852886e38, "3.4028234663852886e+38"),
            (1.401298464324817e-45, "1.401298464324817e-45"),
        ] {
            assert_eq!(python_float(number), python);
        }
    }
}
