//! Operations through their kernels against their references in f64: forward, backward, and what they do in place.
//!
//! An operation may be twice as far off as its reference is when candle computes that in f32 or bf16 from the same values and
//! rounds to bf16.

use candle_core::{DType, Device, Tensor, Var};
use half::bf16;
use qlora::IGNORE_INDEX;
use qlora::device::{ComputeDtype, Placement};
use qlora::ops::adamw::{self, AdamW};
use qlora::ops::attention::{self, Heads, Segment, Segments};
use qlora::ops::dropout::Dropout;
use qlora::ops::gated_act::Activation;
use qlora::ops::linear::dora::{self, Magnitude};
use qlora::ops::linear::{self, Branch, Lora, LoraGrad, ReferenceLora, Stack};
use qlora::ops::linear_cross_entropy::{self as lce, Head};
use qlora::ops::rope::{self, Pairs, Positions, RopeTable};
use qlora::ops::soft_cap::SoftCap;
use qlora::ops::table::{PagedTable, Table};
use qlora::ops::weight::{DenseCache, Weight};
use qlora::ops::{embedding, gated_act, residual, rms_norm, scale};
use qlora::quant::{DenseTensor, FrozenWeight, Params4bit, QuantizeOptions};

use crate::device_under_test::assert_kernel_close;
use crate::emulated::{self, placement_test};
use crate::oracle::{Random, assert_close, f64s, oracle, segments};

/// A random tensor whose values bf16 holds exactly, in f64.
fn random(random: &mut Random, shape: &[usize]) -> Tensor {
    let t = random.tensor(shape).to_dtype(DType::BF16).unwrap();
    t.to_dtype(DType::F64).unwrap()
}

/// The values in bf16 on the device, in memory of its own.
fn place(t: &Tensor, placement: &Placement) -> Tensor {
    t.to_dtype(DType::BF16)
        .unwrap()
        .copy()
        .unwrap()
        .to_device(&placement.device)
        .unwrap()
}

fn place_f32(t: &Tensor, placement: &Placement) -> Tensor {
    t.to_dtype(DType::F32)
        .unwrap()
        .copy()
        .unwrap()
        .to_device(&placement.device)
        .unwrap()
}

/// Output and gradients of a reference, exactly and in bf16.
struct Expected {
    output: Pair,
    grads: Vec<Pair>,
}

/// The same values in f64, and as candle gets them in bf16.
struct Pair {
    exact: Tensor,
    low: Tensor,
}

impl Pair {
    #[track_caller]
    fn assert_close(&self, name: &str, got: &Tensor) {
        let floats = |t: &Tensor| f64s(t).into_iter().map(|v| v as f32).collect::<Vec<_>>();
        let got = got.to_device(&Device::Cpu).unwrap();
        assert_kernel_close(name, &floats(&got), &f64s(&self.exact), &floats(&self.low));
    }
}

/// A library may sum the products of a part of the head in another order than those of all of it.
fn assert_losses_close(got: &[lce::TokenLoss], want: &[lce::TokenLoss]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert_eq!(got.row, want.row);
        assert!((got.loss - want.loss).abs() <= 1e-5 * want.loss.abs());
        assert!((got.confidence - want.confidence).abs() <= 1e-5 * want.confidence);
    }
}

fn expected(
    random: &mut Random,
    inputs: &[Tensor],
    cotangent: &Tensor,
    f: impl Fn(&[Tensor]) -> Tensor,
) -> Expected {
    expected_within(DType::BF16, random, inputs, cotangent, f)
}

/// With the low precision computed in `dtype` and rounded to bf16.
fn expected_within(
    dtype: DType,
    random: &mut Random,
    inputs: &[Tensor],
    cotangent: &Tensor,
    f: impl Fn(&[Tensor]) -> Tensor,
) -> Expected {
    let (exact, exact_grads) = oracle(random, inputs, cotangent, &f);
    let low = |t: &Tensor| t.to_dtype(dtype).unwrap();
    let rounded = |t: &Tensor| t.to_dtype(DType::BF16).unwrap();
    let vars: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(&low(t)).unwrap())
        .collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let output = f(&tensors);
    let loss = (&output * low(cotangent)).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    let grads = exact_grads.into_iter().zip(&vars).map(|(exact, var)| Pair {
        exact,
        low: rounded(grads.get(var).unwrap()),
    });
    Expected {
        grads: grads.collect(),
        output: Pair {
            exact,
            low: rounded(&output.detach()),
        },
    }
}

/// A constant that a reference uses, in the type of its inputs.
fn like(constant: &Tensor, t: &Tensor) -> Tensor {
    constant.to_dtype(t.dtype()).unwrap()
}

