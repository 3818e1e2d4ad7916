//! A frozen linear layer with a LoRA adapter: `y = x W^T + bias + scaling (x A^T) B^T`.
//!
//! Backward, with `du = scaling dy B`: `dB += scaling dy^T u`, `dA += du^T x`, `dx = dy W + du A`; the frozen weight and
//! the bias get none. The weight is never held in full: a tile of it is dequantized into scratch and multiplied at once.
//!
//! Source: arXiv:2305.14314 equation 5, arXiv:2106.09685.

use candle_core::Tensor;

use super::cpu::{self, expect_dims, read};
use super::gemm::{
    Into, Mat, Rhs, Shared, Term, Window, for_each_column_tile, matmul, matmul_by_rows, matmul_sum,
};
use crate::Result;
use crate::quant::FrozenWeight;

const OP: &str = "linear";

/// Columns of a result that are made at a time, for a result of `features` columns.
///
/// Wide tiles read the other operand less often; narrow results still give every thread its share.
fn tile_width(features: usize) -> usize {
    if features >= 1024 { 256 } else { 192 }
}

/// An adapter's factors, `a: [R, in]`, `b: [out, R]`.
#[derive(Clone, Copy)]
pub struct Lora<'a> {
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub scaling: f32,
}

/// Where an adapter's gradients are added, shaped as its factors.
#[derive(Clone, Copy)]
pub struct LoraGrad<'a> {
    pub d_a: &'a Tensor,
    pub d_b: &'a Tensor,
}

