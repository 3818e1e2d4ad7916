//! `qlora bench kernels`: the rate of each operation, as a share of what the device can copy and multiply.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use qlora::device::{self, ComputeDtype, DeviceKind, Placement};
use qlora::ops::adamw::{self, AdamW};
use qlora::ops::attention::{self, Heads, Segment, Segments};
use qlora::ops::dropout::Dropout;
use qlora::ops::gated_act::Activation;
use qlora::ops::linear::{self, Lora, LoraGrad};
use qlora::ops::rope::{self, Positions, RopeTable};
use qlora::ops::weight::{DenseCache, Weight};
use qlora::ops::{gated_act, residual, rms_norm};
use qlora::quant::{DenseTensor, FrozenWeight, Params4bit, QuantizeOptions};
use serde_json::json;

const WARM_UP: usize = 3;
const ROUNDS: usize = 10;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// cpu or cuda
    #[arg(long, value_name = "NAME", default_value = "cuda", value_parser = crate::commands::model_args::parse_device)]
    device: DeviceKind,
    /// What products take their factors in: f32 (unset) or bf16 on the CPU, bf16 on CUDA
    #[arg(long = "compute_dtype", alias = "compute-dtype", value_name = "NAME", value_parser = crate::commands::model_args::parse_dtype)]
    compute_dtype: Option<ComputeDtype>,
    /// Tokens of a batch
    #[arg(long, value_name = "N", default_value_t = 8192)]
    tokens: usize,
    /// Width of the residual stream; the MLP is 2.6875 times as wide, as in Llama
    #[arg(
        long = "hidden_size",
        alias = "hidden-size",
        value_name = "N",
        default_value_t = 8192
    )]
    hidden_size: usize,
    /// Query heads of 128 columns
    #[arg(
        long = "num_attention_heads",
        alias = "num-attention-heads",
        value_name = "N",
        default_value_t = 32
    )]
    num_attention_heads: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What an operation did in one call.
enum Work {
    Bytes(usize),
    Flops(usize),
}

struct Measured {
    name: String,
    seconds: f64,
    work: Work,
}

impl Measured {
    /// GB/s or TFLOP/s.
    fn rate(&self) -> f64 {
        match self.work {
            Work::Bytes(bytes) => bytes as f64 / self.seconds / 1e9,
            Work::Flops(flops) => flops as f64 / self.seconds / 1e12,
        }
    }

    fn unit(&self) -> &'static str {
        match self.work {
            Work::Bytes(_) => "GB/s",
            Work::Flops(_) => "TFLOP/s",
        }
    }
}

/// Where operations are measured, and the measurements so far; the first two are the limits: a copy and a product.
struct Bench {
    placement: Placement,
    measured: Vec<Measured>,
}

/// FLOP/s of a product of `[n, d]` with a dense weight `[d, d]`.
pub fn product_rate(placement: &Placement, n: usize, d: usize) -> anyhow::Result<f64> {
    let mut bench = Bench {
        placement: placement.clone(),
        measured: Vec::new(),
    };
    bench.product(n, d)?;
    Ok(bench.measured.iter().map(Measured::rate).sum::<f64>() * 1e12)
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let placement = crate::commands::open(args.device, args.compute_dtype)?;
    let mut bench = Bench {
        placement,
        measured: Vec::new(),
    };
    bench.limits(&args)?;
    bench.weights(&args)?;
    bench.elementwise(&args)?;
    bench.adapters(&args)?;
    let mut segments = [2048, 8192]
        .map(|segment| segment.min(args.tokens))
        .to_vec();
    segments.dedup();
    for segment in segments {
        bench.attention(&args, segment)?;
    }
    bench.optimizer()?;
    bench.print(args.json);
    Ok(())
}

