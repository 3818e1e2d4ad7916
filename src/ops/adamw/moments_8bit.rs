//! AdamW with block-wise moments in 8 bits: a quarter of the memory of f32 ones.
//!
//! A block of 256 elements has its largest magnitude `absmax`, and a code for each element: the nearest to `value / absmax`
//! of the dynamic map, the signed one for `m`, the unsigned one for `v`. The new moments update the weight before they are
//! rounded to codes.
//!
//! Source: arXiv:2110.02861; the codes of bitsandbytes 0.50.2 (`tests/kernels/adamw_8bit.rs`).

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::super::cpu::{self, expect_dims, read};
use super::super::launcher::{Launcher, Operand};
use super::super::simd::vectorized;
use super::{AdamW, OP, Scalars, Weight};
use crate::Result;
use crate::quant::{
    dynamic_lower_bounds, dynamic_map, nearest_dynamic_code, unsigned_dynamic_lower_bounds,
    unsigned_dynamic_map,
};

/// Elements that share an `absmax`.
pub const BLOCK_SIZE: usize = 256;
/// Elements that a thread of the kernel takes at a time.
const PER_THREAD: usize = 8;
/// Blocks that a task takes.
const BLOCKS_PER_TASK: usize = 64;

/// One moment of a flat weight of `n` elements.
///
/// # Shapes
/// `codes: [n]` bytes, `absmax: [ceil(n / 256)]` in f32.
#[derive(Debug, Clone)]
pub struct Moment {
    pub codes: Tensor,
    pub absmax: Tensor,
}

impl Moment {
    fn zeros(n: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            codes: Tensor::zeros(n, DType::U8, device)?,
            absmax: Tensor::zeros(n.div_ceil(BLOCK_SIZE), DType::F32, device)?,
        })
    }
}

/// Both moments of a flat weight.
#[derive(Debug, Clone)]
pub struct Moments {
    pub m: Moment,
    pub v: Moment,
    /// [`maps`] of their device.
    pub maps: [Tensor; 2],
}

/// The signed map and the unsigned one, where kernels read them.
pub fn maps(device: &Device) -> Result<[Tensor; 2]> {
    let map = |map: &[f32; 256]| Tensor::from_slice(map, map.len(), device);
    Ok([map(dynamic_map())?, map(unsigned_dynamic_map())?])
}

/// The codes of zero, of `m` and of `v`.
pub fn zero_codes() -> [u8; 2] {
    [dynamic_lower_bounds(), unsigned_dynamic_lower_bounds()]
        .map(|lower_bounds| nearest_dynamic_code(0.0, lower_bounds))
}

impl Moments {
    /// Moments of zero for `n` elements.
    pub fn zeros(n: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            m: Moment::zeros(n, device)?,
            v: Moment::zeros(n, device)?,
            maps: maps(device)?,
        })
    }
}

/// Updates `weight` and its moments in place.
///
/// # Shapes
/// `weight`, `grad: [n]`.
pub fn forward(update: &AdamW, weight: Weight<'_>, grad: &Tensor, moments: &Moments) -> Result<()> {
    let _span = tracing::trace_span!("optimizer").entered();
    let n = grad.elem_count();
    expect_dims(OP, "weight", weight.value, &[n])?;
    expect_dims(OP, "grad", grad, &[n])?;
    for moment in [&moments.m, &moments.v] {
        expect_dims(OP, "codes", &moment.codes, &[n])?;
        expect_dims(OP, "absmax", &moment.absmax, &[n.div_ceil(BLOCK_SIZE)])?;
    }
    if let Some(launcher) = Launcher::of(OP, weight.value)? {
        return forward_on_device(&launcher, update, weight, grad, moments);
    }
    let grad = read(OP, grad)?;
    let scalars = Scalars::from(update);
    let Moments { m, v, .. } = moments;
    cpu::write(OP, weight.value, |w| {
        write_moment(m, |m_codes, m_absmax| {
            write_moment(v, |v_codes, v_absmax| {
                let elements = BLOCKS_PER_TASK * BLOCK_SIZE;
                let m = m_codes
                    .par_chunks_mut(elements)
                    .zip(m_absmax.par_chunks_mut(BLOCKS_PER_TASK));
                let v = v_codes
                    .par_chunks_mut(elements)
                    .zip(v_absmax.par_chunks_mut(BLOCKS_PER_TASK));
                let weights = w.par_chunks_mut(elements).zip(grad.par_chunks(elements));
                weights.zip(m).zip(v).for_each(|(((w, g), m), v)| {
                    vectorized(
                        #[inline(always)]
                        move || update_blocks(scalars, w, g, m, v),
                    );
                });
                Ok(())
            })
        })
    })?
}

