//! The bitsandbytes 4-bit layout: every form of a weight is read, and a weight whose parts do not fit is refused by name.

mod weight_files;

use std::collections::BTreeMap;

use candle_core::DType;
use qlora::quant::{Absmax, FrozenWeight, NF4_CODE, Params4bit, QuantType, dynamic_map};
use qlora::store::Checkpoint;
use safetensors::Dtype;
use serde_json::json;

use weight_files::{Tensor, assert_says, f32s, model_with};

/// The tensors of a 4-bit weight of 5 x 30 elements, with double quantization.
fn packed_weight() -> BTreeMap<&'static str, Tensor<'static>> {
    let state = json!({
        "nested_offset": 0.1, "shape": [5, 30], "nested_blocksize": 256, "dtype": "bfloat16",
        "blocksize": 64, "nested_dtype": "float32", "quant_type": "nf4",
    });
    let state = state.to_string().into_bytes();
    BTreeMap::from([
        ("w", ("w", Dtype::U8, vec![75, 1], (0..75).collect())),
        (
            "absmax",
            ("w.absmax", Dtype::U8, vec![3], vec![1, 128, 255]),
        ),
        (
            "map",
            ("w.quant_map", Dtype::F32, vec![16], f32s(&NF4_CODE)),
        ),
        (
            "nested",
            ("w.nested_absmax", Dtype::F32, vec![1], f32s(&[0.5])),
        ),
        (
            "nested_map",
            (
                "w.nested_quant_map",
                Dtype::F32,
                vec![256],
                f32s(dynamic_map()),
            ),
        ),
        (
            "state",
            (
                "w.quant_state.bitsandbytes__nf4",
                Dtype::U8,
                vec![state.len()],
                state,
            ),
        ),
    ])
}

fn read_packed(tensors: BTreeMap<&str, Tensor>) -> qlora::Result<Params4bit> {
    let tensors: Vec<Tensor> = tensors.into_values().collect();
    let dir = model_with(&tensors);
    let checkpoint = Checkpoint::open(dir.path())?;
    assert_eq!(
        checkpoint.is_quantized(),
        checkpoint.names().any(|name| name.contains("quant_state"))
    );
    match checkpoint.weight("w")? {
        FrozenWeight::Quantized(params) => Ok(params),
        FrozenWeight::Dense(_) => panic!("read as a dense weight"),
    }
}

#[test]
fn a_state_is_read_in_any_key_order() {
    let params = read_packed(packed_weight()).unwrap();
    assert_eq!(
        (params.quant_type, params.block_size, params.dtype),
        (QuantType::Nf4, 64, DType::BF16)
    );
    assert_eq!(
        (&params.shape[..], params.packed),
        (&[5, 30][..], (0..75).collect::<Vec<u8>>().into())
    );
    let Absmax::Double {
        codes,
        nested_absmax,
        nested_block_size,
        offset,
    } = params.absmax
    else {
        panic!("read without double quantization");
    };
    assert_eq!(
        (&codes[..], &nested_absmax[..]),
        (&[1, 128, 255][..], &[0.5][..])
    );
    assert_eq!((nested_block_size, offset), (256, 0.1));
}

#[test]
fn a_state_without_double_quantization_is_read() {
    let mut tensors = packed_weight();
    let state =
        br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [5, 30]}"#.to_vec();
    tensors.insert(
        "state",
        (
            "w.quant_state.bitsandbytes__nf4",
            Dtype::U8,
            vec![state.len()],
            state,
        ),
    );
    tensors.insert(
        "absmax",
        ("w.absmax", Dtype::F32, vec![3], f32s(&[1.0, 2.0, 3.0])),
    );
    tensors.remove("nested");
    tensors.remove("nested_map");
    let Absmax::Single(absmax) = read_packed(tensors).unwrap().absmax else {
        panic!("read with double quantization");
    };
    assert_eq!(absmax, f32s(&[1.0, 2.0, 3.0]));
}