impl Bench {
    /// The median time of one call.
    fn measure(
        &mut self,
        name: impl Into<String>,
        work: Work,
        mut call: impl FnMut() -> qlora::Result<()>,
    ) -> anyhow::Result<()> {
        for _ in 0..WARM_UP {
            call()?;
        }
        let mut seconds = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            seconds.push(self.time(&mut call)?);
        }
        seconds.sort_by(f64::total_cmp);
        self.measured.push(Measured {
            name: name.into(),
            seconds: seconds[ROUNDS / 2],
            work,
        });
        Ok(())
    }

    fn time(&self, call: &mut dyn FnMut() -> qlora::Result<()>) -> qlora::Result<f64> {
        match device::runtime(&self.placement.device) {
            Some(runtime) => runtime.time(call),
            None => {
                let started = Instant::now();
                call()?;
                Ok(started.elapsed().as_secs_f64())
            }
        }
    }

    /// Bytes of an activation.
    fn width(&self) -> usize {
        self.placement.dtype.size_in_bytes()
    }

    fn random(&self, shape: (usize, usize)) -> anyhow::Result<Tensor> {
        let Placement { device, dtype, .. } = &self.placement;
        Ok(Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(*dtype)?)
    }

    fn ones(&self, len: usize) -> anyhow::Result<Tensor> {
        Ok(Tensor::ones(len, DType::F32, &self.placement.device)?)
    }

    fn limits(&mut self, args: &Args) -> anyhow::Result<()> {
        let (n, d) = (args.tokens, args.hidden_size);
        let x = self.random((n, d))?;
        let bytes = 2 * n * d * self.width();
        self.measure("copy", Work::Bytes(bytes), || {
            x.copy()?;
            Ok(())
        })?;
        self.product(n, d)
    }

    fn product(&mut self, n: usize, d: usize) -> anyhow::Result<()> {
        let x = self.random((n, d))?;
        let weight = self.dense_weight(d, d)?;
        let name = format!("product {n} x {d} x {d}");
        self.measure(name, Work::Flops(2 * n * d * d), || {
            linear::forward(&x, &weight, None, None)?;
            Ok(())
        })
    }

    /// Random values: products of equal ones take less power, and are up to a fifth faster for it.
    fn random_weight(&self, d_out: usize, d_in: usize) -> anyhow::Result<DenseTensor> {
        let values = self.random((d_out, d_in))?.to_dtype(DType::BF16)?;
        let values = values.flatten_all()?;
        Ok(DenseTensor::from_bf16(
            vec![d_out, d_in],
            &values.to_vec1::<half::bf16>()?,
        ))
    }

    fn dense_weight(&self, d_out: usize, d_in: usize) -> anyhow::Result<Weight> {
        let weight = FrozenWeight::Dense(self.random_weight(d_out, d_in)?);
        if !self.placement.uses_kernels() {
            return Ok(Weight::on_host(weight, self.placement.compute_dtype));
        }
        let cache = DenseCache::new(&[], &self.placement.device)?;
        Ok(Weight::on_device(weight, &cache.into())?)
    }

    /// Dequantization of a weight of the MLP.
    fn weights(&mut self, args: &Args) -> anyhow::Result<()> {
        if !self.placement.uses_kernels() {
            return Ok(());
        }
        let shape = [args.hidden_size, mlp_width(args.hidden_size)];
        let elements = shape[0] * shape[1];
        let dense = self.random_weight(shape[0], shape[1])?;
        let params = Params4bit::quantize("weight", &dense, QuantizeOptions::default())?;
        let read = params.nbytes();
        let cache = std::sync::Arc::new(DenseCache::new(&[elements], &self.placement.device)?);
        let frozen = FrozenWeight::Quantized(params);
        // There is room for one at a time, so that each call finds the other there.
        let weights = [
            Weight::on_device(frozen.clone(), &cache)?,
            Weight::on_device(frozen, &cache)?,
        ];
        let mut next = 0;
        let name = format!("nf4 dequantize {} x {}", shape[0], shape[1]);
        self.measure(name, Work::Bytes(read + 2 * elements), || {
            next = 1 - next;
            weights[next].dequantize()
        })
    }

    fn elementwise(&mut self, args: &Args) -> anyhow::Result<()> {
        let (n, d) = (args.tokens, args.hidden_size);
        let moved = |columns: usize| n * columns * self.width();
        let (small, wide) = (moved(d), moved(mlp_width(d)));
        let (x, dy) = (self.random((n, d))?, self.random((n, d))?);
        let weight = self.ones(d)?;
        self.measure("rms_norm forward", Work::Bytes(2 * small), || {
            rms_norm::forward(&x, &weight, 1e-5)?;
            Ok(())
        })?;
        let branch = self.random((n, d))?;
        self.measure("rms_norm with residual", Work::Bytes(4 * small), || {
            rms_norm::forward_residual(&x, branch.clone(), &weight, 1e-5)?;
            Ok(())
        })?;
        let dx = self.random((n, d))?;
        self.measure("rms_norm backward", Work::Bytes(4 * small), || {
            rms_norm::backward(&dy, &x, &weight, 1e-5, &dx)
        })?;
        self.measure("residual", Work::Bytes(3 * small), || {
            residual::forward(&x, branch.clone())?;
            Ok(())
        })?;
        let (gate, up) = (
            self.random((n, mlp_width(d)))?,
            self.random((n, mlp_width(d)))?,
        );
        self.measure("gated_act forward", Work::Bytes(3 * wide), || {
            gated_act::forward(&gate, &up, Activation::Silu)?;
            Ok(())
        })?;
        let d_act = self.random((n, mlp_width(d)))?;
        self.measure("gated_act backward", Work::Bytes(5 * wide), || {
            gated_act::backward(&d_act, &gate, &up, Activation::Silu)
        })?;
        let half = 64;
        let frequencies: Vec<f32> = (0..half).map(|i| 1e-4f32.powf(i as f32 / 64.0)).collect();
        let device = &self.placement.device;
        let table = RopeTable::new(&frequencies, 1.0, n).on(device)?;
        let positions: Vec<u32> = (0..n as u32).collect();
        let positions = Positions::new(&positions);
        let positions = match self.placement.uses_kernels() {
            true => positions.on(device)?,
            false => positions,
        };
        let width = d / (2 * half) * 2 * half;
        let (q, k) = (self.random((n, width))?, self.random((n, width))?);
        let heads = n * width * self.width();
        self.measure("rope", Work::Bytes(4 * heads), || {
            rope::forward(&q, &k, &positions, &table)
        })
    }

    /// A layer of the MLP with a dense weight, without an adapter and with one, and with its dropout.
    fn adapters(&mut self, args: &Args) -> anyhow::Result<()> {
        const R: usize = 64;
        let (n, d_in) = (args.tokens, args.hidden_size);
        let d_out = mlp_width(d_in);
        let weight = self.dense_weight(d_out, d_in)?;
        let (x, dy) = (self.random((n, d_in))?, self.random((n, d_out))?);
        let (a, b) = (self.random((R, d_in))?, self.random((d_out, R))?);
        let [d_a, d_b] = [(R, d_in), (d_out, R)]
            .map(|shape| Tensor::zeros(shape, DType::F32, &self.placement.device));
        let (d_a, d_b) = (d_a?, d_b?);
        let grad = LoraGrad {
            d_a: &d_a,
            d_b: &d_b,
        };
        let of_base = 2 * n * d_in * d_out;
        let (of_a, of_b) = (2 * n * R * d_in, 2 * n * R * d_out);
        self.measure("linear forward", Work::Flops(of_base), || {
            linear::forward(&x, &weight, None, None)?;
            Ok(())
        })?;
        self.measure("linear input gradient", Work::Flops(of_base), || {
            linear::backward_input(&dy, &weight, None, None)?;
            Ok(())
        })?;
        let mask = Dropout::new(0.05, 0, 0, 0).map(|dropout| dropout.mask(0, 0));
        for (mask, with) in [
            (None, "with an adapter"),
            (mask, "with an adapter, dropout"),
        ] {
            let lora = Lora {
                a: &a,
                b: &b,
                scaling: 0.25,
                mask,
                compute_dtype: self.placement.compute_dtype,
            };
            let u = linear::down_project(&x, lora)?;
            let du = linear::backward_lora(&dy, &x, &u, lora, grad)?;
            let forward = Work::Flops(of_base + of_a + of_b);
            self.measure(format!("linear forward {with}"), forward, || {
                linear::forward(&x, &weight, None, Some(lora))?;
                Ok(())
            })?;
            let input_gradient = Work::Flops(of_base + of_a);
            self.measure(
                format!("linear input gradient {with}"),
                input_gradient,
                || {
                    linear::backward_input(&dy, &weight, Some((&du, lora)), None)?;
                    Ok(())
                },
            )?;
            let gradients = Work::Flops(of_a + 2 * of_b);
            self.measure(format!("adapter's gradients {with}"), gradients, || {
                linear::backward_lora(&dy, &x, &u, lora, grad)?;
                Ok(())
            })?;
        }
        Ok(())
    }

    fn attention(&mut self, args: &Args, segment: usize) -> anyhow::Result<()> {
        let (n, num_heads, head_dim) = (
            args.tokens / segment * segment,
            args.num_attention_heads,
            128,
        );
        let heads = Heads {
            num_heads,
            num_kv_heads: num_heads,
            head_dim,
            window: None,
            scale: attention::default_scale(head_dim),
            soft_cap: None,
            compute_dtype: self.placement.compute_dtype,
        };
        let list = (0..n / segment).map(|i| Segment {
            queries: i * segment..(i + 1) * segment,
            keys: i * segment..(i + 1) * segment,
        });
        let mut segments = Segments::from(list.collect::<Vec<_>>());
        if self.placement.uses_kernels() {
            segments = segments.on(&self.placement.device, &heads)?;
        }
        let shape = (n, num_heads * head_dim);
        let [q, k, v, d_out] = [
            self.random(shape)?,
            self.random(shape)?,
            self.random(shape)?,
            self.random(shape)?,
        ];
        // Two products over the half of the scores that causality leaves; backward counts five, as is usual.
        let forward = 2 * head_dim * num_heads * n * segment;
        let name = |direction: &str| format!("attention {direction}, segments of {segment}");
        self.measure(name("forward"), Work::Flops(forward), || {
            attention::forward(&q, &k, &v, &segments, heads)?;
            Ok(())
        })?;
        let saved = attention::forward(&q, &k, &v, &segments, heads)?;
        self.measure(name("backward"), Work::Flops(forward * 5 / 2), || {
            attention::backward(&d_out, (&q, &k, &v), &saved, &segments, heads)?;
            Ok(())
        })
    }

    fn optimizer(&mut self) -> anyhow::Result<()> {
        let n = 1 << 26;
        let device = &self.placement.device;
        let zeros = |dtype| Tensor::zeros(n, dtype, device);
        let value = zeros(self.placement.dtype)?;
        let low = match self.placement.uses_kernels() {
            true => Some(zeros(DType::I16)?),
            false => None,
        };
        let (grad, m, v) = (self.ones(n)?, zeros(DType::F32)?, zeros(DType::F32)?);
        let update = AdamW {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: 1,
            grad_scale: 1.0,
        };
        let weight = adamw::Weight {
            value: &value,
            low: low.as_ref(),
        };
        // The master, both moments read and written, the gradient read.
        self.measure("adamw", Work::Bytes(28 * n), || {
            adamw::forward(&update, weight, &grad, &m, &v)
        })
    }

    fn print(&self, as_json: bool) {
        let limit = |of: &Measured| match of.work {
            Work::Bytes(_) => self.measured[0].rate(),
            Work::Flops(_) => self.measured[1].rate(),
        };
        let device = describe(&self.placement.device);
        if as_json {
            let rows = self.measured.iter().map(|m| {
                json!({
                    "name": m.name,
                    "seconds": m.seconds,
                    "rate": m.rate(),
                    "unit": m.unit(),
                    "share_of_limit": m.rate() / limit(m),
                })
            });
            let report = json!({
                "device": device,
                "version": env!("CARGO_PKG_VERSION"),
                "rounds": ROUNDS,
                "kernels": rows.collect::<Vec<_>>(),
            });
            outln!("{report}");
            return;
        }
        outln!("{device}, median of {ROUNDS} rounds, share of the copy or of the product");
        for m in &self.measured {
            outln!(
                "{:40} {:10.3} ms {:10.2} {:8} {:4.0} %",
                m.name,
                m.seconds * 1e3,
                m.rate(),
                m.unit(),
                100.0 * m.rate() / limit(m)
            );
        }
    }
}

/// The width of Llama's MLP: 11008 / 4096.
fn mlp_width(hidden_size: usize) -> usize {
    hidden_size * 43 / 16
}

fn describe(device: &Device) -> String {
    device::runtime(device).map_or("CPU".into(), |runtime| runtime.describe())
}
