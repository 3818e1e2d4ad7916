//! A whole block against the same block composed of the references in f64, which finite differences prove.

mod oracle;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use oracle::{Random, assert_close, f32, f64s, oracle};
use qlora::device::{ComputeDtype, Placement};
use qlora::model::{
    ActivationPolicy, Decoder, DecoderConfig, InputGrad, Layout, LoraDropout, Module,
};
use qlora::ops::attention::{self, Heads, Segment, Segments};
use qlora::ops::dropout::Dropout;
use qlora::ops::linear::ReferenceLora;
use qlora::ops::matrix_dropout::{self, MatrixDropout};
use qlora::ops::rope::Positions;
use qlora::ops::soft_cap::SoftCap;
use qlora::ops::{gated_act, linear, residual, rms_norm, rope};
use qlora::store::{Adapter, Checkpoint};

const LENGTHS: [usize; 2] = [25, 17];

/// The frozen parts of block 0 in f64.
struct Frozen {
    weights: Vec<Tensor>,
    biases: Vec<Option<Tensor>>,
    input_norm: Option<Tensor>,
    mlp_norm: Option<Tensor>,
    /// After the attention and after the MLP, in units of the residual stream.
    branch_norms: Option<[Tensor; 2]>,
    qk_norm: Option<(Tensor, Tensor)>,
}

fn frozen(decoder: &Decoder, checkpoint: &Checkpoint) -> Frozen {
    let vector = |name: &str| {
        let stored = checkpoint.tensor(name).unwrap();
        let mut values = vec![0f32; stored.numel()];
        stored.read_range(0, &mut values);
        Tensor::from_vec(values, stored.shape, &Device::Cpu)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
    };
    let config = decoder.config();
    let offset = if config.norms_less_one { 1.0 } else { 0.0 };
    let norm = |name: &str| (vector(&format!("model.layers.0.{name}.weight")) + offset).unwrap();
    let branch_norm = |name: &str| (norm(name) / config.embedding_scale).unwrap();
    let weight = |module| {
        let weight = &decoder.linear(0, module).weight;
        let (rows, cols) = (weight.out_features(), weight.in_features());
        let mut values = vec![0f32; rows * cols];
        weight.read_tile(0..rows, 0..cols, &mut values);
        Tensor::from_vec(values, (rows, cols), &Device::Cpu)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
    };
    let bias = |module| {
        decoder
            .linear(0, module)
            .bias
            .as_ref()
            .map(|b| b.to_dtype(DType::F64).unwrap())
    };
    Frozen {
        weights: config.modules().map(weight).collect(),
        biases: config.modules().map(bias).collect(),
        input_norm: config.input_norms.then(|| norm("input_layernorm")),
        mlp_norm: config.input_norms.then(|| {
            norm(match config.branch_norms {
                true => "pre_feedforward_layernorm",
                false => "post_attention_layernorm",
            })
        }),
        branch_norms: config
            .branch_norms
            .then(|| ["post_attention_layernorm", "post_feedforward_layernorm"].map(branch_norm)),
        qk_norm: config
            .qk_norm
            .map(|_| (norm("self_attn.q_norm"), norm("self_attn.k_norm"))),
    }
}

