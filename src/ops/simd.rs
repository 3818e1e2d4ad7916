//! Elementwise mathematics written so that the compiler vectorizes it, and the switch to the widest instructions here.

use pulp::Arch;

/// Runs `f` compiled for the widest vector instructions of this machine; write it `#[inline(always)] || ...`, with
/// `move` where it reads numbers from outside: behind references they are read again for each element.
#[inline(always)]
pub(super) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    struct Call<F>(F);
    impl<R, F: FnOnce() -> R> pulp::WithSimd for Call<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> R {
            (self.0)()
        }
    }
    Arch::new().dispatch(Call(f))
}

/// Asks for the first `len` of `values` to be in the cache soon, as far as they are there: where the next row of a tile lies,
/// no processor finds out by itself.
#[inline(always)]
pub(super) fn prefetch(values: &[f32], len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in values[..len.min(values.len())].chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every processor of this kind has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, len);
}

/// `e^x`, within 2 units in the last place; 0 below -87.3 and e^88 above 88.
///
/// `x = n ln 2 + t` with `|t| <= ln 2 / 2`, `e^t` by its Taylor polynomial of degree 7, `2^n` through the exponent bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the product of the first with n is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = clamped * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let t = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * t + c;
    }
    let power =
        f32::from_bits(((shifted.to_bits() as i32 - ROUND.to_bits() as i32 + 127) << 23) as u32);
    if x < -87.3 { 0.0 } else { p * power }
}

/// Partial sums kept side by side: a fixed order of additions, whatever the vector width.
const LANES: usize = 16;

/// The sum of `f` over the elements of `slices`, taken side by side; all are as long as the first.
#[inline(always)]
pub(super) fn sum<const S: usize>(slices: [&[f32]; S], f: impl Fn([f32; S]) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let n = slices[0].len();
    let whole = n - n % LANES;
    for start in (0..whole).step_by(LANES) {
        // Arrays of a fixed length: without bounds checks inside, the loop becomes vector instructions.
        let chunk: [[f32; LANES]; S] = slices.map(|slice| {
            let chunk = slice[start..start + LANES].try_into();
            chunk.expect("the range is as long as the array")
        });
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(std::array::from_fn(|s| chunk[s][l]));
        }
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(slices.map(|slice| slice[whole + l]));
    }
    lanes.iter().sum()
}

/// The largest of `x`, or negative infinity for none.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let (got, want) = (exp(x), (x as f64).exp());
            let ulp = (want as f32).to_bits() as i64 - got.to_bits() as i64;
            assert!(ulp.abs() <= 2, "exp({x}) = {got}, {ulp} ulp off");
        }
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn sum_and_max_take_the_rest_of_a_short_chunk() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(sum([&x], |[x]| x), 666.0);
        assert_eq!(max(&x), 36.0);
        assert_eq!(max(&x[..3]), 2.0);
    }
}
