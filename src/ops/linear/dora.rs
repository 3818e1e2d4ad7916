//! DoRA: a linear layer whose merged weight has rows of trained magnitudes,
//! `y = g (W x + scaling B A x) + bias`, where `g = magnitude / |W + scaling B A|`, the norm taken by rows.
//!
//! With dropout, `x'` being what it leaves of `x`, scaled, PEFT computes `y = W (x - x') + g (W x' + scaling B A x') + bias`.
//!
//! The norm is constant in backward. With `h` for what `g` multiplies: `d_magnitude += sum over rows of dy h, / norm`; from
//! `dh = g dy` on all is as in a plain adapter on `x'`; through `x - x'` goes `dy W`. `h` is not kept: backward makes it again,
//! which is one more product with W.
//!
//! `|W + scaling B A|^2 = |W|^2 + 2 scaling <W, B A> + scaling^2 |B A|^2` by rows. The first is made once, the second is a product
//! of W with the R rows of A, the third needs `A A^T` alone: no weight is ever whole.
//!
//! Source: arXiv:2402.09353, section 4.3 for the norm; `DoraLinearLayer` of PEFT 0.21.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::super::cpu::{self, ROWS_PER_TASK, expect_dims, read};
use super::super::dropout::Mask;
use super::super::gemm::{Into, Mat, matmul_by_rows};
use super::super::launcher::{Factor, Grid, Launcher, Operand};
use super::super::weight::Weight;
use super::kernels::{mask_operands, splits};
use super::{Lora, LoraGrad};
use crate::Result;
use crate::device::ComputeDtype;
use crate::quant::FrozenWeight;

const OP: &str = "dora";
/// Elements of a row of the weight that are read at a time.
const ROW_TILE: usize = 4096;
/// Columns that a block of the kernel for the magnitudes' gradient takes, and the fewest rows worth another part of the sum.
const BACKWARD: (usize, usize) = (256, 64);
/// Elements that a thread of the other kernels takes at a time.
const PER_THREAD: usize = 8;

/// The magnitudes of a weight's rows, `[out]`.
#[derive(Debug, Clone, Copy)]
pub struct Magnitude<'a> {
    /// f32, or the upper halves of f32 masters in bf16.
    pub value: &'a Tensor,
    /// The lower halves, where `value` is bf16.
    pub low: Option<&'a Tensor>,
    /// The squared norms of the rows of W, in f32.
    pub weight_squares: &'a Tensor,
}

/// The squared norm of each row of a weight, of which a tile is read at a time.
///
/// # Shapes
/// `[out]`.
pub fn squared_norms(weight: &FrozenWeight) -> Vec<f32> {
    let d_in = weight.in_features();
    let norm = |row: usize| {
        let mut tile = [0f32; ROW_TILE];
        let starts = (0..d_in).step_by(ROW_TILE);
        let squares = starts.map(|start| {
            let tile = &mut tile[..ROW_TILE.min(d_in - start)];
            weight.read_range(row * d_in + start, tile);
            tile.iter()
                .map(|&w| f64::from(w) * f64::from(w))
                .sum::<f64>()
        });
        squares.sum::<f64>() as f32
    };
    (0..weight.out_features())
        .into_par_iter()
        .map(norm)
        .collect()
}

