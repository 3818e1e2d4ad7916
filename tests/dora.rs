//! DoRA's operation: its reference, finite differences, what PEFT computes with dropout, and the norm without a whole weight.

mod oracle;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use oracle::{Random, assert_close, f32, f64s, oracle};
use qlora::device::ComputeDtype;
use qlora::ops::dropout::Dropout;
use qlora::ops::linear::dora::{self, Magnitude};
use qlora::ops::linear::{Lora, LoraGrad, ReferenceLora};
use qlora::ops::weight::Weight;
use qlora::quant::{DenseTensor, FrozenWeight, Params4bit, QuantizeOptions};

/// A sum of some hundred products in f32.
const TOLERANCE: f64 = 2e-5;

fn zeros_like(t: &Tensor) -> Tensor {
    Tensor::zeros(t.shape(), DType::F32, &Device::Cpu).unwrap()
}

fn stored(t: &Tensor) -> DenseTensor {
    let values: Vec<f32> = f64s(t).into_iter().map(|v| v as f32).collect();
    DenseTensor::from_f32(t.dims().to_vec(), &values)
}

/// A weight whose rows are no multiple of the block, in 4 bits, and its values.
fn quantized(t: &Tensor) -> (Weight, Tensor) {
    let weight = stored(t);
    let params = Params4bit::quantize("w", &weight, QuantizeOptions::default()).unwrap();
    let mut values = vec![0f32; weight.numel()];
    params.dequantize(&mut values);
    let values = Tensor::from_vec(values, t.dims(), &Device::Cpu).unwrap();
    (
        FrozenWeight::Quantized(params).into(),
        values.to_dtype(DType::F64).unwrap(),
    )
}

fn squares(weight: &Weight) -> Tensor {
    Tensor::new(dora::squared_norms(weight), &Device::Cpu).unwrap()
}

fn reference<'a>(a: &'a Tensor, b: &'a Tensor, dropout: Option<&'a Tensor>) -> ReferenceLora<'a> {
    ReferenceLora {
        a,
        b,
        scaling: 0.5,
        dropout,
    }
}

#[test]
fn dora_equals_its_reference_and_finite_differences() {
    let mut random = Random::new("dora");
    let mask = Dropout::new(0.4, 1, 2, 3).unwrap().mask(4, 5);
    for (n, d_in, d_out, r, mask) in [
        (5, 42, 30, 3, None),
        (67, 80, 300, 4, None),
        (1, 200, 7, 1, None),
        (5, 42, 30, 3, Some(mask)),
        (67, 80, 300, 33, Some(mask)),
    ] {
        let factors = mask.map(|mask| mask.reference(n, d_in).unwrap());
        let (x, w) = (random.tensor(&[n, d_in]), random.tensor(&[d_out, d_in]));
        let (weight, w) = quantized(&w);
        let bias = random.tensor(&[d_out]);
        let (a, b) = (random.tensor(&[r, d_in]), random.tensor(&[d_out, r]));
        let magnitude = (random.tensor(&[d_out]) + 3.0).unwrap();
        let dy = random.tensor(&[n, d_out]);
        let norm = dora::reference_norm(&w, reference(&a, &b, None)).unwrap();
        let inputs = [x.clone(), a.clone(), b.clone(), magnitude.clone()];
        let (want, grads) = oracle(&mut random, &inputs, &dy, |t| {
            let lora = reference(&t[1], &t[2], factors.as_ref());
            dora::reference(&t[0], &w, Some(&bias), lora, (&t[3], &norm)).unwrap()
        });
        let (x, a, b, bias, dy) = (f32(&x), f32(&a), f32(&b), f32(&bias), f32(&dy));
        let (magnitude, weight_squares) = (f32(&magnitude), squares(&weight));
        let lora = Lora {
            a: &a,
            b: &b,
            scaling: 0.5,
            mask,
            compute_dtype: ComputeDtype::F32,
        };
        let magnitude = Magnitude {
            value: &magnitude,
            low: None,
            weight_squares: &weight_squares,
        };
        let scales = dora::scales(&weight, lora, magnitude).unwrap();
        let norms = scales.get(1).unwrap().recip().unwrap();
        assert_close("norm", &norms, &norm, 1e-6);
        let (y, _) = dora::forward(&x, &weight, Some(&bias), lora, &scales).unwrap();
        assert_close("y", &y, &want, TOLERANCE);
        let (d_a, d_b, d_magnitude) = (zeros_like(&a), zeros_like(&b), zeros_like(&norm));
        let grad = LoraGrad {
            d_a: &d_a,
            d_b: &d_b,
        };
        let (du, dh) =
            dora::backward_adapter(&dy, &x, &weight, (lora, magnitude), (grad, &d_magnitude))
                .unwrap();
        let dx = dora::backward_input(&dy, (&du, &dh), &weight, lora, None).unwrap();
        assert_close("dx", &dx, &grads[0], TOLERANCE);
        assert_close("dA", &d_a, &grads[1], TOLERANCE);
        assert_close("dB", &d_b, &grads[2], TOLERANCE);
        assert_close("d_magnitude", &d_magnitude, &grads[3], TOLERANCE);
        let twice = dora::backward_input(&dy, (&du, &dh), &weight, lora, Some(dx)).unwrap();
        let double = (&grads[0] * 2.0).unwrap();
        assert_close("dx added to dx", &twice, &double, TOLERANCE);
    }
}

