//! Every operation's forward and backward against its reference in f64, and the references against finite differences.

mod oracle;

use candle_core::{DType, Device, Tensor};
use oracle::{Random, assert_close, f32, f64s, oracle, segments};
use qlora::IGNORE_INDEX;
use qlora::device::ComputeDtype;
use qlora::ops::adamw::{self, AdamW};
use qlora::ops::attention::{self, Heads, Segment, Segments};
use qlora::ops::dropout::Dropout;
use qlora::ops::gated_act::Activation;
use qlora::ops::linear::{self, Lora, LoraGrad, ReferenceLora};
use qlora::ops::linear_cross_entropy::{self as lce, Head};
use qlora::ops::rope::{self, Pairs, Positions, RopeTable};
use qlora::ops::soft_cap::SoftCap;
use qlora::ops::table::Table;
use qlora::ops::weight::Weight;
use qlora::ops::{embedding, gated_act, residual, rms_norm, scale};
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

fn dense(t: &Tensor) -> Weight {
    FrozenWeight::Dense(stored(t)).into()
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

#[test]
fn linear_with_lora_equals_its_reference() {
    let mut random = Random::new("linear");
    let mask = Dropout::new(0.4, 1, 2, 3).unwrap().mask(4, 5);
    for (n, d_in, d_out, r, mask) in [
        (5, 42, 30, 3, None),
        (67, 80, 300, 4, None),
        (1, 200, 7, 1, None),
        (5, 42, 30, 3, Some(mask)),
        (67, 80, 300, 33, Some(mask)),
        // More than a block of rows and of columns.
        (259, 271, 40, 5, Some(mask)),
    ] {
        let factors = mask.map(|mask| mask.reference(n, d_in).unwrap());
        let (x, w) = (random.tensor(&[n, d_in]), random.tensor(&[d_out, d_in]));
        let (weight, w) = quantized(&w);
        let bias = random.tensor(&[d_out]);
        let (a, b) = (random.tensor(&[r, d_in]), random.tensor(&[d_out, r]));
        let dy = random.tensor(&[n, d_out]);
        let inputs = [x.clone(), a.clone(), b.clone()];
        let (want, grads) = oracle(&mut random, &inputs, &dy, |t| {
            let lora = ReferenceLora {
                a: &t[1],
                b: &t[2],
                scaling: 0.5,
                dropout: factors.as_ref(),
            };
            linear::reference(&t[0], &w, Some(&bias), Some(lora)).unwrap()
        });
        let (x, a, b, bias, dy) = (f32(&x), f32(&a), f32(&b), f32(&bias), f32(&dy));
        let lora = Lora {
            a: &a,
            b: &b,
            scaling: 0.5,
            mask,
            compute_dtype: ComputeDtype::F32,
        };
        let (y, u) = linear::forward(&x, &weight, Some(&bias), Some(lora)).unwrap();
        assert_close("y", &y, &want, TOLERANCE);
        let (d_a, d_b) = (zeros_like(&a), zeros_like(&b));
        let grad = LoraGrad {
            d_a: &d_a,
            d_b: &d_b,
        };
        let du = linear::backward_lora(&dy, &x, &u.unwrap(), lora, grad).unwrap();
        let dx = linear::backward_input(&dy, &weight, Some((&du, lora)), None).unwrap();
        assert_close("dx", &dx, &grads[0], TOLERANCE);
        assert_close("dA", &d_a, &grads[1], TOLERANCE);
        assert_close("dB", &d_b, &grads[2], TOLERANCE);
        let twice = linear::backward_input(&dy, &weight, Some((&du, lora)), Some(dx)).unwrap();
        assert_close(
            "dx added to dx",
            &twice,
            &(&grads[0] * 2.0).unwrap(),
            TOLERANCE,
        );
    }
}

#[test]
fn rms_norm_equals_its_reference() {
    let mut random = Random::new("rms_norm");
    for (n, d) in [(3, 42), (65, 96), (1, 7)] {
        let (x, w, dy) = (
            random.tensor(&[n, d]),
            random.tensor(&[d]),
            random.tensor(&[n, d]),
        );
        let (want, grads) = oracle(&mut random, std::slice::from_ref(&x), &dy, |t| {
            rms_norm::reference(&t[0], &w, 1e-5).unwrap()
        });
        let (x, w, dy) = (f32(&x), f32(&w), f32(&dy));
        assert_close(
            "y",
            &rms_norm::forward(&x, &w, 1e-5).unwrap(),
            &want,
            TOLERANCE,
        );
        let dx = zeros_like(&x);
        rms_norm::backward(&dy, &x, &w, 1e-5, &dx).unwrap();
        assert_close("dx", &dx, &grads[0], TOLERANCE);
        rms_norm::backward(&dy, &x, &w, 1e-5, &dx).unwrap();
        assert_close(
            "dx added to dx",
            &dx,
            &(&grads[0] * 2.0).unwrap(),
            TOLERANCE,
        );
    }
}

#[test]
fn gated_act_equals_its_reference() {
    let mut random = Random::new("gated_act");
    let shape = [42, 1000];
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let (gate, up) = (
            (random.tensor(&shape) * 8.0).unwrap(),
            random.tensor(&shape),
        );
        let dy = random.tensor(&shape);
        let inputs = [gate.clone(), up.clone()];
        let (want, grads) = oracle(&mut random, &inputs, &dy, |t| {
            gated_act::reference(&t[0], &t[1], activation).unwrap()
        });
        let (gate, up) = (f32(&gate), f32(&up));
        let y = gated_act::forward(&gate, &up, activation).unwrap();
        assert_close("y", &y, &want, TOLERANCE);
        gated_act::backward(&f32(&dy), &gate, &up, activation).unwrap();
        assert_close("d_gate", &gate, &grads[0], TOLERANCE);
        assert_close("d_up", &up, &grads[1], TOLERANCE);
    }
}