/// What the rows of the output are multiplied by, `g`, and the reciprocals of the norms.
///
/// # Shapes
/// `[2, out]` in f32.
pub fn scales(weight: &Weight, lora: Lora<'_>, magnitude: Magnitude<'_>) -> Result<Tensor> {
    let (r, d_in) = lora.a.dims2()?;
    let d_out = weight.out_features();
    expect_dims(OP, "lora_a", lora.a, &[r, weight.in_features()])?;
    expect_dims(OP, "lora_b", lora.b, &[d_out, r])?;
    expect_dims(OP, "magnitude", magnitude.value, &[d_out])?;
    expect_dims(OP, "weight_squares", magnitude.weight_squares, &[d_out])?;
    if let Some(launcher) = Launcher::of(OP, lora.a)? {
        return scales_on_device(&launcher, weight, lora, magnitude);
    }
    let products = super::forward(lora.a, weight, None, None)?.0;
    let (a, b, p) = (read(OP, lora.a)?, read(OP, lora.b)?, read(OP, &products)?);
    let (squares, magnitudes) = (
        read(OP, magnitude.weight_squares)?,
        read(OP, magnitude.value)?,
    );
    let mut gram = vec![0f32; r * r];
    let rows = Mat::new(&a, r, d_in);
    let lhs = (rows, ComputeDtype::F32);
    matmul_by_rows(&mut gram, Into::Overwrite, lhs, rows.t(), 1.0);
    let scaling = f64::from(lora.scaling);
    let norm = |out: usize| {
        let b = &b[out * r..(out + 1) * r];
        let terms = b.iter().enumerate().map(|(i, &b_i)| {
            let gram = b.iter().zip(&gram[i * r..(i + 1) * r]);
            let gram: f64 = gram.map(|(&b, &g)| f64::from(b) * f64::from(g)).sum();
            f64::from(b_i) * scaling * (2.0 * f64::from(p[i * d_out + out]) + scaling * gram)
        });
        (f64::from(squares[out]) + terms.sum::<f64>())
            .max(0.0)
            .sqrt()
    };
    cpu::build((2, d_out), |scales| {
        let (scale, inverse) = scales.split_at_mut(d_out);
        let outs = scale.par_iter_mut().zip(inverse).enumerate();
        outs.for_each(|(out, (scale, inverse))| {
            let norm = norm(out);
            *scale = (f64::from(magnitudes[out]) / norm) as f32;
            *inverse = (1.0 / norm) as f32;
        });
    })
}

fn scales_on_device(
    launcher: &Launcher,
    weight: &Weight,
    lora: Lora<'_>,
    magnitude: Magnitude<'_>,
) -> Result<Tensor> {
    let (r, d_out) = (lora.a.dim(0)?, weight.out_features());
    let products = launcher.empty((r, d_out), DType::F32)?;
    let w = weight.dense(launcher)?;
    let factors = (Factor::new(lora.a), Factor::transposed(&w));
    launcher.gemm(OP, factors, &products, 1.0, 0.0)?;
    let gram = launcher.empty((r, r), DType::F32)?;
    let factors = (Factor::new(lora.a), Factor::transposed(lora.a));
    launcher.gemm(OP, factors, &gram, 1.0, 0.0)?;
    let scales = launcher.empty((2, d_out), DType::F32)?;
    let low = magnitude.low.ok_or_else(|| crate::Error::Shape {
        op: OP,
        expected: "the lower halves of bf16 magnitudes".into(),
        found: "none".into(),
    })?;
    expect_dims(OP, "magnitude_low", low, &[d_out])?;
    let operands = [
        Operand::Read(lora.b),
        Operand::Read(&products),
        Operand::Read(&gram),
        Operand::Read(magnitude.weight_squares),
        Operand::Read(magnitude.value),
        Operand::Read(low),
        Operand::U32(d_out),
        Operand::U32(r),
        Operand::F32(lora.scaling),
        Operand::Write(&scales),
    ];
    const ROWS_OF_BLOCK: usize = 8;
    let grid = Grid::blocks(d_out.div_ceil(ROWS_OF_BLOCK), 1);
    // SAFETY: the tensors have just been found or made with these sizes.
    unsafe { launcher.launch("dora_scales_f32", grid, &operands)? };
    Ok(scales)
}

/// The output of the layer, of the scales that [`scales`] gives; gives `u = x' A^T` too.
///
/// # Shapes
/// `x: [N, in]`, `bias: [out]`, `scales: [2, out]` -> `y: [N, out]`, `u: [N, R]`.
pub fn forward(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    lora: Lora<'_>,
    scales: &Tensor,
) -> Result<(Tensor, Tensor)> {
    expect_dims(OP, "scales", scales, &[2, weight.out_features()])?;
    let Some(mask) = lora.mask else {
        let (y, u) = merged_product(x, weight, lora)?;
        scale(&y, scales, None, bias)?;
        return Ok((y, u));
    };
    let (kept, dropped) = split(x, &mask, Part::Both)?;
    let base = dropped.map(|dropped| super::forward(&dropped, weight, None, None));
    let base = base.transpose()?.map(|(base, _)| base);
    let (y, u) = merged_product(&kept, weight, without_mask(lora))?;
    scale(&y, scales, base.as_ref(), bias)?;
    Ok((y, u))
}