/// Rows of one warp and of one block, with a tail, of odd length, and longer than registers hold.
const NORM_SHAPES: [(usize, usize); 7] = [
    (3, 42),
    (65, 96),
    (1, 7),
    (9, 1024),
    (3, 1032),
    (2, 1031),
    (2, 16_400),
];

placement_test!(in_every_order rms_norm_equals_its_reference, |at| {
    let mut numbers = Random::new("rms_norm");
    for (n, d) in NORM_SHAPES {
        let [x, dy, before] = [(); 3].map(|()| random(&mut numbers, &[n, d]));
        let w = random(&mut numbers, &[d]);
        let want = expected_within(
            DType::F32,
            &mut numbers,
            std::slice::from_ref(&x),
            &dy,
            |t| rms_norm::reference(&t[0], &like(&w, &t[0]), 1e-5).unwrap(),
        );
        let (x, weight) = (place(&x, at), place_f32(&w, at));
        let y = rms_norm::forward(&x, &weight, 1e-5).unwrap();
        want.output.assert_close(&format!("y of {n} x {d}"), &y);
        let dx = place(&before, at);
        rms_norm::backward(&place(&dy, at), &x, &weight, 1e-5, &dx).unwrap();
        let alone = rms_norm::gradient(&place(&dy, at), &x, &weight, 1e-5).unwrap();
        want.grads[0].assert_close(&format!("dx alone of {n} x {d}"), &alone);
        let exact = (&want.grads[0].exact + &before).unwrap();
        let want = Pair {
            low: exact.to_dtype(DType::BF16).unwrap(),
            exact,
        };
        want.assert_close(&format!("dx of {n} x {d}"), &dx);
    }
});

placement_test!(in_every_order a_norm_after_a_residual_equals_the_two, |at| {
    let mut numbers = Random::new("residual norm");
    for (n, d) in NORM_SHAPES {
        let (x, branch) = (random(&mut numbers, &[n, d]), random(&mut numbers, &[n, d]));
        let w = random(&mut numbers, &[d]);
        let weight = place_f32(&w, at);
        let sum = residual::forward(&place(&x, at), place(&branch, at)).unwrap();
        let y = rms_norm::forward(&sum, &weight, 1e-5).unwrap();
        let (fused_sum, fused_y) =
            rms_norm::forward_residual(&place(&x, at), place(&branch, at), &weight, 1e-5).unwrap();
        assert!(f64s(&fused_sum) == f64s(&sum), "sum of {n} x {d}");
        assert!(f64s(&fused_y) == f64s(&y), "norm of {n} x {d}");
    }
});

placement_test!(in_every_order gated_act_equals_its_reference, |at| {
    let mut numbers = Random::new("gated_act");
    let activations = [Activation::Silu, Activation::GeluTanh];
    for (shape, activation) in [[42, 1000], [3, 37], [1, 1]]
        .into_iter()
        .flat_map(|shape| activations.map(|activation| (shape, activation)))
    {
        let gate = (random(&mut numbers, &shape) * 8.0).unwrap();
        let (up, dy) = (random(&mut numbers, &shape), random(&mut numbers, &shape));
        let inputs = [gate.clone(), up.clone()];
        let want = expected(&mut numbers, &inputs, &dy, |t| {
            gated_act::reference(&t[0], &t[1], activation).unwrap()
        });
        let (gate, up) = (place(&gate, at), place(&up, at));
        let y = gated_act::forward(&gate, &up, activation).unwrap();
        want.output.assert_close("y", &y);
        gated_act::backward(&place(&dy, at), &gate, &up, activation).unwrap();
        want.grads[0].assert_close("d_gate", &gate);
        want.grads[1].assert_close("d_up", &up);
    }
});

placement_test!(in_every_order residual_is_rounded_once, |at| {
    let mut numbers = Random::new("residual");
    for shape in [[30, 130], [1, 7]] {
        let (x, branch) = (random(&mut numbers, &shape), random(&mut numbers, &shape));
        let sum = residual::forward(&place(&x, at), place(&branch, at)).unwrap();
        let whole = residual::unwritten(&sum).unwrap();
        residual::forward_to(&place(&x, at), &place(&branch, at), &whole).unwrap();
        let want = (x + branch).unwrap().to_dtype(DType::BF16).unwrap();
        assert!(f64s(&sum) == f64s(&want), "{shape:?}");
        assert!(f64s(&whole) == f64s(&want), "{shape:?}");
    }
});

placement_test!(in_every_order scale_is_rounded_once, |at| {
    let mut numbers = Random::new("scale");
    for shape in [[30, 130], [1, 7]] {
        let x = random(&mut numbers, &shape);
        let found = place(&x, at);
        scale::in_place(&found, 54.5).unwrap();
        let want = (x * 54.5).unwrap().to_dtype(DType::BF16).unwrap();
        assert!(f64s(&found) == f64s(&want), "{shape:?}");
    }
});

