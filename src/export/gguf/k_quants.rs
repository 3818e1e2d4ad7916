//! Blocks of 256 values of a row whose parts have small scales of their own: Q4_K, Q5_K and Q6_K.
//!
//! - Q4_K: `x = d s[j] q - dmin m[j]` for part `j` of 32, with q in 0..16 and s, m in 0..64. f16 `d`, f16 `dmin`, 12 bytes of
//!   s and m, 128 bytes of q: those of an even part in the lower halves of 32 bytes, those of the next one in the upper.
//! - Q5_K: the same with q in 0..32, whose fifth bits are bit `j` of 32 bytes before the others.
//! - Q6_K: `x = d s[j] (q - 32)` for part `j` of 16, with q in 0..64 and s in -128..128. 128 bytes of the lower 4 bits of q, 64
//!   of the upper 2, 16 of s, f16 `d`.
//!
//! A part is fitted by weighted least squares: codes for several ranges about its own, from the best minimum so far on, the
//! scale (and minimum) that is best for each, and of these the one with the least error. Then the scales are rounded, and the
//! codes are taken anew by what is stored.
//!
//! Source: `ggml-common.h` for the layout, `ggml-quants.c` of ggml for the weights and the ranges.

use half::f16;

pub(super) const BLOCK: usize = 256;
/// Values with a scale and a minimum in Q4_K and Q5_K, and with a scale in Q6_K.
const PART: usize = 32;
const SMALL_PART: usize = 16;
/// The largest 6-bit scale or minimum.
const LARGEST_SCALE: f32 = 63.0;
/// Parts of smaller values are zero.
const ZERO: f32 = 1e-15;

/// A scale that is not finite in f16.
#[derive(Debug)]
pub(super) struct ScaleTooLarge;

/// Appends a Q4_K block.
pub(super) fn encode_q4(values: &[f32; BLOCK], out: &mut Vec<u8>) -> Result<(), ScaleTooLarge> {
    let codes = encode_affine::<15>(values, -1.0, 20, out)?;
    put_lower_halves(&codes, out);
    Ok(())
}

/// Appends a Q5_K block.
pub(super) fn encode_q5(values: &[f32; BLOCK], out: &mut Vec<u8>) -> Result<(), ScaleTooLarge> {
    let codes = encode_affine::<31>(values, -0.5, 15, out)?;
    out.extend((0..PART).map(|i| {
        let bits = codes.chunks_exact(PART).enumerate();
        bits.fold(0, |byte, (part, codes)| byte | (codes[i] >> 4) << part)
    }));
    put_lower_halves(&codes, out);
    Ok(())
}

/// Appends a Q6_K block.
pub(super) fn encode_q6(values: &[f32; BLOCK], out: &mut Vec<u8>) -> Result<(), ScaleTooLarge> {
    // Their squares are still finite.
    if largest(values).abs() > 32.0 * 128.0 * f16::MAX.to_f32() {
        return Err(ScaleTooLarge);
    }
    let mut scales = [0f32; BLOCK / SMALL_PART];
    for (scale, part) in scales.iter_mut().zip(values.as_chunks().0) {
        *scale = fit_symmetric(part);
    }
    let largest = largest(&scales);
    if largest.abs() < ZERO {
        out.resize(
            out.len() + BLOCK / 2 + BLOCK / 4 + scales.len() + size_of::<f16>(),
            0,
        );
        return Ok(());
    }
    let inverse = -128.0 / largest;
    let d = stored(1.0 / inverse)?;
    let mut codes = [0u8; BLOCK];
    let mut scale_codes = [0i8; BLOCK / SMALL_PART];
    for (part, scale) in scales.iter().enumerate() {
        scale_codes[part] = nearest(inverse * scale, -128.0, 127.0) as i8;
        let step = d.to_f32() * f32::from(scale_codes[part]);
        let part = part * SMALL_PART..(part + 1) * SMALL_PART;
        for (code, x) in codes[part.clone()].iter_mut().zip(&values[part]) {
            *code = match step == 0.0 {
                true => 0,
                false => (nearest(x / step, -32.0, 31.0) + 32.0) as u8,
            };
        }
    }
    let halves = || codes.chunks_exact(BLOCK / 2);
    for half in halves() {
        out.extend((0..64).map(|i| half[i] & 15 | half[i + 64] << 4));
    }
    for half in halves() {
        let upper = |i: usize, quarter: usize| (half[i + 32 * quarter] >> 4) << (2 * quarter);
        out.extend((0..32).map(|i| (0..4).fold(0, |byte, quarter| byte | upper(i, quarter))));
    }
    out.extend(scale_codes.map(|scale| scale as u8));
    out.extend(d.to_le_bytes());
    Ok(())
}

/// Appends what a block with minima begins with, and gives its codes, of which the largest is `LARGEST`.
fn encode_affine<const LARGEST: u8>(
    values: &[f32; BLOCK],
    first_start: f32,
    starts: usize,
    out: &mut Vec<u8>,
) -> Result<[u8; BLOCK], ScaleTooLarge> {
    let mut scales = [0f32; BLOCK / PART];
    let mut minima = [0f32; BLOCK / PART];
    for (part, values) in values.as_chunks().0.iter().enumerate() {
        let ranges = (0..=starts).map(|i| first_start + 0.1 * i as f32);
        (scales[part], minima[part]) = fit_affine(values, f32::from(LARGEST), ranges);
    }
    let (d, scale_codes) = six_bits(&scales)?;
    let (dmin, minimum_codes) = six_bits(&minima)?;
    out.extend(d.to_le_bytes());
    out.extend(dmin.to_le_bytes());
    out.extend(packed(&scale_codes, &minimum_codes));
    let mut codes = [0; BLOCK];
    for (part, codes) in codes.chunks_exact_mut(PART).enumerate() {
        let step = d.to_f32() * f32::from(scale_codes[part]);
        let minimum = dmin.to_f32() * f32::from(minimum_codes[part]);
        if step > 0.0 {
            for (code, x) in codes.iter_mut().zip(&values[part * PART..]) {
                *code = nearest((x + minimum) / step, 0.0, f32::from(LARGEST)) as u8;
            }
        }
    }
    Ok(codes)
}