#[test]
fn residual_equals_its_reference() {
    let mut random = Random::new("residual");
    let (x, branch) = (random.tensor(&[300, 130]), random.tensor(&[300, 130]));
    let want = residual::reference(&x, &branch).unwrap();
    assert_close(
        "y",
        &residual::forward(&f32(&x), f32(&branch)).unwrap(),
        &want,
        TOLERANCE,
    );
}

#[test]
fn scale_multiplies_in_place() {
    let x = Random::new("scale").tensor(&[300, 130]);
    let found = f32(&x);
    scale::in_place(&found, 54.5).unwrap();
    assert_close("x", &found, &(x * 54.5).unwrap(), TOLERANCE);
}

#[test]
fn embedding_equals_its_reference() {
    let mut random = Random::new("embedding");
    let table = random.tensor(&[17, 10]);
    let ids = [3u32, 16, 0, 3];
    let want = embedding::reference(&Tensor::new(&ids, &Device::Cpu).unwrap(), &table).unwrap();
    assert_close(
        "rows",
        &embedding::forward(&ids, &dense(&table)).unwrap(),
        &want,
        1e-7,
    );
    assert!(
        embedding::forward(&[17], &dense(&table))
            .unwrap_err()
            .to_string()
            .contains("below 17")
    );
}

#[test]
fn the_gradient_of_a_trained_embedding_equals_its_reference() {
    let mut random = Random::new("embedding_backward");
    let (table, dy) = (random.tensor(&[17, 10]), random.tensor(&[6, 10]));
    let ids = [3u32, 16, 0, 3, 16, 3];
    let index = Tensor::new(&ids, &Device::Cpu).unwrap();
    let inputs = std::slice::from_ref(&table);
    let (want, grads) = oracle(&mut random, inputs, &dy, |t| {
        embedding::reference(&index, &t[0]).unwrap()
    });
    let (table, dy) = (f32(&table), f32(&dy));
    let y = embedding::forward(&ids, Table::Trained(&table, ComputeDtype::F32)).unwrap();
    assert_close("rows", &y, &want, 1e-7);
    let d_table = zeros_like(&table);
    embedding::backward(&dy, &ids, None, &d_table).unwrap();
    assert_close("d_table", &d_table, &grads[0], 1e-6);
    // It is added, and the row of the padding token is left alone.
    embedding::backward(&dy, &ids, Some(16), &d_table).unwrap();
    let twice = (&grads[0] * 2.0).unwrap();
    for word in [0usize, 3, 16] {
        let row = |t: &Tensor| t.get(word).unwrap();
        let want = if word == 16 { &grads[0] } else { &twice };
        assert_close("row", &row(&d_table), &row(want), 1e-6);
    }
    for (rows, ids) in [(6, [3u32, 16, 0, 3, 16, 17]), (5, ids)] {
        let dy = dy.narrow(0, 0, rows).unwrap();
        assert!(embedding::backward(&dy, &ids, None, &d_table).is_err());
    }
}