/// `y = x W^T + bias + scaling u B^T`; gives `u = x A^T` too, which backward needs.
///
/// # Shapes
/// `x: [N, in]`, `bias: [out]` -> `y: [N, out]`, `u: [N, R]`.
pub fn forward(
    x: &Tensor,
    weight: &FrozenWeight,
    bias: Option<&Tensor>,
    lora: Option<Lora<'_>>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (n, d_in) = x.dims2()?;
    let d_out = weight.out_features();
    expect_dims(OP, "x", x, &[n, weight.in_features()])?;
    let x = read(OP, x)?;
    let x = Mat::new(&x, n, d_in);
    let u = lora.map(|lora| down_project(x, &lora, d_out)).transpose()?;
    let lora_data = match (&lora, &u) {
        (Some(lora), Some(u)) => Some((
            read(OP, u)?,
            read(OP, lora.b)?,
            lora.b.dims2()?.1,
            lora.scaling,
        )),
        _ => None,
    };
    let bias = bias.map(|bias| read(OP, bias)).transpose()?;
    let fill = |y: Shared<'_>| {
        let width = tile_width(d_out);
        for_each_column_tile(y, (n, d_out), width, |mut tile, outs| {
            let base = Term {
                lhs: x,
                rhs: Rhs::Transposed(Window {
                    weight,
                    outs: outs.clone(),
                    ins: 0..d_in,
                }),
                factor: 1.0,
            };
            let adapter = lora_data.as_ref().map(|(u, b, r, scaling)| Term {
                lhs: Mat::new(u, n, *r),
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
    let y = unsafe { cpu::build_uninit((n, d_out), |y| fill(Shared::uninit(y)))? };
    drop(lora_data);
    Ok((y, u))
}

/// `u = x A^T`, for factors that fit a layer with `d_out` outputs.
fn down_project(x: Mat<'_>, lora: &Lora<'_>, d_out: usize) -> Result<Tensor> {
    let r = lora.a.dims2()?.0;
    expect_dims(OP, "lora_a", lora.a, &[r, x.cols])?;
    expect_dims(OP, "lora_b", lora.b, &[d_out, r])?;
    let a = read(OP, lora.a)?;
    cpu::build((x.rows, r), |u| {
        matmul_by_rows(u, Into::Overwrite, x, Mat::new(&a, r, x.cols).t(), 1.0);
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
    let (n, d_out) = dy.dims2()?;
    let d_in = x.dims2()?.1;
    let r = u.dims2()?.1;
    expect_dims(OP, "x", x, &[n, d_in])?;
    expect_dims(OP, "u", u, &[n, r])?;
    expect_dims(OP, "lora_b", lora.b, &[d_out, r])?;
    expect_dims(OP, "d_lora_a", grad.d_a, &[r, d_in])?;
    expect_dims(OP, "d_lora_b", grad.d_b, &[d_out, r])?;
    let (dy, x, u, b) = (read(OP, dy)?, read(OP, x)?, read(OP, u)?, read(OP, lora.b)?);
    let dy = Mat::new(&dy, n, d_out);
    let du = cpu::build((n, r), |du| {
        matmul_by_rows(
            du,
            Into::Overwrite,
            dy,
            Mat::new(&b, d_out, r),
            lora.scaling,
        );
    })?;
    // (dy^T u)^T: a product with a short side runs at twice the speed when its rows are the short ones.
    let mut d_b_transposed = vec![0f32; r * d_out];
    for_each_column_tile(
        Shared::new(&mut d_b_transposed),
        (r, d_out),
        tile_width(d_out),
        |mut tile, outs| {
            matmul(
                &mut tile,
                Into::Overwrite,
                Mat::new(&u, n, r).t(),
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
    cpu::write(OP, grad.d_a, |d_a| {
        for_each_column_tile(
            Shared::new(d_a),
            (r, d_in),
            tile_width(d_in),
            |mut tile, ins| {
                matmul(
                    &mut tile,
                    Into::Add,
                    Mat::new(&du_data, n, r).t(),
                    Mat::new(&x, n, d_in).cols(ins),
                    1.0,
                );
            },
        );
    })?;
    drop(du_data);
    Ok(du)
}

/// `dx = dy W + du A`, added to `sum` if there is one.
///
/// # Shapes
/// `dy: [N, out]`, `du: [N, R]` with `a: [R, in]` -> `dx: [N, in]`.
pub fn backward_input(
    dy: &Tensor,
    weight: &FrozenWeight,
    lora: Option<(&Tensor, &Tensor)>,
    sum: Option<Tensor>,
) -> Result<Tensor> {
    let (n, d_out) = dy.dims2()?;
    let d_in = weight.in_features();
    expect_dims(OP, "dy", dy, &[n, weight.out_features()])?;
    let dy = read(OP, dy)?;
    let dy = Mat::new(&dy, n, d_out);
    let lora_data = match lora {
        Some((du, a)) => Some((read(OP, du)?, read(OP, a)?, a.dims2()?.0)),
        None => None,
    };
    let add = |dx: Shared<'_>, into: Into| {
        let width = tile_width(d_in);
        for_each_column_tile(dx, (n, d_in), width, |mut tile, ins| {
            let base = Term {
                lhs: dy,
                rhs: Rhs::Weight(Window {
                    weight,
                    outs: 0..d_out,
                    ins: ins.clone(),
                }),
                factor: 1.0,
            };
            let adapter = lora_data.as_ref().map(|(du, a, r)| Term {
                lhs: Mat::new(du, n, *r),
                rhs: Rhs::Mat(Mat::new(a, *r, d_in).cols(ins)),
                factor: 1.0,
            });
            let terms: Vec<_> = [base].into_iter().chain(adapter).collect();
            matmul_sum(&mut tile, into, &terms);
        });
    };
    match sum {
        Some(sum) => {
            expect_dims(OP, "dx", &sum, &[n, d_in])?;
            cpu::write(OP, &sum, |dx| add(Shared::new(dx), Into::Add))?;
            Ok(sum)
        }
        // SAFETY: the first product overwrites every tile.
        None => unsafe {
            cpu::build_uninit((n, d_in), |dx| add(Shared::uninit(dx), Into::Overwrite))
        },
    }
}

/// The same from differentiable primitives, with the weight as a tensor `w: [out, in]`.
pub fn reference(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    lora: Option<(&Tensor, &Tensor, f64)>,
) -> Result<Tensor> {
    let mut y = x.matmul(&w.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some((a, b, scaling)) = lora {
        y = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scaling)?)?;
    }
    Ok(y)
}