fn write_moment<R>(
    moment: &Moment,
    f: impl FnOnce(&mut [u8], &mut [f32]) -> Result<R>,
) -> Result<R> {
    cpu::write_bytes(OP, &moment.codes, |codes| {
        cpu::write(OP, &moment.absmax, |absmax| f(codes, absmax))
    })??
}

/// Codes and scales of some blocks.
type Blocks<'a> = (&'a mut [u8], &'a mut [f32]);

#[inline(always)]
fn update_blocks(scalars: Scalars, w: &mut [f32], grad: &[f32], m: Blocks<'_>, v: Blocks<'_>) {
    let weights = w.chunks_mut(BLOCK_SIZE).zip(grad.chunks(BLOCK_SIZE));
    let m = m.0.chunks_mut(BLOCK_SIZE).zip(m.1);
    let v = v.0.chunks_mut(BLOCK_SIZE).zip(v.1);
    for (((w, grad), (m_codes, m_absmax)), (v_codes, v_absmax)) in weights.zip(m).zip(v) {
        let mut m = dequantize(m_codes, *m_absmax, dynamic_map());
        let mut v = dequantize(v_codes, *v_absmax, unsigned_dynamic_map());
        for (((w, g), m), v) in w.iter_mut().zip(grad).zip(&mut m).zip(&mut v) {
            scalars.apply(*g, w, m, v);
        }
        *m_absmax = quantize(&m[..w.len()], m_codes, dynamic_lower_bounds());
        *v_absmax = quantize(&v[..w.len()], v_codes, unsigned_dynamic_lower_bounds());
    }
}

#[inline(always)]
fn dequantize(codes: &[u8], absmax: f32, map: &[f32; 256]) -> [f32; BLOCK_SIZE] {
    let mut values = [0.0; BLOCK_SIZE];
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = map[usize::from(code)] * absmax;
    }
    values
}

/// Writes the codes of a block and gives its scale. A block of zeros takes the code of 0.
#[inline(always)]
fn quantize(values: &[f32], codes: &mut [u8], lower_bounds: &[f32; 256]) -> f32 {
    let absmax = values.iter().fold(0f32, |absmax, v| absmax.max(v.abs()));
    for (code, &value) in codes.iter_mut().zip(values) {
        let normalized = if absmax > 0.0 { value / absmax } else { 0.0 };
        *code = nearest_dynamic_code(normalized, lower_bounds);
    }
    absmax
}

fn forward_on_device(
    launcher: &Launcher,
    update: &AdamW,
    weight: Weight<'_>,
    grad: &Tensor,
    moments: &Moments,
) -> Result<()> {
    let Moments { m, v, maps } = moments;
    let n = grad.elem_count();
    let mut operands = vec![
        Operand::Write(weight.value),
        Operand::Write(weight.lower_half()?),
        Operand::Read(grad),
        Operand::Write(&m.codes),
        Operand::Write(&m.absmax),
        Operand::Write(&v.codes),
        Operand::Write(&v.absmax),
        Operand::Read(&maps[0]),
        Operand::Read(&maps[1]),
        Operand::U64(n),
    ];
    operands.extend(Scalars::from(update).operands());
    let grid = launcher.grid_stride(n, PER_THREAD);
    // SAFETY: weight, gradient and codes have n elements, and a scale belongs to every 256 of them.
    unsafe { launcher.launch("adamw_8bit_moments", grid, &operands) }
}