placement_test!(in_every_order rope_equals_its_reference, |at| {
    let mut numbers = Random::new("rope");
    let positions: Vec<u32> = (0..40).chain(0..27).collect();
    let n = positions.len();
    for (heads, kv_heads, half, rest, pairs) in [
        (3, 1, 5, 0, Pairs::Halves),
        (4, 2, 8, 0, Pairs::Halves),
        (2, 2, 32, 0, Pairs::Halves),
        (2, 1, 24, 16, Pairs::Halves),
        (2, 1, 24, 16, Pairs::Neighbours),
    ] {
        let frequencies: Vec<f32> = (0..half).map(|i| 0.7f32.powi(i)).collect();
        let half = half as usize;
        let head_dim = 2 * half + rest;
        let table = RopeTable::new(&frequencies, 1.1, 40).for_heads_of(head_dim);
        let table = table.turning(pairs).on(&at.device).unwrap();
        let rows = Positions::new(&positions).on(&at.device).unwrap();
        let (cos, sin) = table.gather(&positions).unwrap();
        let mut case = |heads: usize| {
            let shape = [n, heads, head_dim];
            let (x, dy) = (random(&mut numbers, &shape), random(&mut numbers, &shape));
            let want = expected(&mut numbers, std::slice::from_ref(&x), &dy, |t| {
                rope::reference(&t[0], &like(&cos, &t[0]), &like(&sin, &t[0]), pairs).unwrap()
            });
            let flat = |t: &Tensor| place(&t.flatten_from(1).unwrap(), at);
            (flat(&x), flat(&dy), want)
        };
        let (q, dq, want_q) = case(heads);
        let (k, dk, want_k) = case(kv_heads);
        rope::forward(&q, &k, &rows, &table).unwrap();
        want_q.output.assert_close("q", &q);
        want_k.output.assert_close("k", &k);
        rope::backward(&dq, &dk, &rows, &table).unwrap();
        want_q.grads[0].assert_close("dq", &dq);
        want_k.grads[0].assert_close("dk", &dk);
    }
});

/// A 4-bit weight on the device, and its values rounded to bf16, as products read them.
fn quantized(w: &Tensor, placement: &Placement) -> (Weight, Tensor) {
    let values: Vec<f32> = f64s(w).into_iter().map(|v| v as f32).collect();
    let dense = DenseTensor::from_f32(w.dims().to_vec(), &values);
    let params = Params4bit::quantize("w", &dense, QuantizeOptions::default()).unwrap();
    let mut values = vec![bf16::ZERO; dense.numel()];
    params.dequantize(&mut values);
    let values = Tensor::from_vec(values, w.dims(), &Device::Cpu).unwrap();
    let cache = DenseCache::new(&[dense.numel()], &placement.device).unwrap();
    let weight = Weight::on_device(FrozenWeight::Quantized(params), &cache.into()).unwrap();
    (weight, values.to_dtype(DType::F64).unwrap())
}

