//! A frozen linear layer with a LoRA adapter: `y = x W^T + bias + scaling (x A^T) B^T`.
//!
//! Backward, with `du = scaling dy B`: `dB += scaling dy^T u`, `dA += du^T x`, `dx = dy W + du A`; the frozen weight and
//! the bias get none. The weight is never held in full: a tile of it is dequantized into scratch and multiplied at once.
//!
//! Source: arXiv:2305.14314 equation 5, arXiv:2106.09685.

use candle_core::{Device, Tensor};

use super::cpu::{self, expect_dims, read};
use super::gemm::{Into, Mat, for_each_column_tile, matmul, matmul_by_rows};
use crate::Result;
use crate::quant::FrozenWeight;

const OP: &str = "linear";

/// Columns of the result that are made at a time: a weight tile of 128 x 768 in f32 stays in the second-level cache.
const TILE: usize = 128;

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
    let u = lora.map(|lora| down_project(x, &lora)).transpose()?;
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
    let y = cpu::build((n, d_out), |y| {
        for_each_column_tile(y, (n, d_out), TILE, |mut tile, outs, scratch| {
            scratch.resize(outs.len() * d_in, 0.0);
            weight.read_tile(outs.clone(), 0..d_in, scratch);
            matmul(
                &mut tile,
                Into::Overwrite,
                x,
                Mat::new(scratch, outs.len(), d_in).t(),
                1.0,
            );
            if let Some((u, b, r, scaling)) = &lora_data {
                let b = Mat::new(b, d_out, *r).rows(outs.clone());
                matmul(&mut tile, Into::Add, Mat::new(u, n, *r), b.t(), *scaling);
            }
            if let Some(bias) = &bias {
                for row in 0..n {
                    for (y, bias) in tile.row(row).iter_mut().zip(&bias[outs.clone()]) {
                        *y += bias;
                    }
                }
            }
        });
    })?;
    drop(lora_data);
    Ok((y, u))
}

/// `u = x A^T`.
fn down_project(x: Mat<'_>, lora: &Lora<'_>) -> Result<Tensor> {
    let r = lora.a.dims2()?.0;
    expect_dims(OP, "lora_a", lora.a, &[r, x.cols])?;
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
    cpu::write(OP, grad.d_b, |d_b| {
        matmul_by_rows(d_b, Into::Add, dy.t(), Mat::new(&u, n, r), lora.scaling);
    })?;
    let du_data = read(OP, &du)?;
    cpu::write(OP, grad.d_a, |d_a| {
        for_each_column_tile(d_a, (r, d_in), TILE, |mut tile, ins, _| {
            matmul(
                &mut tile,
                Into::Add,
                Mat::new(&du_data, n, r).t(),
                Mat::new(&x, n, d_in).cols(ins),
                1.0,
            );
        });
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
    let (dx, into) = match sum {
        Some(sum) => (sum, Into::Add),
        None => (
            Tensor::from_vec(vec![0f32; n * d_in], (n, d_in), &Device::Cpu)?,
            Into::Overwrite,
        ),
    };
    expect_dims(OP, "dx", &dx, &[n, d_in])?;
    cpu::write(OP, &dx, |dx| {
        for_each_column_tile(dx, (n, d_in), TILE, |mut tile, ins, scratch| {
            scratch.resize(d_out * ins.len(), 0.0);
            weight.read_tile(0..d_out, ins.clone(), scratch);
            matmul(
                &mut tile,
                into,
                dy,
                Mat::new(scratch, d_out, ins.len()),
                1.0,
            );
            if let Some((du, a, r)) = &lora_data {
                matmul(
                    &mut tile,
                    Into::Add,
                    Mat::new(du, n, *r),
                    Mat::new(a, *r, d_in).cols(ins),
                    1.0,
                );
            }
        });
    })?;
    Ok(dx)
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