#[test]
fn a_new_adapter_changes_nothing() {
    let mut random = Random::new("new dora");
    let (weight, _) = quantized(&random.tensor(&[30, 42]));
    let (x, a) = (f32(&random.tensor(&[5, 42])), f32(&random.tensor(&[3, 42])));
    let b = Tensor::zeros((30, 3), DType::F32, &Device::Cpu).unwrap();
    let lora = Lora {
        a: &a,
        b: &b,
        scaling: 2.0,
        mask: None,
        compute_dtype: ComputeDtype::F32,
    };
    let weight_squares = squares(&weight);
    let magnitude = Magnitude {
        value: &weight_squares.sqrt().unwrap(),
        low: None,
        weight_squares: &weight_squares,
    };
    let scales = dora::scales(&weight, lora, magnitude).unwrap();
    let (y, _) = dora::forward(&x, &weight, None, lora, &scales).unwrap();
    let (base, _) = qlora::ops::linear::forward(&x, &weight, None, None).unwrap();
    assert_close("y", &y, &base, 1e-6);
}

#[test]
fn dropout_is_that_of_peft() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/adapters/dora_dropout.safetensors");
    let fixture = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let of = |name: &str| &fixture[name];
    let (n, d_in) = of("x").dims2().unwrap();
    let mask = Dropout::new(0.4, 1, 2, 3).unwrap().mask(4, 5);
    let factors = mask.reference(n, d_in).unwrap();
    assert!(f64s(&f32(&factors)) == f64s(of("dropout")), "another mask");
    let weight: Weight = FrozenWeight::Dense(stored(of("weight"))).into();
    let weight_squares = squares(&weight);
    let lora = Lora {
        a: of("lora_A"),
        b: of("lora_B"),
        scaling: of("scaling").to_vec1().unwrap()[0],
        mask: Some(mask),
        compute_dtype: ComputeDtype::F32,
    };
    let magnitude = Magnitude {
        value: of("magnitude"),
        low: None,
        weight_squares: &weight_squares,
    };
    let (x, dy) = (of("x"), of("dy"));
    let scales = dora::scales(&weight, lora, magnitude).unwrap();
    let (y, _) = dora::forward(x, &weight, Some(of("bias")), lora, &scales).unwrap();
    assert_close("y", &y, of("y"), TOLERANCE);
    let zeros = |name| zeros_like(of(name));
    let (d_a, d_b, d_magnitude) = (zeros("lora_A"), zeros("lora_B"), zeros("magnitude"));
    let grad = LoraGrad {
        d_a: &d_a,
        d_b: &d_b,
    };
    let grads = (grad, &d_magnitude);
    let (du, dh) = dora::backward_adapter(dy, x, &weight, (lora, magnitude), grads).unwrap();
    let dx = dora::backward_input(dy, (&du, &dh), &weight, lora, None).unwrap();
    for (name, found) in [
        ("x", &dx),
        ("lora_A", &d_a),
        ("lora_B", &d_b),
        ("magnitude", &d_magnitude),
    ] {
        assert_close(name, found, of(&format!("grad.{name}")), TOLERANCE);
    }
}