/// `inputs`: x, then A and B of each module; `factors`: what dropout multiplies the input of each adapter by; `masks`: the
/// same for its matrices.
fn reference(
    inputs: &[Tensor],
    frozen: &Frozen,
    (cos, sin): (&Tensor, &Tensor),
    (segments, heads): (&[Segment], Heads),
    (config, scaling): (&DecoderConfig, f64),
    factors: Option<&[Tensor]>,
    masks: Option<&[(Tensor, Tensor)]>,
) -> Tensor {
    let project = |x: &Tensor, module: Module| {
        let i = module as usize;
        let (mut a, mut b) = (inputs[1 + 2 * i].clone(), inputs[2 + 2 * i].clone());
        if let Some(masks) = masks {
            a = a.broadcast_mul(&masks[i].0).unwrap();
            b = b.broadcast_mul(&masks[i].1).unwrap();
        }
        let lora = ReferenceLora {
            a: &a,
            b: &b,
            scaling,
            dropout: factors.map(|factors| &factors[i]),
        };
        linear::reference(x, &frozen.weights[i], frozen.biases[i].as_ref(), Some(lora)).unwrap()
    };
    let by_head = |t: Tensor| t.reshape((t.dim(0).unwrap(), (), heads.head_dim)).unwrap();
    let eps = config.rms_norm_eps;
    // To the norms on it the stream is as large as that of transformers, which is so many times it.
    let unit = config.embedding_scale * config.residual_multiplier;
    let stream_eps = eps / unit.powi(2);
    let read = |x: &Tensor, norm: Option<&Tensor>| match norm {
        Some(norm) => rms_norm::reference(x, norm, stream_eps).unwrap(),
        None => x.clone(),
    };
    let added = |out: Tensor, branch: usize| match &frozen.branch_norms {
        Some(norms) => rms_norm::reference(&out, &norms[branch], eps).unwrap(),
        None => out,
    };
    let x = &inputs[0];
    let h = read(x, frozen.input_norm.as_ref());
    let (mut q, mut k) = (project(&h, Module::Q), project(&h, Module::K));
    if let Some((q_norm, k_norm)) = &frozen.qk_norm {
        let normed = |t: &Tensor, norm: &Tensor| {
            let rows = t.reshape(((), norm.dims1().unwrap())).unwrap();
            let rows = rms_norm::reference(&rows, norm, eps).unwrap();
            rows.reshape(t.shape()).unwrap()
        };
        (q, k) = (normed(&q, q_norm), normed(&k, k_norm));
    }
    let (q, k) = (by_head(q), by_head(k));
    let (q, k) = (
        rope::reference(&q, cos, sin, rope::Pairs::Halves).unwrap(),
        rope::reference(&k, cos, sin, rope::Pairs::Halves).unwrap(),
    );
    let v = by_head(project(&h, Module::V));
    let out = attention::reference(&q, &k, &v, segments, heads).unwrap();
    let attended = project(&out.flatten_from(1).unwrap(), Module::O);
    let mid = residual::reference(x, &added(attended, 0)).unwrap();
    let h = read(&mid, frozen.mlp_norm.as_ref());
    let (gate, up) = (project(&h, Module::Gate), project(&h, Module::Up));
    let act = gated_act::reference(&gate, &up, config.activation).unwrap();
    residual::reference(&mid, &added(project(&act, Module::Down), 1)).unwrap()
}

