//! A frozen linear layer with a LoRA adapter: `y = x W^T + bias + scaling (x' A^T) B^T`, where `x'` is `x`, or what dropout
//! leaves of it, scaled.
//!
//! Backward, with `du = scaling dy B`: `dB += scaling dy^T u`, `dA += du^T x'`, `dx = dy W + du A`, the last masked and scaled
//! as `x'`; the frozen weight and the bias get none. On the CPU the weight is never held in full: a tile of it is dequantized
//! into scratch and multiplied at once. On a device it is dequantized into the scratch of [`Weight`], and sums are taken up by the products themselves.
//!
//! Source: arXiv:2305.14314 equation 5, arXiv:2106.09685.

mod adapter;
pub mod dora;
mod kernels;
mod masked;

use candle_core::{DType, Tensor};

use super::cpu::{self, expect_dims, read};
use super::dropout::Mask;
use super::gemm::{
    Into, Mat, Rhs, Shared, SharedLhs, Term, Window, for_each_column_tile, matmul, matmul_by_rows,
    matmul_sum,
};
use super::launcher::{Factor, Grid, Launcher, Operand};
use super::weight::Weight;
use crate::Result;
use crate::device::ComputeDtype;
use masked::Masked;

pub use adapter::{add_adapter, add_adapter_backward};
pub use kernels::{Branch, Stack, dropout_scratch_bytes};

const OP: &str = "linear";

/// What a thread of the CPU keeps for products, at most: a packed block of weights, the same before it is packed, and a masked
/// block of activations.
pub const THREAD_SCRATCH_BYTES: u64 = (2 << 20) + (256 << 10);

/// Columns of a result that are made at a time, at most: wide tiles read the other operand less often.
const WIDEST_TILE: usize = 256;

/// An adapter's factors, `a: [R, in]`, `b: [out, R]`.
#[derive(Clone, Copy)]
pub struct Lora<'a> {
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub scaling: f32,
    /// Dropout on the adapter's input.
    pub mask: Option<Mask>,
    /// Of the adapter's own products on the CPU; those that it shares with the weight are in the type of that.
    pub compute_dtype: ComputeDtype,
}

impl Lora<'_> {
    /// By itself, for the kernels.
    fn stack(&self) -> Stack<'_> {
        Stack {
            a: self.a,
            adapters: 1,
            masks: self.mask.as_slice(),
        }
    }
}

/// Where an adapter's gradients are added, shaped as its factors.
#[derive(Clone, Copy)]
pub struct LoraGrad<'a> {
    pub d_a: &'a Tensor,
    pub d_b: &'a Tensor,
}

/// `y = x W^T + bias + scaling u B^T`; gives `u = x' A^T` too, which backward needs.
///
/// # Shapes
/// `x: [N, in]`, `bias: [out]` -> `y: [N, out]`, `u: [N, R]`.
pub fn forward(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    lora: Option<Lora<'_>>,
) -> Result<(Tensor, Option<Tensor>)> {
    let u = lora.map(|lora| down_project(x, lora)).transpose()?;
    let y = forward_with_u(x, weight, bias, lora.zip(u.as_ref()))?;
    Ok((y, u))
}