#[test]
fn codes_stored_as_another_type_are_the_same_bytes() {
    let codes: Vec<u8> = (0..64).collect();
    let state = br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}"#;
    for (dtype, rows) in [
        (Dtype::U8, 64),
        (Dtype::BF16, 32),
        (Dtype::F16, 32),
        (Dtype::F32, 16),
    ] {
        let mut tensors = packed_weight();
        tensors.insert("w", ("w", dtype, vec![rows, 1], codes.clone()));
        tensors.insert("absmax", ("w.absmax", Dtype::U8, vec![2], vec![1, 2]));
        tensors.insert(
            "state",
            (
                "w.quant_state.bitsandbytes__nf4",
                Dtype::U8,
                vec![state.len()],
                state.to_vec(),
            ),
        );
        assert_eq!(read_packed(tensors).unwrap().packed, codes, "{dtype:?}");
    }
}

/// The error after one tensor of the weight is replaced or, without bytes, removed.
fn packed_error(key: &'static str, tensor: Option<Tensor<'static>>) -> String {
    let mut tensors = packed_weight();
    match tensor {
        Some(tensor) => tensors.insert(key, tensor),
        None => tensors.remove(key),
    };
    read_packed(tensors).unwrap_err().to_string()
}

#[test]
fn a_weight_without_one_of_its_parts_is_refused() {
    assert_says(&packed_error("w", None), &["`w` is missing"]);
    assert_says(&packed_error("absmax", None), &["`w.absmax` is missing"]);
    assert_says(&packed_error("map", None), &["`w.quant_map` is missing"]);
    assert_says(
        &packed_error("nested_map", None),
        &["`w.nested_quant_map` is missing"],
    );
    assert_says(&packed_error("nested", None), &["`w.absmax`", "F32", "U8"]);
}

#[test]
fn parts_of_the_wrong_length_are_refused() {
    assert_says(
        &packed_error("w", Some(("w", Dtype::U8, vec![74, 1], vec![0; 74]))),
        &["`w`", "75", "74"],
    );
    let absmax = ("w.absmax", Dtype::U8, vec![4], vec![0; 4]);
    assert_says(
        &packed_error("absmax", Some(absmax)),
        &["`w.absmax`", "3", "4"],
    );
    let nested = ("w.nested_absmax", Dtype::F32, vec![2], vec![0; 8]);
    assert_says(
        &packed_error("nested", Some(nested)),
        &["`w.nested_absmax`", "1", "2"],
    );
}

#[test]
fn another_code_map_is_refused() {
    let mut map = NF4_CODE;
    map[3] += 0.01;
    let tensor = ("w.quant_map", Dtype::F32, vec![16], f32s(&map));
    assert_says(&packed_error("map", Some(tensor)), &["`w.quant_map`"]);
    let mut map = *dynamic_map();
    map.swap(4, 5);
    let tensor = ("w.nested_quant_map", Dtype::F32, vec![256], f32s(&map));
    assert_says(
        &packed_error("nested_map", Some(tensor)),
        &["`w.nested_quant_map`"],
    );
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let error = |state: &'static str| {
        let bytes = state.as_bytes().to_vec();
        packed_error(
            "state",
            Some((
                "w.quant_state.bitsandbytes__nf4",
                Dtype::U8,
                vec![bytes.len()],
                bytes,
            )),
        )
    };
    assert_says(
        &error("{"),
        &["model.safetensors", "w.quant_state.bitsandbytes__nf4"],
    );
    assert_says(
        &error(r#"{"quant_type": "nf4"}"#),
        &["w.quant_state", "blocksize"],
    );
    let state = r#"{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [5, 30]}"#;
    assert_says(&error(state), &["w.quant_state.bitsandbytes__nf4", "Fp4"]);
    let state = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [5, 30]}"#;
    assert_says(&error(state), &["`w`", "nested_blocksize"]);
    let nested = r#""nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}"#;
    for (start, parts) in [
        (
            r#"{"quant_type": "nf4", "blocksize": 0, "dtype": "bfloat16", "shape": [5, 30], "#,
            ["blocksize", "0"],
        ),
        (
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "int8", "shape": [5, 30], "#,
            ["dtype", "int8"],
        ),
        (
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [9223372036854775807, 30], "#,
            ["shape", "`w`"],
        ),
    ] {
        assert_says(
            &error(Box::leak(format!("{start}{nested}").into_boxed_str())),
            &parts,
        );
    }
}