fn check(case: &str, dropout: LoraDropout) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/engine")
        .join(case);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, &Placement::cpu()).unwrap();
    decoder
        .load_adapter(&Adapter::read(dir.join("adapter")).unwrap())
        .unwrap();
    let config = decoder.config().clone();
    let heads = Heads {
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        window: config.sliding_window[0],
        scale: config.attention_scale as f32,
        soft_cap: config.attention_soft_cap.map(|cap| SoftCap(cap as f32)),
        compute_dtype: ComputeDtype::F32,
    };
    let mut random = Random::new(case);
    let n = LENGTHS.iter().sum();
    let segment = |r: std::ops::Range<usize>| Segment {
        queries: r.clone(),
        keys: r,
    };
    let segments = Segments::from(vec![segment(0..LENGTHS[0]), segment(LENGTHS[0]..n)]);
    let positions: Vec<u32> = LENGTHS.iter().flat_map(|&len| 0..len as u32).collect();
    let rope = decoder.rope_tables(LENGTHS[0]).unwrap();
    let table = rope.of(config.layer_rope[0]).expect("block 0 has one");
    let (cos, sin) = table.gather(&positions).unwrap();
    let (cos, sin) = (
        cos.to_dtype(DType::F64).unwrap(),
        sin.to_dtype(DType::F64).unwrap(),
    );

    let x = random.tensor(&[n, config.hidden_size]);
    let dy = random.tensor(&[n, config.hidden_size]);
    let block = &decoder.blocks()[0];
    let mut inputs = vec![x.clone()];
    for module in config.modules() {
        let lora = decoder
            .linear(0, module)
            .lora
            .as_ref()
            .expect("the fixture targets every layer");
        inputs.extend([&lora.a, &lora.b].map(|t| t.value.to_dtype(DType::F64).unwrap()));
    }
    let scaling = decoder.linear(0, Module::Q).lora.as_ref().unwrap().scaling;
    let frozen = frozen(&decoder, &checkpoint);
    let factors = dropout.inputs.map(|dropout| {
        let of_module = |module| {
            let mask = dropout.mask(0, module as usize);
            mask.reference(n, config.linear_shape(module).1).unwrap()
        };
        config.modules().map(of_module).collect::<Vec<_>>()
    });
    let factors = factors.as_ref().map(|factors| &factors[..]);
    let masks = dropout.matrices.map(|dropout| {
        let of_module = |module| {
            let (d_out, d_in) = config.linear_shape(module);
            let masks = dropout.masks(0, module as usize, 0);
            matrix_dropout::reference(&masks, d_in, d_out).unwrap()
        };
        config.modules().map(of_module).collect::<Vec<_>>()
    });
    let masks = masks.as_ref().map(|masks| &masks[..]);
    let (want, grads) = oracle(&mut random, &inputs, &dy, |t| {
        reference(
            t,
            &frozen,
            (&cos, &sin),
            (&segments, heads),
            (&config, scaling),
            factors,
            masks,
        )
    });

    let rows = Positions::new(&positions);
    let layout = Layout {
        positions: &rows,
        segments: &segments,
        rope: &rope,
        dropout,
    };
    let mut kept = Vec::new();
    for policy in [ActivationPolicy::Keep, ActivationPolicy::Recompute] {
        for (_, trainable) in decoder.trainables() {
            qlora::ops::adamw::zero(&trainable.grad).unwrap();
        }
        let (y, saved) = block.forward(&f32(&x), &layout, policy).unwrap();
        assert_close("y", &y, &want, 2e-5);
        let dx = block
            .backward(f32(&dy), saved, &layout, InputGrad::Needed)
            .unwrap()
            .unwrap();
        assert_close("dx", &dx, &grads[0], 1e-4);
        let mut bits = f64s(&dx);
        for (i, module) in config.modules().enumerate() {
            let lora = decoder.linear(0, module).lora.as_ref().unwrap();
            assert_close(
                &format!("dA of {}", module.name()),
                &lora.a.grad,
                &grads[1 + 2 * i],
                1e-4,
            );
            assert_close(
                &format!("dB of {}", module.name()),
                &lora.b.grad,
                &grads[2 + 2 * i],
                1e-4,
            );
            bits.extend(f64s(&lora.a.grad));
            bits.extend(f64s(&lora.b.grad));
        }
        kept.push(bits);
    }
    assert!(kept[0] == kept[1], "{case}: Keep and Recompute differ");
}

#[test]
fn a_block_of_odd_sizes_equals_its_reference() {
    check("llama_odd", LoraDropout::default());
}

#[test]
fn a_block_with_query_and_key_norm_equals_its_reference() {
    check("qwen3", LoraDropout::default());
}

#[test]
fn a_block_with_dropout_equals_its_reference() {
    let inputs = Dropout::new(0.3, 5, 6, 7);
    for case in ["llama_odd", "qwen3", "qwen2", "gemma3", "olmo2"] {
        let matrices = None;
        check(case, LoraDropout { inputs, matrices });
    }
}

#[test]
fn a_block_with_dropout_on_matrices_equals_its_reference() {
    let matrices = MatrixDropout::new(0.5, 5, (6, 7), 1);
    for (case, inputs) in [
        ("llama_odd", None),
        ("qwen3", Dropout::new(0.3, 5, 6, 7)),
        ("qwen2", None),
        ("gemma3", None),
        ("olmo2", None),
    ] {
        check(case, LoraDropout { inputs, matrices });
    }
}

#[test]
fn a_block_with_norms_on_its_branches_equals_its_reference() {
    check("gemma3", LoraDropout::default());
}

#[test]
fn a_block_with_norms_on_its_branches_alone_equals_its_reference() {
    check("olmo2", LoraDropout::default());
    check("olmo3", LoraDropout::default());
}

#[test]
fn a_block_whose_stream_has_a_unit_equals_its_reference() {
    check("granite", LoraDropout::default());
}

#[test]
fn a_block_with_biases_equals_its_reference() {
    check("qwen2", LoraDropout::default());
}

#[test]
fn a_block_with_a_sliding_window_equals_its_reference() {
    check("mistral_sw", LoraDropout::default());
}