/// The `y` of [`forward`], for the adapter's `u`.
///
/// # Shapes
/// `x: [N, in]`, `bias: [out]`, `u: [N, R]` -> `y: [N, out]`.
pub fn forward_with_u(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    lora: Option<(Lora<'_>, &Tensor)>,
) -> Result<Tensor> {
    let _span = tracing::trace_span!("linear").entered();
    let (n, d_in) = x.dims2()?;
    let d_out = weight.out_features();
    expect_dims(OP, "x", x, &[n, weight.in_features()])?;
    if let Some((lora, u)) = &lora {
        expect_factors(lora, d_in, d_out)?;
        expect_dims(OP, "u", u, &[n, lora.a.dim(0)?])?;
    }
    if let Some(launcher) = Launcher::of(OP, x)? {
        return forward_on_device(&launcher, x, weight, bias, lora);
    }
    let dtype = weight.compute_dtype();
    let x = read(OP, x)?;
    let x = SharedLhs::new(Mat::new(&x, n, d_in), dtype);
    let lora_data = match lora {
        Some((lora, u)) => Some((
            read(OP, u)?,
            read(OP, lora.b)?,
            lora.b.dims2()?.1,
            lora.scaling,
        )),
        None => None,
    };
    let bias = bias.map(|bias| read(OP, bias)).transpose()?;
    let fill = |y: Shared<'_>| {
        for_each_column_tile(y, (n, d_out), WIDEST_TILE, |mut tile, outs| {
            let base = Term {
                lhs: x.lhs(),
                rhs: Rhs::Transposed(Window {
                    weight,
                    outs: outs.clone(),
                    ins: 0..d_in,
                }),
                factor: 1.0,
            };
            let adapter = lora_data.as_ref().map(|(u, b, r, scaling)| Term {
                lhs: Mat::new(u, n, *r).to(dtype),
                rhs: Rhs::Mat(Mat::new(b, d_out, *r).rows(outs.clone()).t()),
                factor: *scaling,
            });
            let terms: Vec<_> = [base].into_iter().chain(adapter).collect();
            matmul_sum(&mut tile, Into::Overwrite, &terms);
            if let Some(bias) = &bias {
                for row in 0..n {
                    for (y, bias) in tile.row(row).iter_mut().zip(&bias[outs.clone()]) {
                        *y += bias;
                    }
                }
            }
        });
    };
    // SAFETY: the first product overwrites every tile.
    unsafe { cpu::build_uninit((n, d_out), |y| fill(Shared::uninit(y))) }
}

fn expect_factors(lora: &Lora<'_>, d_in: usize, d_out: usize) -> Result<()> {
    let r = lora.a.dim(0)?;
    expect_dims(OP, "lora_a", lora.a, &[r, d_in])?;
    expect_dims(OP, "lora_b", lora.b, &[d_out, r])
}

