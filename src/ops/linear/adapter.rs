//! The adapter's part of a linear layer by itself, for rows of a result that the base has written.

use candle_core::Tensor;

use super::super::cpu::{self, expect_dims, read};
use super::super::gemm::{Into, Mat, Shared, Term, for_each_column_tile, matmul_sum};
use super::super::launcher::{Factor, Launcher};
use super::{Lora, OP, WIDEST_TILE, down_project, expect_factors, masked};
use crate::Result;

/// `y += scaling u B^T`; gives `u = x' A^T`, which backward needs.
///
/// # Shapes
/// `x: [N, in]`, `y: [N, out]` -> `u: [N, R]`.
pub fn add_adapter(x: &Tensor, lora: Lora<'_>, y: &Tensor) -> Result<Tensor> {
    let ((n, d_in), d_out) = (x.dims2()?, y.dim(1)?);
    expect_dims(OP, "y", y, &[n, d_out])?;
    expect_factors(&lora, d_in, d_out)?;
    let u = down_project(x, lora)?;
    if let Some(launcher) = Launcher::of(OP, x)? {
        let factors = (Factor::new(&u), Factor::transposed(lora.b));
        launcher.gemm(OP, factors, y, lora.scaling, 1.0)?;
        return Ok(u);
    }
    let (u_data, b) = (read(OP, &u)?, read(OP, lora.b)?);
    let r = lora.b.dim(1)?;
    cpu::write(OP, y, |y| {
        for_each_column_tile(Shared::new(y), (n, d_out), WIDEST_TILE, |mut tile, outs| {
            let term = Term {
                lhs: Mat::new(&u_data, n, r).to(lora.compute_dtype),
                rhs: Mat::new(&b, d_out, r).rows(outs).t().into(),
                factor: lora.scaling,
            };
            matmul_sum(&mut tile, Into::Add, &[term]);
        });
    })?;
    drop(u_data);
    Ok(u)
}

/// `dx += du A`, masked and scaled as the adapter's input was.
///
/// # Shapes
/// `du: [N, R]`, `dx: [N, in]`.
pub fn add_adapter_backward(du: &Tensor, lora: Lora<'_>, dx: &Tensor) -> Result<()> {
    let ((n, r), d_in) = (du.dims2()?, dx.dim(1)?);
    expect_dims(OP, "dx", dx, &[n, d_in])?;
    expect_dims(OP, "lora_a", lora.a, &[r, d_in])?;
    if let Some(launcher) = Launcher::of(OP, du)? {
        return lora.stack().add_up(&launcher, du, dx);
    }
    let (du, a) = (read(OP, du)?, read(OP, lora.a)?);
    let (du, a) = (Mat::new(&du, n, r), Mat::new(&a, r, d_in));
    let dtype = lora.compute_dtype;
    cpu::write(OP, dx, |dx| {
        let dx = Shared::new(dx);
        for_each_column_tile(dx, (n, d_in), WIDEST_TILE, |mut tile, ins| {
            match lora.mask {
                Some(mask) => masked::add_up_project((du, dtype), a, mask, ins, &mut tile),
                None => {
                    let term = Term {
                        lhs: du.to(dtype),
                        rhs: a.cols(ins).into(),
                        factor: 1.0,
                    };
                    matmul_sum(&mut tile, Into::Add, &[term]);
                }
            }
        });
    })
}