placement_test!(in_every_order linear_with_lora_equals_its_reference, |at| {
    let mut numbers = Random::new("linear");
    let mask = Dropout::new(0.4, 1, 2, 3).unwrap().mask(4, 5);
    for (n, d_in, d_out, r, mask) in [
        (5, 42, 30, 3, None),
        (37, 80, 130, 4, None),
        (1, 200, 7, 1, None),
        (5, 42, 30, 3, Some(mask)),
        (70, 136, 40, 72, Some(mask)),
    ] {
        let factors = mask.map(|mask| mask.reference(n, d_in).unwrap());
        let (x, dy) = (
            random(&mut numbers, &[n, d_in]),
            random(&mut numbers, &[n, d_out]),
        );
        let (weight, w) = quantized(&random(&mut numbers, &[d_out, d_in]), at);
        let bias = random(&mut numbers, &[d_out]);
        let (a, b) = (
            random(&mut numbers, &[r, d_in]),
            random(&mut numbers, &[d_out, r]),
        );
        let inputs = [x.clone(), a.clone(), b.clone()];
        let want = expected(&mut numbers, &inputs, &dy, |t| {
            let (w, bias) = (like(&w, &t[0]), like(&bias, &t[0]));
            let factors = factors.as_ref().map(|factors| like(factors, &t[0]));
            let lora = ReferenceLora {
                a: &t[1],
                b: &t[2],
                scaling: 0.5,
                dropout: factors.as_ref(),
            };
            linear::reference(&t[0], &w, Some(&bias), Some(lora)).unwrap()
        });
        let (x, dy, a, b) = (place(&x, at), place(&dy, at), place(&a, at), place(&b, at));
        let bias = place_f32(&bias, at);
        let lora = Lora {
            a: &a,
            b: &b,
            scaling: 0.5,
            mask,
            compute_dtype: ComputeDtype::Bf16,
        };
        let (y, u) = linear::forward(&x, &weight, Some(&bias), Some(lora)).unwrap();
        want.output.assert_close("y", &y);
        let zeros = |t: &Tensor| Tensor::zeros(t.shape(), DType::F32, t.device()).unwrap();
        let (d_a, d_b) = (zeros(&a), zeros(&b));
        let grad = LoraGrad {
            d_a: &d_a,
            d_b: &d_b,
        };
        let du = linear::backward_lora(&dy, &x, &u.unwrap(), lora, grad).unwrap();
        let dx = linear::backward_input(&dy, &weight, Some((&du, lora)), None).unwrap();
        want.grads[0].assert_close("dx", &dx);
        want.grads[1].assert_close("dA", &d_a);
        want.grads[2].assert_close("dB", &d_b);
        // The sum may be some of the rows of a tensor.
        let (n, d_in) = x.dims2().unwrap();
        let larger = Tensor::zeros((n + 3, d_in), DType::F64, &Device::Cpu).unwrap();
        let rows = place(&larger, at).narrow(0, 1, n).unwrap();
        let rows = linear::backward_input(&dy, &weight, Some((&du, lora)), Some(rows)).unwrap();
        want.grads[0].assert_close("dx in rows", &rows);
        let twice = linear::backward_input(&dy, &weight, Some((&du, lora)), Some(dx)).unwrap();
        let double = |t: &Tensor| (t * 2.0).unwrap();
        let want = Pair {
            exact: double(&want.grads[0].exact),
            low: double(&want.grads[0].low),
        };
        want.assert_close("dx added to dx", &twice);
    }
});

placement_test!(in_every_order a_stack_of_adapters_equals_its_reference, |at| {
    let mut numbers = Random::new("stack");
    let dropout = Dropout::new(0.4, 1, 2, 3).unwrap();
    for (n, d_in, widths, r, is_masked) in [
        (37, 80, vec![130, 40, 24], 4, false),
        (5, 42, vec![30, 9, 21], 3, true),
        (70, 136, vec![40, 7], 72, true),
    ] {
        let adapters = widths.len();
        let masks: Vec<_> = (0..adapters).map(|module| dropout.mask(4, module)).collect();
        let masks = if is_masked { masks } else { Vec::new() };
        let factors: Vec<_> = masks.iter().map(|mask| mask.reference(n, d_in).unwrap()).collect();
        let x = random(&mut numbers, &[n, d_in]);
        let dy = random(&mut numbers, &[n, widths.iter().sum()]);
        let (weights, ws): (Vec<_>, Vec<_>) = widths
            .iter()
            .map(|&d_out| quantized(&random(&mut numbers, &[d_out, d_in]), at))
            .unzip();
        let a = random(&mut numbers, &[adapters * r, d_in]);
        let b: Vec<_> = widths.iter().map(|&d_out| random(&mut numbers, &[d_out, r])).collect();
        let inputs: Vec<_> = [&x, &a].into_iter().chain(&b).cloned().collect();
        let want = expected(&mut numbers, &inputs, &dy, |t| {
            let outputs = ws.iter().enumerate().map(|(i, w)| {
                let factors = factors.get(i).map(|factors| like(factors, &t[0]));
                let lora = ReferenceLora {
                    a: &t[1].narrow(0, i * r, r).unwrap(),
                    b: &t[2 + i],
                    scaling: 0.5,
                    dropout: factors.as_ref(),
                };
                linear::reference(&t[0], &like(w, &t[0]), None, Some(lora)).unwrap()
            });
            Tensor::cat(&outputs.collect::<Vec<_>>(), 1).unwrap()
        });
        let mut first = 0;
        let dys: Vec<_> = widths
            .iter()
            .map(|&width| {
                first += width;
                place(&dy.narrow(1, first - width, width).unwrap(), at)
            })
            .collect();
        let (x, a) = (place(&x, at), place(&a, at));
        let b: Vec<_> = b.iter().map(|b| place(b, at)).collect();
        let stack = Stack { a: &a, adapters, masks: &masks };
        let us = stack.down_project(&x).unwrap();
        let outputs = us.iter().enumerate().map(|(i, u)| {
            let lora = Lora {
                a: &a.narrow(0, i * r, r).unwrap(),
                b: &b[i],
                scaling: 0.5,
                mask: masks.get(i).copied(),
                compute_dtype: ComputeDtype::Bf16,
            };
            linear::forward_with_u(&x, &weights[i], None, Some((lora, u))).unwrap()
        });
        let outputs: Vec<_> = outputs.collect();
        want.output.assert_close("y", &Tensor::cat(&outputs, 1).unwrap());
        let zeros = |t: &Tensor| Tensor::zeros(t.shape(), DType::F32, t.device()).unwrap();
        let (d_a, d_b): (_, Vec<_>) = (zeros(&a), b.iter().map(zeros).collect());
        let branches: Vec<_> = (0..adapters)
            .map(|i| Branch {
                dy: &dys[i],
                u: &us[i],
                b: &b[i],
                scaling: 0.5,
                d_b: &d_b[i],
            })
            .collect();
        let du = stack.backward(&branches, &x, &d_a).unwrap();
        let dx = dys.iter().zip(&weights).fold(None, |dx, (dy, weight)| {
            Some(linear::backward_input(dy, weight, None, dx).unwrap())
        });
        let dx = dx.unwrap();
        stack.add_input_grad(&du, &dx).unwrap();
        want.grads[0].assert_close("dx", &dx);
        want.grads[1].assert_close("dA", &d_a);
        for (want, d_b) in want.grads[2..].iter().zip(&d_b) {
            want.assert_close("dB", d_b);
        }
    }
});