fn forward_on_device(
    launcher: &Launcher,
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    lora: Option<(Lora<'_>, &Tensor)>,
) -> Result<Tensor> {
    let (n, d_out) = (x.dim(0)?, weight.out_features());
    let y = launcher.empty((n, d_out), DType::BF16)?;
    let w = weight.dense(launcher)?;
    launcher.gemm(OP, (Factor::new(x), Factor::transposed(&w)), &y, 1.0, 0.0)?;
    if let Some(bias) = bias {
        expect_dims(OP, "bias", bias, &[d_out])?;
        let operands = [
            Operand::Write(&y),
            Operand::Read(bias),
            Operand::U32(n),
            Operand::U32(d_out),
        ];
        // SAFETY: y has rows of d_out elements, the bias has one.
        unsafe { launcher.launch("linear_add_bias_bf16", Grid::blocks(n, 1), &operands)? };
    }
    if let Some((lora, u)) = lora {
        let factors = (Factor::new(u), Factor::transposed(lora.b));
        launcher.gemm(OP, factors, &y, lora.scaling, 1.0)?;
    }
    Ok(y)
}

/// `u = x' A^T`.
///
/// # Shapes
/// `x: [N, in]` -> `[N, R]`.
pub fn down_project(x: &Tensor, lora: Lora<'_>) -> Result<Tensor> {
    let _span = tracing::trace_span!("adapters").entered();
    let (n, d_in) = x.dims2()?;
    let r = lora.a.dim(0)?;
    expect_dims(OP, "lora_a", lora.a, &[r, d_in])?;
    if let Some(launcher) = Launcher::of(OP, x)? {
        return lora.stack().down(&launcher, x);
    }
    let (x, a) = (read(OP, x)?, read(OP, lora.a)?);
    let a = Mat::new(&a, r, d_in);
    cpu::build((n, r), |u| match lora.mask {
        Some(mask) => {
            let (x, cols) = (&x[..], d_in);
            let x = Masked {
                x,
                cols,
                mask,
                dtype: lora.compute_dtype,
            };
            masked::down_project(x, a, u);
        }
        None => {
            let x = Mat::new(&x, n, d_in);
            matmul_by_rows(u, Into::Overwrite, (x, lora.compute_dtype), a.t(), 1.0);
        }
    })
}

/// Adds the gradients of an adapter's factors and gives `du = scaling dy B: [N, R]`.
///
/// # Shapes
/// `dy: [N, out]`, `x: [N, in]`, `u: [N, R]`.
pub fn backward_lora(
    dy: &Tensor,
    x: &Tensor,
    u: &Tensor,
    lora: Lora<'_>,
    grad: LoraGrad<'_>,
) -> Result<Tensor> {
    let _span = tracing::trace_span!("adapters").entered();
    let (n, d_out) = dy.dims2()?;
    let d_in = x.dims2()?.1;
    let r = u.dims2()?.1;
    expect_dims(OP, "x", x, &[n, d_in])?;
    expect_dims(OP, "u", u, &[n, r])?;
    expect_dims(OP, "lora_b", lora.b, &[d_out, r])?;
    expect_dims(OP, "d_lora_a", grad.d_a, &[r, d_in])?;
    expect_dims(OP, "d_lora_b", grad.d_b, &[d_out, r])?;
    if let Some(launcher) = Launcher::of(OP, dy)? {
        let du = launcher.empty((n, r), DType::BF16)?;
        let branch = Branch {
            dy,
            u,
            b: lora.b,
            scaling: lora.scaling,
            d_b: grad.d_b,
        };
        branch.backward(&launcher, &du)?;
        lora.stack().add_grad_a(&launcher, x, &du, grad.d_a)?;
        return Ok(du);
    }
    let (dy, x, u, b) = (read(OP, dy)?, read(OP, x)?, read(OP, u)?, read(OP, lora.b)?);
    let dy = Mat::new(&dy, n, d_out);
    let dtype = lora.compute_dtype;
    let du = cpu::build((n, r), |du| {
        matmul_by_rows(
            du,
            Into::Overwrite,
            (dy, dtype),
            Mat::new(&b, d_out, r),
            lora.scaling,
        );
    })?;
    // (dy^T u)^T: a product with a short side runs at twice the speed when its rows are the short ones.
    let mut d_b_transposed = vec![0f32; r * d_out];
    for_each_column_tile(
        Shared::new(&mut d_b_transposed),
        (r, d_out),
        WIDEST_TILE,
        |mut tile, outs| {
            matmul(
                &mut tile,
                Into::Overwrite,
                Mat::new(&u, n, r).t().to(dtype),
                dy.cols(outs),
                lora.scaling,
            );
        },
    );
    cpu::write(OP, grad.d_b, |d_b| {
        for (out, row) in d_b.chunks_exact_mut(r).enumerate() {
            for (rank, d_b) in row.iter_mut().enumerate() {
                *d_b += d_b_transposed[rank * d_out + out];
            }
        }
    })?;
    let du_data = read(OP, &du)?;
    let du_mat = Mat::new(&du_data, n, r);
    cpu::write(OP, grad.d_a, |d_a| match lora.mask {
        Some(mask) => {
            let (x, cols) = (&x[..], d_in);
            let x = Masked {
                x,
                cols,
                mask,
                dtype,
            };
            masked::add_grad_a(x, du_mat, d_a);
        }
        None => {
            let d_a = Shared::new(d_a);
            for_each_column_tile(d_a, (r, d_in), WIDEST_TILE, |mut tile, ins| {
                let x = Mat::new(&x, n, d_in).cols(ins);
                matmul(&mut tile, Into::Add, du_mat.t().to(dtype), x, 1.0);
            });
        }
    })?;
    drop(du_data);
    Ok(du)
}

/// `dx = dy W + du A`, the adapter's part masked and scaled as its input was, added to `sum` if there is one.
///
/// # Shapes
/// `dy: [N, out]`, `du: [N, R]` for the adapter -> `dx: [N, in]`.
pub fn backward_input(
    dy: &Tensor,
    weight: &Weight,
    lora: Option<(&Tensor, Lora<'_>)>,
    sum: Option<Tensor>,
) -> Result<Tensor> {
    let _span = tracing::trace_span!("linear").entered();
    let (n, d_out) = dy.dims2()?;
    let d_in = weight.in_features();
    expect_dims(OP, "dy", dy, &[n, weight.out_features()])?;
    if let Some(sum) = &sum {
        expect_dims(OP, "dx", sum, &[n, d_in])?;
    }
    if let Some(launcher) = Launcher::of(OP, dy)? {
        return backward_input_on_device(&launcher, dy, weight, lora, sum);
    }
    let dtype = weight.compute_dtype();
    let dy = read(OP, dy)?;
    let dy = SharedLhs::new(Mat::new(&dy, n, d_out), dtype);
    let lora_data = match lora {
        Some((du, lora)) => Some((
            read(OP, du)?,
            read(OP, lora.a)?,
            lora.a.dims2()?.0,
            lora.mask,
        )),
        None => None,
    };
    let add = |dx: Shared<'_>, into: Into| {
        for_each_column_tile(dx, (n, d_in), WIDEST_TILE, |mut tile, ins| {
            let base = Term {
                lhs: dy.lhs(),
                rhs: Rhs::Weight(Window {
                    weight,
                    outs: 0..d_out,
                    ins: ins.clone(),
                }),
                factor: 1.0,
            };
            let adapter = lora_data
                .as_ref()
                .map(|(du, a, r, mask)| (Mat::new(du, n, *r), Mat::new(a, *r, d_in), mask));
            let in_one = adapter.filter(|(.., mask)| mask.is_none());
            let in_one = in_one.map(|(du, a, _)| Term {
                lhs: du.to(dtype),
                rhs: Rhs::Mat(a.cols(ins.clone())),
                factor: 1.0,
            });
            let terms: Vec<_> = [base].into_iter().chain(in_one).collect();
            match (adapter, into) {
                (Some((du, a, Some(mask))), Into::Overwrite) => {
                    masked::up_project((du, dtype), a, *mask, ins, &mut tile);
                    matmul_sum(&mut tile, Into::Add, &terms);
                }
                (Some((du, a, Some(mask))), Into::Add) => {
                    matmul_sum(&mut tile, Into::Add, &terms);
                    masked::add_up_project((du, dtype), a, *mask, ins, &mut tile);
                }
                _ => matmul_sum(&mut tile, into, &terms),
            }
        });
    };
    match sum {
        Some(sum) => {
            cpu::write(OP, &sum, |dx| add(Shared::new(dx), Into::Add))?;
            Ok(sum)
        }
        // SAFETY: the first product overwrites every tile.
        None => unsafe {
            cpu::build_uninit((n, d_in), |dx| add(Shared::uninit(dx), Into::Overwrite))
        },
    }
}

fn backward_input_on_device(
    launcher: &Launcher,
    dy: &Tensor,
    weight: &Weight,
    lora: Option<(&Tensor, Lora<'_>)>,
    sum: Option<Tensor>,
) -> Result<Tensor> {
    let (dx, beta) = match sum {
        Some(sum) => (sum, 1.0),
        None => {
            let shape = (dy.dim(0)?, weight.in_features());
            (launcher.empty(shape, DType::BF16)?, 0.0)
        }
    };
    let w = weight.dense(launcher)?;
    launcher.gemm(OP, (Factor::new(dy), Factor::new(&w)), &dx, 1.0, beta)?;
    if let Some((du, lora)) = lora {
        lora.stack().add_up(launcher, du, &dx)?;
    }
    Ok(dx)
}

/// An adapter of [`reference()`].
#[derive(Clone, Copy)]
pub struct ReferenceLora<'a> {
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub scaling: f64,
    /// What each element of the adapter's input is multiplied by, `[N, in]`.
    pub dropout: Option<&'a Tensor>,
}

/// The same from differentiable primitives, with the weight as a tensor `w: [out, in]`.
pub fn reference(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    lora: Option<ReferenceLora<'_>>,
) -> Result<Tensor> {
    let mut y = x.matmul(&w.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some(lora) = lora {
        let x = match lora.dropout {
            Some(factors) => x.mul(factors)?,
            None => x.clone(),
        };
        y = (y + (x.matmul(&lora.a.t()?)?.matmul(&lora.b.t()?)? * lora.scaling)?)?;
    }
    Ok(y)
}