/// The nearest whole number in a range of small ones, the even one of two; without a call, so that it is done for many at a time.
fn nearest(value: f32, smallest: f32, largest: f32) -> f32 {
    /// From here on neighbours are 1 apart.
    const WHOLE: f32 = 12_582_912.0;
    value.clamp(smallest, largest) + WHOLE - WHOLE
}

/// The scale and the minimum, which is not negative, of `x = scale q - minimum` with q in 0..=`largest`.
fn fit_affine(values: &[f32; PART], largest: f32, ranges: impl Iterator<Item = f32>) -> (f32, f32) {
    let squares: f32 = values.iter().map(|x| x * x).sum();
    let rms = (squares / PART as f32).sqrt();
    let weights = values.map(|x| rms + x.abs());
    let lowest = values.iter().copied().fold(0f32, f32::min);
    let highest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if highest <= lowest {
        return (0.0, -lowest);
    }
    let codes = |range: f32, lowest: f32| {
        let inverse = (range + largest) / (highest - lowest);
        values.map(|x| nearest(inverse * (x - lowest), 0.0, largest))
    };
    let error = |q: &[f32; PART], scale: f32, offset: f32| {
        sum(|i| weights[i] * (scale * q[i] + offset - values[i]).powi(2))
    };
    let sum_w = sum(|i| weights[i]);
    let sum_x = sum(|i| weights[i] * values[i]);
    let mut best = ((highest - lowest) / largest, lowest);
    let mut least = error(&codes(0.0, lowest), best.0, best.1);
    for range in ranges {
        let q = codes(range, best.1);
        let sum_q = sum(|i| weights[i] * q[i]);
        let sum_qq = sum(|i| weights[i] * q[i] * q[i]);
        let sum_qx = sum(|i| weights[i] * q[i] * values[i]);
        let determinant = sum_w * sum_qq - sum_q * sum_q;
        if determinant <= 0.0 {
            continue;
        }
        let mut scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
        let mut offset = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
        if offset > 0.0 {
            (scale, offset) = (sum_qx / sum_qq, 0.0);
        }
        let found = error(&q, scale, offset);
        if found < least {
            (least, best) = (found, (scale, offset));
        }
    }
    (best.0, -best.1)
}

/// The sum over a part, several terms at a time.
fn sum(term: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 8;
    let mut sums = [0f32; LANES];
    for first in (0..PART).step_by(LANES) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += term(first + lane);
        }
    }
    sums.iter().sum()
}

/// The scale of `x = scale q` with q in -32..32.
fn fit_symmetric(values: &[f32; SMALL_PART]) -> f32 {
    let largest = largest(values);
    if largest.abs() < ZERO {
        return 0.0;
    }
    let sums = |range: f32| {
        let inverse = -(32.0 + range) / largest;
        values.iter().fold((0.0, 0.0), |(qx, qq), x| {
            let q = nearest(inverse * x, -32.0, 31.0);
            let w = x * x;
            (qx + w * x * q, qq + w * q * q)
        })
    };
    let (mut scale, mut best) = (0.0, 0.0);
    for step in [0].into_iter().chain(-9..0).chain(1..=9) {
        let (qx, qq) = sums(0.1 * step as f32);
        if qq > 0.0 && qx * qx > best * qq {
            scale = qx / qq;
            best = scale * qx;
        }
    }
    scale
}

/// The first of the numbers that are largest, whatever their sign.
fn largest(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b.abs() > a.abs() { b } else { a };
    values.iter().copied().reduce(larger).unwrap_or(0.0)
}

/// What 6-bit codes are multiples of, and the codes.
fn six_bits(scales: &[f32; BLOCK / PART]) -> Result<(f16, [u8; BLOCK / PART]), ScaleTooLarge> {
    let largest = scales.iter().copied().fold(0f32, f32::max);
    let inverse = match largest > 0.0 {
        true => LARGEST_SCALE / largest,
        false => 0.0,
    };
    let codes = scales.map(|scale| nearest(inverse * scale, 0.0, LARGEST_SCALE) as u8);
    Ok((stored(largest / LARGEST_SCALE)?, codes))
}

fn stored(scale: f32) -> Result<f16, ScaleTooLarge> {
    let stored = f16::from_f32(scale);
    stored.is_finite().then_some(stored).ok_or(ScaleTooLarge)
}

/// Eight scales and eight minima of 6 bits: four of each in 8 bytes, whose upper two bits are those of the other four, of which
/// 4 bytes have the lower four bits.
fn packed(scales: &[u8; BLOCK / PART], minima: &[u8; BLOCK / PART]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for i in 0..4 {
        bytes[i] = scales[i] | (scales[i + 4] >> 4) << 6;
        bytes[i + 4] = minima[i] | (minima[i + 4] >> 4) << 6;
        bytes[i + 8] = scales[i + 4] & 15 | (minima[i + 4] & 15) << 4;
    }
    bytes
}

/// Appends the lower four bits of the codes, two parts side by side.
fn put_lower_halves(codes: &[u8; BLOCK], out: &mut Vec<u8>) {
    for parts in codes.chunks_exact(2 * PART) {
        out.extend((0..PART).map(|i| parts[i] & 15 | (parts[i + PART] & 15) << 4));
    }
}