placement_test!(in_every_order dora_equals_its_reference, |at| {
    let mut numbers = Random::new("dora");
    let mask = Dropout::new(0.4, 1, 2, 3).unwrap().mask(4, 5);
    for (n, d_in, d_out, r, mask) in [
        (5, 42, 30, 3, None),
        (150, 80, 264, 4, None),
        (5, 42, 30, 3, Some(mask)),
        (70, 136, 40, 35, Some(mask)),
    ] {
        let factors = mask.map(|mask| mask.reference(n, d_in).unwrap());
        let (x, dy) = (
            random(&mut numbers, &[n, d_in]),
            random(&mut numbers, &[n, d_out]),
        );
        let (weight, w) = quantized(&random(&mut numbers, &[d_out, d_in]), at);
        let bias = random(&mut numbers, &[d_out]);
        let (a, b) = (
            random(&mut numbers, &[r, d_in]),
            random(&mut numbers, &[d_out, r]),
        );
        let magnitude = (numbers.tensor(&[d_out]) + 3.0).unwrap();
        let norm_of = |w: &Tensor, a: &Tensor, b: &Tensor| {
            let lora = ReferenceLora {
                a,
                b,
                scaling: 0.5,
                dropout: None,
            };
            dora::reference_norm(w, lora).unwrap()
        };
        let norm = norm_of(&w, &a, &b);
        let inputs = [x.clone(), a.clone(), b.clone(), magnitude.clone()];
        let want = expected(&mut numbers, &inputs, &dy, |t| {
            let (w, bias, norm) = (like(&w, &t[0]), like(&bias, &t[0]), like(&norm, &t[0]));
            let factors = factors.as_ref().map(|factors| like(factors, &t[0]));
            let lora = ReferenceLora {
                a: &t[1],
                b: &t[2],
                scaling: 0.5,
                dropout: factors.as_ref(),
            };
            dora::reference(&t[0], &w, Some(&bias), lora, (&t[3], &norm)).unwrap()
        });
        let (x, dy, a, b) = (place(&x, at), place(&dy, at), place(&a, at), place(&b, at));
        let bias = place_f32(&bias, at);
        let masters: Vec<f32> = f64s(&magnitude).into_iter().map(|m| m as f32).collect();
        let (high, low): (Vec<bf16>, Vec<i16>) = masters.into_iter().map(adamw::split_master).unzip();
        let on_device = |t: Tensor| t.to_device(&at.device).unwrap();
        let high = on_device(Tensor::new(high, &Device::Cpu).unwrap());
        let low = on_device(Tensor::new(low, &Device::Cpu).unwrap());
        let squares = on_device(Tensor::new(dora::squared_norms(&weight), &Device::Cpu).unwrap());
        let magnitude = Magnitude {
            value: &high,
            low: Some(&low),
            weight_squares: &squares,
        };
        let lora = Lora {
            a: &a,
            b: &b,
            scaling: 0.5,
            mask,
            compute_dtype: ComputeDtype::Bf16,
        };
        let scales = dora::scales(&weight, lora, magnitude).unwrap();
        let norms = scales.get(1).unwrap().recip().unwrap();
        assert_close("norm", &norms, &norm, 2e-3);
        let (y, _) = dora::forward(&x, &weight, Some(&bias), lora, &scales).unwrap();
        want.output.assert_close("y", &y);
        let zeros = |t: &Tensor| Tensor::zeros(t.shape(), DType::F32, t.device()).unwrap();
        let (d_a, d_b, d_magnitude) = (zeros(&a), zeros(&b), zeros(&high));
        let grad = LoraGrad {
            d_a: &d_a,
            d_b: &d_b,
        };
        let grads = (grad, &d_magnitude);
        let (du, dh) =
            dora::backward_adapter(&dy, &x, &weight, (lora, magnitude), grads).unwrap();
        let dx = dora::backward_input(&dy, (&du, &dh), &weight, lora, None).unwrap();
        want.grads[0].assert_close("dx", &dx);
        want.grads[1].assert_close("dA", &d_a);
        want.grads[2].assert_close("dB", &d_b);
        want.grads[3].assert_close("d_magnitude", &d_magnitude);
        let twice = dora::backward_input(&dy, (&du, &dh), &weight, lora, Some(dx)).unwrap();
        let double = |t: &Tensor| (t * 2.0).unwrap();
        let want = Pair {
            exact: double(&want.grads[0].exact),
            low: double(&want.grads[0].low),
        };
        want.assert_close("dx added to dx", &twice);
    }
});