/// Adds the gradients of the factors and of the magnitude; gives `du: [N, R]` and `dh: [N, out]`.
///
/// # Shapes
/// `dy: [N, out]`, `x: [N, in]`, `d_magnitude: [out]`.
pub fn backward_adapter(
    dy: &Tensor,
    x: &Tensor,
    weight: &Weight,
    (lora, magnitude): (Lora<'_>, Magnitude<'_>),
    (grad, d_magnitude): (LoraGrad<'_>, &Tensor),
) -> Result<(Tensor, Tensor)> {
    let scales = scales(weight, lora, magnitude)?;
    let kept = match &lora.mask {
        None => x.clone(),
        Some(mask) => split(x, mask, Part::Kept)?.0,
    };
    let lora = without_mask(lora);
    let (h, u) = merged_product(&kept, weight, lora)?;
    scale_backward(dy, &h, &scales, d_magnitude)?;
    let du = super::backward_lora(&h, &kept, &u, lora, grad)?;
    Ok((du, h))
}

/// The gradient of the input from what [`backward_adapter`] gave, added to `sum` if there is one.
///
/// # Shapes
/// `dy`, `dh: [N, out]`, `du: [N, R]` -> `dx: [N, in]`.
pub fn backward_input(
    dy: &Tensor,
    (du, dh): (&Tensor, &Tensor),
    weight: &Weight,
    lora: Lora<'_>,
    sum: Option<Tensor>,
) -> Result<Tensor> {
    let plain = without_mask(lora);
    let Some(mask) = lora.mask else {
        return super::backward_input(dh, weight, Some((du, plain)), sum);
    };
    let d_kept = super::backward_input(dh, weight, Some((du, plain)), None)?;
    let d_dropped = super::backward_input(dy, weight, None, None)?;
    join(d_kept, &d_dropped, &mask, sum)
}

fn without_mask(lora: Lora<'_>) -> Lora<'_> {
    Lora { mask: None, ..lora }
}

/// `h = x W^T + scaling u B^T` and `u = x A^T`.
fn merged_product(x: &Tensor, weight: &Weight, lora: Lora<'_>) -> Result<(Tensor, Tensor)> {
    let (h, u) = super::forward(x, weight, None, Some(lora))?;
    Ok((h, u.expect("there is one where there is an adapter")))
}

/// `y = g y + base + bias`, in place.
fn scale(y: &Tensor, scales: &Tensor, base: Option<&Tensor>, bias: Option<&Tensor>) -> Result<()> {
    let (n, d) = y.dims2()?;
    if let Some(bias) = bias {
        expect_dims(OP, "bias", bias, &[d])?;
    }
    if let Some(launcher) = Launcher::of(OP, y)? {
        let operands = [
            Operand::Write(y),
            Operand::Read(scales),
            base.map_or(Operand::Null, Operand::Read),
            bias.map_or(Operand::Null, Operand::Read),
            Operand::U32(n),
            Operand::U32(d),
        ];
        let grid = launcher.grid_stride(n * d, PER_THREAD);
        // SAFETY: y and base have rows of d elements, the scales and the bias have one for each.
        return unsafe { launcher.launch("dora_scale_bf16", grid, &operands) };
    }
    let scales = read(OP, scales)?;
    let base = base.map(|base| read(OP, base)).transpose()?;
    let bias = bias.map(|bias| read(OP, bias)).transpose()?;
    cpu::write(OP, y, |y| {
        y.par_chunks_mut(d).enumerate().for_each(|(row, y)| {
            y.iter_mut().zip(&scales[..d]).for_each(|(y, g)| *y *= g);
            let more = base.as_ref().map(|base| &base[row * d..(row + 1) * d]);
            for more in more.into_iter().chain(bias.as_deref()) {
                y.iter_mut().zip(more).for_each(|(y, more)| *y += more);
            }
        });
    })
}

/// Adds the gradient of the magnitude and turns `h` into `dh = g dy`.
fn scale_backward(dy: &Tensor, h: &Tensor, scales: &Tensor, d_magnitude: &Tensor) -> Result<()> {
    let (n, d) = h.dims2()?;
    expect_dims(OP, "dy", dy, &[n, d])?;
    expect_dims(OP, "d_magnitude", d_magnitude, &[d])?;
    if let Some(launcher) = Launcher::of(OP, dy)? {
        return scale_backward_on_device(&launcher, dy, h, scales, d_magnitude);
    }
    /// Columns that a task sums, 64 bytes of each row.
    const COLUMNS: usize = 16;
    let (dy, scales) = (read(OP, dy)?, read(OP, scales)?);
    let (g, inverse_norm) = scales.split_at(d);
    let h_values = read(OP, h)?;
    cpu::write(OP, d_magnitude, |d_magnitude| {
        let tasks = d_magnitude.par_chunks_mut(COLUMNS).enumerate();
        tasks.for_each(|(task, d_magnitude)| {
            let first = task * COLUMNS;
            let mut sums = [0f32; COLUMNS];
            for row in 0..n {
                let start = row * d + first;
                let columns = start..start + d_magnitude.len();
                let products = dy[columns.clone()].iter().zip(&h_values[columns]);
                for (sum, (dy, h)) in sums.iter_mut().zip(products) {
                    *sum += dy * h;
                }
            }
            for (i, (d_magnitude, sum)) in d_magnitude.iter_mut().zip(sums).enumerate() {
                *d_magnitude += inverse_norm[first + i] * sum;
            }
        });
    })?;
    drop(h_values);
    cpu::write(OP, h, |h| {
        let rows = h.par_chunks_mut(d).zip(dy.par_chunks(d));
        rows.for_each(|(h, dy)| {
            for ((h, dy), g) in h.iter_mut().zip(dy).zip(g) {
                *h = g * dy;
            }
        });
    })
}

/// In how many parts the sum over the rows is taken.
fn backward_splits(n: usize, d: usize) -> usize {
    splits(d.div_ceil(BACKWARD.0), n.div_ceil(BACKWARD.1))
}

/// Bytes of those parts on a device.
pub fn backward_scratch_bytes(n: usize, d: usize) -> u64 {
    match backward_splits(n, d) {
        1 => 0,
        splits => (4 * splits * d) as u64,
    }
}

fn scale_backward_on_device(
    launcher: &Launcher,
    dy: &Tensor,
    h: &Tensor,
    scales: &Tensor,
    d_magnitude: &Tensor,
) -> Result<()> {
    let (n, d) = h.dims2()?;
    let splits = backward_splits(n, d);
    let partial = (splits > 1)
        .then(|| launcher.empty((splits, d), DType::F32))
        .transpose()?;
    let operands = [
        Operand::Read(dy),
        Operand::Write(h),
        Operand::Read(scales),
        Operand::U32(n),
        Operand::U32(d),
        Operand::Write(d_magnitude),
        partial.as_ref().map_or(Operand::Null, Operand::Write),
    ];
    let grid = Grid::blocks(d.div_ceil(BACKWARD.0), splits);
    // SAFETY: dy and h are [n, d], the others have d columns, and there is room for the sums of each split.
    unsafe { launcher.launch("dora_scale_backward_bf16", grid, &operands)? };
    let Some(partial) = partial else {
        return Ok(());
    };
    let operands = [
        Operand::Read(&partial),
        Operand::U32(splits),
        Operand::Read(scales),
        Operand::U32(d),
        Operand::Write(d_magnitude),
    ];
    let grid = launcher.grid_stride(d, 1);
    // SAFETY: `partial` has d sums for each split.
    unsafe { launcher.launch("dora_scale_backward_sum_f32", grid, &operands) }
}

/// Which parts of an input are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Kept,
    Both,
}

/// `x' = keep_scale mask x`, and `x - x'` if it is asked for.
fn split(x: &Tensor, mask: &Mask, part: Part) -> Result<(Tensor, Option<Tensor>)> {
    let shape = x.dims2()?;
    let count = shape.0 * shape.1;
    if let Some(launcher) = Launcher::of(OP, x)? {
        let kept = launcher.empty(shape, DType::BF16)?;
        let dropped = (part == Part::Both).then(|| launcher.empty(shape, DType::BF16));
        let dropped = dropped.transpose()?;
        let mut operands = vec![
            Operand::Read(x),
            Operand::U64(count),
            Operand::Write(&kept),
            dropped.as_ref().map_or(Operand::Null, Operand::Write),
        ];
        operands.extend(mask_operands(mask));
        let grid = launcher.grid_stride(count, PER_THREAD);
        // SAFETY: the tensors have `count` elements each.
        unsafe { launcher.launch("dora_split_bf16", grid, &operands)? };
        return Ok((kept, dropped));
    }
    let (x, keep_scale) = (read(OP, x)?, mask.keep_scale());
    let rows = ROWS_PER_TASK * shape.1;
    let kept = cpu::build(shape, |kept| {
        let tasks = kept.par_chunks_mut(rows.max(1)).enumerate();
        tasks.for_each(|(task, kept)| {
            let first = task * rows;
            mask.keep(first, &x[first..first + kept.len()], kept);
            kept.iter_mut().for_each(|kept| *kept *= keep_scale);
        });
    })?;
    let dropped = (part == Part::Both).then(|| {
        let kept = read(OP, &kept)?;
        let rest: Vec<f32> = x.iter().zip(&*kept).map(|(x, kept)| x - kept).collect();
        Ok::<_, crate::Error>(Tensor::from_vec(rest, shape, &Device::Cpu)?)
    });
    let dropped = dropped.transpose()?;
    Ok((kept, dropped))
}

/// `keep_scale mask d_kept + (1 - keep_scale mask) d_dropped`, in place of `d_kept`, or added to `sum` if there is one.
fn join(d_kept: Tensor, d_dropped: &Tensor, mask: &Mask, sum: Option<Tensor>) -> Result<Tensor> {
    let (n, d) = d_kept.dims2()?;
    if let Some(sum) = &sum {
        expect_dims(OP, "dx", sum, &[n, d])?;
    }
    if let Some(launcher) = Launcher::of(OP, &d_kept)? {
        let dx = sum.as_ref().unwrap_or(&d_kept);
        let mut operands = vec![
            Operand::Read(&d_kept),
            Operand::Read(d_dropped),
            Operand::U64(n * d),
            Operand::U32(sum.is_some().into()),
            Operand::Write(dx),
        ];
        operands.extend(mask_operands(mask));
        let grid = launcher.grid_stride(n * d, PER_THREAD);
        // SAFETY: the tensors have n * d elements each.
        unsafe { launcher.launch("dora_join_bf16", grid, &operands)? };
        return Ok(sum.unwrap_or(d_kept));
    }
    let keep_scale = mask.keep_scale();
    let task_elements = (ROWS_PER_TASK * d).max(1);
    let d_dropped = read(OP, d_dropped)?;
    // What `d_kept` has more than `d_dropped` is masked, and `d_dropped` is taken whole.
    let surplus = |first: usize, d_kept: &[f32]| -> Vec<f32> {
        let pairs = d_kept.iter().zip(&d_dropped[first..]);
        pairs
            .map(|(kept, dropped)| keep_scale * (kept - dropped))
            .collect()
    };
    match sum {
        None => {
            cpu::write(OP, &d_kept, |dx| {
                let tasks = dx.par_chunks_mut(task_elements).enumerate();
                tasks.for_each(|(task, dx)| {
                    let first = task * task_elements;
                    let surplus = surplus(first, dx);
                    dx.copy_from_slice(&d_dropped[first..first + dx.len()]);
                    mask.add_kept(first, &surplus, dx);
                });
            })?;
            Ok(d_kept)
        }
        Some(sum) => {
            let d_kept = read(OP, &d_kept)?;
            cpu::write(OP, &sum, |dx| {
                let tasks = dx.par_chunks_mut(task_elements).enumerate();
                tasks.for_each(|(task, dx)| {
                    let part = task * task_elements..task * task_elements + dx.len();
                    let surplus = surplus(part.start, &d_kept[part.clone()]);
                    dx.iter_mut()
                        .zip(&d_dropped[part.clone()])
                        .for_each(|(dx, d)| *dx += d);
                    mask.add_kept(part.start, &surplus, dx);
                });
            })?;
            Ok(sum)
        }
    }
}

/// The norms of the rows of `W + scaling B A`, `[out]`, for [`reference()`].
pub fn reference_norm(w: &Tensor, lora: super::ReferenceLora<'_>) -> Result<Tensor> {
    let merged = (w + (lora.b.matmul(lora.a)? * lora.scaling)?)?;
    Ok(merged.sqr()?.sum(1)?.sqrt()?)
}

/// The same from differentiable primitives, with the weight as a tensor `w: [out, in]` and the norm as a constant.
pub fn reference(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    lora: super::ReferenceLora<'_>,
    (magnitude, norm): (&Tensor, &Tensor),
) -> Result<Tensor> {
    let kept = match lora.dropout {
        Some(factors) => x.mul(factors)?,
        None => x.clone(),
    };
    let plain = super::ReferenceLora {
        dropout: None,
        ..lora
    };
    let h = super::reference(&kept, w, None, Some(plain))?;
    let base = (x - &kept)?.matmul(&w.t()?)?;
    let y = (base + h.broadcast_mul(&(magnitude / norm)?)?)?;
    match bias {
        Some(bias) => Ok(y.broadcast_add(bias)?),
        None => Ok(y),
    }
}