#[test]
fn rope_equals_its_reference() {
    let mut random = Random::new("rope");
    // Whole heads, heads of which a part turns, and neighbours.
    for (heads, e, pairs) in [
        (3, 10, Pairs::Halves),
        (2, 16, Pairs::Halves),
        (2, 16, Pairs::Neighbours),
    ] {
        let positions: Vec<u32> = (0..40).chain(0..27).collect();
        let n = positions.len();
        let table = RopeTable::new(&[1.0, 0.3, 0.1, 0.03, 0.01], 1.1, 40)
            .for_heads_of(e)
            .turning(pairs);
        let (x, dy) = (random.tensor(&[n, heads, e]), random.tensor(&[n, heads, e]));
        let (cos, sin) = table.gather(&positions).unwrap();
        let (cos, sin) = (
            cos.to_dtype(DType::F64).unwrap(),
            sin.to_dtype(DType::F64).unwrap(),
        );
        let (want, grads) = oracle(&mut random, std::slice::from_ref(&x), &dy, |t| {
            rope::reference(&t[0], &cos, &sin, pairs).unwrap()
        });
        let flat = |t: &Tensor| f32(t).reshape((n, heads * e)).unwrap();
        let (x, dy) = (flat(&x), flat(&dy));
        let (rows, past_end) = (Positions::new(&positions), Positions::new(&[40; 67]));
        let keys = x.copy().unwrap();
        rope::forward(&x, &keys, &rows, &table).unwrap();
        assert_close("q", &x, &want, TOLERANCE);
        assert_close("k", &keys, &want, TOLERANCE);
        let d_keys = dy.copy().unwrap();
        rope::backward(&dy, &d_keys, &rows, &table).unwrap();
        assert_close("dq", &dy, &grads[0], TOLERANCE);
        assert_close("dk", &d_keys, &grads[0], TOLERANCE);
        assert!(
            rope::forward(&x, &keys, &past_end, &table).is_err(),
            "a position past the table is refused"
        );
    }
}

#[test]
fn attention_equals_its_reference() {
    let mut random = Random::new("attention");
    let heads = |num_heads, num_kv_heads, head_dim, window| Heads {
        num_heads,
        num_kv_heads,
        head_dim,
        window,
        scale: attention::default_scale(head_dim),
        soft_cap: None,
        compute_dtype: ComputeDtype::F32,
    };
    let capped = |heads| Heads {
        soft_cap: Some(SoftCap(2.0)),
        ..heads
    };
    for (lengths, heads) in [
        (vec![42], heads(6, 2, 8, None)),
        (vec![1, 70, 5], heads(4, 4, 6, None)),
        (vec![150, 20], heads(2, 1, 4, Some(12))),
        (vec![130], heads(2, 2, 4, Some(100))),
        (vec![9, 80], capped(heads(4, 2, 8, Some(50)))),
    ] {
        let n = lengths.iter().sum();
        let segments = Segments::from(segments(&lengths));
        let (h, k, e) = (heads.num_heads, heads.num_kv_heads, heads.head_dim);
        let q = (random.tensor(&[n, h, e]) * 3.0).unwrap();
        let (keys, v) = (random.tensor(&[n, k, e]), random.tensor(&[n, k, e]));
        let dy = random.tensor(&[n, h, e]);
        let inputs = [q.clone(), keys.clone(), v.clone()];
        let (want, grads) = oracle(&mut random, &inputs, &dy, |t| {
            attention::reference(&t[0], &t[1], &t[2], &segments, heads).unwrap()
        });
        let flat = |t: &Tensor| f32(t).flatten_from(1).unwrap();
        let (q, keys, v, dy) = (flat(&q), flat(&keys), flat(&v), flat(&dy));
        let saved = attention::forward(&q, &keys, &v, &segments, heads).unwrap();
        assert_close("out", &saved.out, &want, TOLERANCE);
        let (dq, dk, dv) =
            attention::backward(&dy, (&q, &keys, &v), &saved, &segments, heads).unwrap();
        assert_close("dq", &dq, &grads[0], 2.0 * TOLERANCE);
        assert_close("dk", &dk, &grads[1], 2.0 * TOLERANCE);
        assert_close("dv", &dv, &grads[2], TOLERANCE);
    }
}

#[test]
fn attention_with_a_cache_equals_the_last_rows_of_the_whole() {
    let mut random = Random::new("cache");
    let heads = Heads {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 6,
        window: Some(9),
        scale: attention::default_scale(6),
        soft_cap: None,
        compute_dtype: ComputeDtype::F32,
    };
    let n = 30;
    let q = f32(&random.tensor(&[n, 24]));
    let (k, v) = (f32(&random.tensor(&[n, 12])), f32(&random.tensor(&[n, 12])));
    let whole = attention::forward(&q, &k, &v, &segments(&[n]).into(), heads)
        .unwrap()
        .out;
    let last = q.narrow(0, n - 3, 3).unwrap().contiguous().unwrap();
    let segment = Segment {
        queries: 0..3,
        keys: 0..n,
    };
    let cached = attention::forward(&last, &k, &v, &vec![segment].into(), heads)
        .unwrap()
        .out;
    assert_close("out", &cached, &whole.narrow(0, n - 3, 3).unwrap(), 1e-6);
}