placement_test!(in_every_order a_weight_is_dequantized_to_the_bits_of_the_library, |at| {
    let mut numbers = Random::new("weight");
    let (d_out, d_in) = (37, 42);
    let (weight, w) = quantized(&random(&mut numbers, &[d_out, d_in]), at);
    let identity = Tensor::eye(d_in, DType::F64, &Device::Cpu).unwrap();
    let (columns, _) = linear::forward(&place(&identity, at), &weight, None, None).unwrap();
    assert!(f64s(&columns.t().unwrap()) == f64s(&w));
});

placement_test!(in_every_order embedding_gathers_rows, |at| {
    let mut numbers = Random::new("embedding");
    let table = random(&mut numbers, &[17, 10]);
    let values: Vec<bf16> = f64s(&table).into_iter().map(bf16::from_f64).collect();
    let dense = FrozenWeight::Dense(DenseTensor::from_bf16(vec![17, 10], &values));
    let cache = DenseCache::new(&[], &at.device).unwrap();
    let weight = Weight::on_device(dense, &cache.into()).unwrap();
    let ids = [3u32, 16, 0, 3];
    let want = embedding::reference(&Tensor::new(&ids, &Device::Cpu).unwrap(), &table).unwrap();
    let rows = embedding::forward(&ids, &weight).unwrap();
    assert!(f64s(&rows) == f64s(&want));
});

placement_test!(in_every_order the_gradient_of_a_trained_embedding_is_added_token_by_token, |at| {
    let mut numbers = Random::new("embedding_backward");
    // Wider than a block of threads.
    let (words, d) = (17, 300);
    let ids = [3u32, 16, 0, 3, 16, 3, 5];
    let table = random(&mut numbers, &[words, d]);
    let dy = random(&mut numbers, &[ids.len(), d]);
    let index = Tensor::new(&ids, &Device::Cpu).unwrap();
    let inputs = std::slice::from_ref(&table);
    let (_, grads) = oracle(&mut numbers, inputs, &dy, |t| {
        embedding::reference(&index, &t[0]).unwrap()
    });
    let (placed, dy) = (place(&table, at), place(&dy, at));
    let rows = embedding::forward(&ids, Table::Trained(&placed, ComputeDtype::Bf16)).unwrap();
    assert!(f64s(&rows) == f64s(&table.index_select(&index, 0).unwrap()));
    let d_table = place_f32(&Tensor::ones((words, d), DType::F64, &Device::Cpu).unwrap(), at);
    embedding::backward(&dy, &ids, Some(5), &d_table).unwrap();
    let found = (d_table.to_device(&Device::Cpu).unwrap() - 1.0).unwrap();
    for word in 0..words {
        let row = |t: &Tensor| t.get(word).unwrap();
        match word {
            0 | 3 | 16 => assert_close("row", &row(&found), &row(&grads[0]), 1e-5),
            _ => assert!(f64s(&row(&found)).iter().all(|g| *g == 0.0), "{word}"),
        }
    }
});

placement_test!(in_every_order attention_equals_its_reference, |at| {
    let mut numbers = Random::new("attention");
    let heads = |num_heads, num_kv_heads, head_dim, window| Heads {
        num_heads,
        num_kv_heads,
        head_dim,
        window,
        scale: attention::default_scale(head_dim),
        soft_cap: None,
        compute_dtype: ComputeDtype::Bf16,
    };
    let capped = |heads| Heads {
        soft_cap: Some(SoftCap(2.0)),
        ..heads
    };
    for (lengths, heads) in [
        (vec![42], heads(6, 2, 8, None)),
        (vec![1, 70, 5], heads(2, 2, 6, None)),
        (vec![100, 20], heads(2, 1, 64, Some(12))),
        (vec![30, 9], capped(heads(4, 2, 8, Some(20)))),
    ] {
        let n = lengths.iter().sum();
        let list = segments(&lengths);
        let (h, k, e) = (heads.num_heads, heads.num_kv_heads, heads.head_dim);
        let q = random(&mut numbers, &[n, h, e]);
        let [keys, v] = [(); 2].map(|()| random(&mut numbers, &[n, k, e]));
        let dy = random(&mut numbers, &[n, h, e]);
        let inputs = [q.clone(), keys.clone(), v.clone()];
        let want = expected(&mut numbers, &inputs, &dy, |t| {
            attention::reference(&t[0], &t[1], &t[2], &list, heads).unwrap()
        });
        let flat = |t: &Tensor| place(&t.flatten_from(1).unwrap(), at);
        let (q, keys, v, dy) = (flat(&q), flat(&keys), flat(&v), flat(&dy));
        let on_device = Segments::from(list.clone()).on(&at.device, &heads).unwrap();
        let saved = attention::forward(&q, &keys, &v, &on_device, heads).unwrap();
        want.output.assert_close("out", &saved.out);
        let (dq, dk, dv) =
            attention::backward(&dy, (&q, &keys, &v), &saved, &on_device, heads).unwrap();
        want.grads[0].assert_close("dq", &dq);
        want.grads[1].assert_close("dk", &dk);
        want.grads[2].assert_close("dv", &dv);
    }
});

placement_test!(
    attention_refuses_segments_that_its_kernels_do_not_compute,
    |at| {
        let mut numbers = Random::new("attention");
        let heads = Heads {
            num_heads: 2,
            num_kv_heads: 2,
            head_dim: 8,
            window: None,
            scale: attention::default_scale(8),
            soft_cap: None,
            compute_dtype: ComputeDtype::Bf16,
        };
        let mut rows = |n| place(&random(&mut numbers, &[n, 16]), at);
        let (q, k, v, d_out) = (rows(1), rows(5), rows(5), rows(1));
        let segment = || {
            Segments::from(vec![Segment {
                queries: 0..1,
                keys: 0..5,
            }])
        };
        let larger = Heads {
            head_dim: 16,
            ..heads
        };
        let capped = Heads {
            soft_cap: Some(SoftCap(2.0)),
            ..heads
        };
        for others in [larger, capped] {
            let of_others = segment().on(&at.device, &others).unwrap();
            assert!(attention::forward(&q, &k, &v, &of_others, heads).is_err());
        }
        let cached = segment().on(&at.device, &heads).unwrap();
        let saved = attention::forward(&q, &k, &v, &cached, heads).unwrap();
        assert!(attention::backward(&d_out, (&q, &k, &v), &saved, &cached, heads).is_err());
    }
);