#[test]
fn linear_cross_entropy_equals_its_reference() {
    let mut random = Random::new("linear_cross_entropy");
    for (n, d, vocab, soft_cap) in [
        (42, 20, 301, None),
        (5, 8, 70_000, None),
        (42, 20, 1301, Some(SoftCap(3.0))),
    ] {
        let (x, head) = (random.tensor(&[n, d]), random.tensor(&[vocab, d]));
        let labels: Vec<i64> = (0..n)
            .map(|i| {
                if i % 3 == 1 {
                    IGNORE_INDEX
                } else {
                    (i * 37 % vocab) as i64
                }
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
        let (want, grads) = oracle(&mut random, &inputs, &d_loss, |t| {
            lce::reference(
                &t[0].index_select(&picked, 0).unwrap(),
                &t[1],
                soft_cap,
                &kept,
            )
            .unwrap()
        });
        let frozen = dense(&head);
        let frozen = Head {
            table: Table::Frozen(&frozen),
            soft_cap,
        };
        let (losses, dx) = lce::backward(&f32(&x), frozen, &labels, 0.25, None).unwrap();
        let losses = losses.read().unwrap();
        let total = lce::total(&losses);
        let want = want.to_scalar::<f64>().unwrap();
        assert!(
            (total - want).abs() <= 1e-6 * want.abs(),
            "loss {total}, reference {want}"
        );
        assert_close("dx", &dx, &grads[0], TOLERANCE);
        let head_values = f32(&head);
        let (trained, d_head) = (
            Head {
                table: Table::Trained(&head_values, ComputeDtype::F32),
                soft_cap,
            },
            zeros_like(&head),
        );
        let of_trained = lce::backward(&f32(&x), trained, &labels, 0.25, Some(&d_head)).unwrap();
        assert_eq!(of_trained.0.read().unwrap(), losses);
        assert_eq!(f64s(&of_trained.1), f64s(&dx));
        assert_close("dW", &d_head, &grads[1], TOLERANCE);
        lce::backward(&f32(&x), trained, &labels, 0.25, Some(&d_head)).unwrap();
        let twice = (&grads[1] * 2.0).unwrap();
        assert_close("dW added to dW", &d_head, &twice, TOLERANCE);
        let logits = |head| f64s(&lce::logits(&f32(&x), head).unwrap());
        assert_eq!(logits(trained), logits(frozen));
        assert_eq!(
            losses.iter().map(|t| t.row as u32).collect::<Vec<_>>(),
            rows
        );
        assert_eq!(
            lce::forward(&f32(&x), frozen, &labels)
                .unwrap()
                .read()
                .unwrap(),
            losses
        );
    }
}

#[test]
fn linear_cross_entropy_refuses_labels_beyond_the_vocabulary() {
    let (x, head) = (
        Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap(),
        Random::new("v").tensor(&[10, 4]),
    );
    for label in [10, -1, i64::MAX] {
        let error = lce::forward(&x, &dense(&head), &[label])
            .unwrap_err()
            .to_string();
        assert!(error.contains(&label.to_string()), "{error}");
    }
}

#[test]
fn adamw_equals_its_reference() {
    let mut random = Random::new("adamw");
    let shape = [42, 11];
    let (w, m) = (random.tensor(&shape), random.tensor(&shape));
    let v = random.tensor(&shape).sqr().unwrap();
    for step in [1, 2, 1000] {
        let update = AdamW {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step,
            grad_scale: 0.5,
        };
        let g = random.tensor(&shape);
        let want = adamw::reference(&update, &w, &g, &m, &v).unwrap();
        let (w, m, v) = (f32(&w), f32(&m), f32(&v));
        let weight = adamw::Weight {
            value: &w,
            low: None,
        };
        adamw::forward(&update, weight, &f32(&g), &m, &v).unwrap();
        for (name, got, want) in [
            ("weight", &w, &want[0]),
            ("m", &m, &want[1]),
            ("v", &v, &want[2]),
        ] {
            assert_close(name, got, want, TOLERANCE);
        }
        let norm = adamw::squared_norm(&w, &f32(&g)).unwrap().sqrt();
        assert!((norm - f64s(&g).iter().map(|g| g * g).sum::<f64>().sqrt()).abs() < 1e-12);
    }
}