placement_test!(in_every_order linear_cross_entropy_equals_its_reference, |at| {
    let mut numbers = Random::new("linear_cross_entropy");
    let cap = Some(SoftCap(3.0));
    for (n, d, vocab, soft_cap) in [(21, 20, 301, None), (5, 8, 3001, None), (21, 20, 301, cap)] {
        let (x, head) = (
            random(&mut numbers, &[n, d]),
            random(&mut numbers, &[vocab, d]),
        );
        let labels: Vec<i64> = (0..n)
            .map(|i| match i % 3 {
                1 => IGNORE_INDEX,
                _ => (i * 37 % vocab) as i64,
            })
            .collect();
        let rows: Vec<u32> = (0..n as u32)
            .filter(|i| labels[*i as usize] != IGNORE_INDEX)
            .collect();
        let picked = Tensor::new(rows.as_slice(), &Device::Cpu).unwrap();
        let kept: Vec<u32> = rows.iter().map(|&i| labels[i as usize] as u32).collect();
        let kept = Tensor::new(kept.as_slice(), &Device::Cpu).unwrap();
        let d_loss = Tensor::new(0.25f64, &Device::Cpu).unwrap();
        let inputs = [x.clone(), head.clone()];
        let want = expected(&mut numbers, &inputs, &d_loss, |t| {
            let picked = t[0].index_select(&picked, 0).unwrap();
            lce::reference(&picked, &t[1], soft_cap, &kept).unwrap()
        });
        let trained = place(&head, at);
        let values: Vec<bf16> = f64s(&head).into_iter().map(bf16::from_f64).collect();
        let dense = FrozenWeight::Dense(DenseTensor::from_bf16(vec![vocab, d], &values));
        // More visits than slots.
        let paged = PagedTable::visiting(&dense, vocab.div_ceil(5), &at.device).unwrap();
        let cache = DenseCache::new(&[], &at.device).unwrap();
        let head = Weight::on_device(dense, &cache.into()).unwrap();
        let head = Head { table: Table::Frozen(&head), soft_cap };
        let paged = Head { table: Table::Paged(&paged), soft_cap };
        let x = place(&x, at);
        let (losses, dx) = lce::backward(&x, head, &labels, 0.25, None).unwrap();
        let losses = losses.read().unwrap();
        let (total, exact) = (lce::total(&losses), f64s(&want.output.exact)[0]);
        assert!(
            (total - exact).abs() <= 1e-5 * exact,
            "loss {total}, reference {exact}"
        );
        // The gradient of the logits is rounded to bf16 on the way, to one part in 256.
        assert_close("dx", &dx, &want.grads[0].exact, 0.01);
        let d_head = place_f32(&Tensor::zeros((vocab, d), DType::F64, &Device::Cpu).unwrap(), at);
        let table = Head { table: Table::Trained(&trained, ComputeDtype::Bf16), soft_cap };
        let of_trained = lce::backward(&x, table, &labels, 0.25, Some(&d_head)).unwrap();
        assert_eq!(of_trained.0.read().unwrap(), losses);
        assert!(f64s(&of_trained.1) == f64s(&dx));
        // dz is rounded to bf16, and the rows of the labels are several times the RMS of all.
        assert_close("dW", &d_head, &want.grads[1].exact, 0.03);
        let found: Vec<u32> = losses.iter().map(|t| t.row as u32).collect();
        assert_eq!(found, rows);
        let again = lce::forward(&x, head, &labels).unwrap().read().unwrap();
        assert_eq!(again, losses);
        let of_paged = lce::backward(&x, paged, &labels, 0.25, None).unwrap();
        let losses_of_paged = of_paged.0.read().unwrap();
        assert_losses_close(&losses_of_paged, &losses);
        assert_close("dx of a paged head", &of_paged.1, &want.grads[0].exact, 0.01);
        let again = lce::forward(&x, paged, &labels).unwrap();
        assert_eq!(again.read().unwrap(), losses_of_paged);
        assert_close(
            "logits of a paged head",
            &lce::logits(&x, paged).unwrap(),
            &lce::logits(&x, head).unwrap(),
            1e-5,
        );
        let logits: Vec<Vec<f32>> = lce::logits(&x, head).unwrap().to_vec2().unwrap();
        for token in &losses {
            let row = &logits[token.row];
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let first = row.iter().position(|&z| z == largest).unwrap();
            assert_eq!(token.prediction as usize, first);
            let sum: f32 = row.iter().map(|z| (z - largest).exp()).sum();
            assert!((token.confidence * sum - 1.0).abs() < 1e-5);
        }
    }
});

placement_test!(in_every_order adamw_updates_the_master_as_its_reference_does, |at| {
    let mut numbers = Random::new("adamw");
    let n = 700;
    let upload = |t: &Tensor| place_f32(t, at);
    let (w, m) = (numbers.tensor(&[n]), numbers.tensor(&[n]));
    let v = numbers.tensor(&[n]).sqr().unwrap();
    let update = AdamW {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 3,
        grad_scale: 0.5,
    };
    let g = numbers.tensor(&[n]);
    let want = adamw::reference(&update, &w, &g, &m, &v).unwrap();
    let halves = f64s(&w).into_iter().map(|w| adamw::split_master(w as f32));
    let (high, low): (Vec<bf16>, Vec<i16>) = halves.unzip();
    let high = Tensor::from_vec(high, n, &at.device).unwrap();
    let low = Tensor::from_vec(low, n, &at.device).unwrap();
    let (m, v, g) = (upload(&m), upload(&v), upload(&g));
    let weight = adamw::Weight {
        value: &high,
        low: Some(&low),
    };
    let norm = adamw::squared_norm(&high, &g).unwrap();
    let exact: f64 = f64s(&g).iter().map(|g| g * g).sum();
    assert!(
        (norm - exact).abs() <= 1e-6 * exact,
        "{norm} instead of {exact}"
    );
    adamw::forward(&update, weight, &g, &m, &v).unwrap();
    let high: Vec<bf16> = high.to_vec1().unwrap();
    let low: Vec<i16> = low.to_vec1().unwrap();
    let masters = high
        .iter()
        .zip(&low)
        .map(|(&h, &l)| adamw::join_master(h, l));
    for ((master, high), exact) in masters.zip(&high).zip(f64s(&want[0])) {
        assert!(
            (f64::from(master) - exact).abs() <= 1e-6,
            "{master} instead of {exact}"
        );
        assert!((high.to_f64() - f64::from(master)).abs() <= f64::from(master).abs() / 256.0);
    }
});
