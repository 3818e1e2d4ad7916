//! Dequantization: `w = code[c] * absmax` of the block, in f32, rounded once more for a narrower output.

use bytemuck::cast_slice_mut;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{
    Params4bit,
    double_quant::Scales,
    isa::Isa,
    lookup::{Entry, look_up},
};

/// Elements that one task of the thread pool dequantizes.
const TASK_ELEMENTS: usize = 1 << 16;

/// A type that weights are dequantized to: `f32`, `bf16` or `f16`.
pub trait DequantizeTo: Send + private::Stored {}

impl DequantizeTo for f32 {}
impl DequantizeTo for bf16 {}
impl DequantizeTo for f16 {}

mod private {
    use super::*;

    pub trait Stored: Sized {
        type Bits: Entry;

        fn bits(values: &mut [Self]) -> &mut [Self::Bits];

        /// Rounds to the nearest, ties to even.
        fn round(values: [f32; 16]) -> [Self::Bits; 16];
    }

    impl Stored for f32 {
        type Bits = f32;

        #[inline(always)]
        fn bits(values: &mut [f32]) -> &mut [f32] {
            values
        }

        #[inline(always)]
        fn round(values: [f32; 16]) -> [f32; 16] {
            values
        }
    }

    impl Stored for bf16 {
        type Bits = u16;

        #[inline(always)]
        fn bits(values: &mut [bf16]) -> &mut [u16] {
            cast_slice_mut(values)
        }

        #[inline(always)]
        fn round(values: [f32; 16]) -> [u16; 16] {
            values.map(round_to_bf16)
        }
    }

    impl Stored for f16 {
        type Bits = u16;

        #[inline(always)]
        fn bits(values: &mut [f16]) -> &mut [u16] {
            cast_slice_mut(values)
        }

        #[inline(always)]
        fn round(values: [f32; 16]) -> [u16; 16] {
            let mut rounded = [f16::ZERO; 16];
            rounded.convert_from_f32_slice(&values);
            rounded.map(f16::to_bits)
        }
    }
}

/// `bf16::from_f32(value).to_bits()` without a branch, so that a table is rounded in one vector.
#[inline(always)]
fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // The addition could carry a NaN over to a number.
    let bits = if value.is_nan() {
        bits | 0x0040_0000
    } else {
        rounded
    };
    (bits >> 16) as u16
}

impl Params4bit {
    /// Dequantizes the whole weight, in parallel.
    ///
    /// # Panics
    /// If `out` has not [`numel`](Self::numel) elements, or the weight is not [valid](Self::validate).
    pub fn dequantize<T: DequantizeTo>(&self, out: &mut [T]) {
        assert_eq!(out.len(), self.numel(), "the output has the weight's shape");
        let isa = Isa::detect();
        out.par_chunks_mut(TASK_ELEMENTS)
            .enumerate()
            .for_each(|(task, out)| dequantize_run(isa, self, task * TASK_ELEMENTS, out));
    }

    /// Dequantizes the flat elements `start..start + out.len()` on the calling thread.
    ///
    /// # Panics
    /// If the range leaves the weight, or the weight is not [valid](Self::validate).
    pub fn dequantize_range(&self, start: usize, out: &mut [f32]) {
        dequantize_run(Isa::detect(), self, start, out);
    }
}

fn dequantize_run<T: DequantizeTo>(isa: Isa, weight: &Params4bit, start: usize, out: &mut [T]) {
    let out = T::bits(out);
    match isa {
        Isa::Portable => for_each_block::<T>(weight, start, out, look_up),
        // SAFETY: `Isa` says that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { dequantize_avx2::<T>(weight, start, out) },
        // SAFETY: `Isa` says that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { dequantize_avx512::<T>(weight, start, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dequantize_avx2<T: DequantizeTo>(weight: &Params4bit, start: usize, out: &mut [T::Bits]) {
    for_each_block::<T>(weight, start, out, |packed, table, out| {
        // SAFETY: this function has the instructions.
        unsafe { T::Bits::look_up_avx2(packed, table, out) }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn dequantize_avx512<T: DequantizeTo>(weight: &Params4bit, start: usize, out: &mut [T::Bits]) {
    for_each_block::<T>(weight, start, out, |packed, table, out| {
        // SAFETY: this function has the instructions.
        unsafe { T::Bits::look_up_avx512(packed, table, out) }
    });
}

/// Calls `look_up(packed, table, out)` for the part of each block that lies in the range, with the block's table.
#[inline(always)]
fn for_each_block<T: DequantizeTo>(
    weight: &Params4bit,
    start: usize,
    out: &mut [T::Bits],
    look_up: impl Fn(&[u8], &[T::Bits; 16], &mut [T::Bits]),
) {
    let code = weight.quant_type.code();
    let mut scales = Scales::starting_at(&weight.absmax, start / weight.block_size);
    let mut left_in_block = weight.block_size - start % weight.block_size;
    let mut element = start;
    let mut rest = out;
    while !rest.is_empty() {
        let (mut out, tail) = rest.split_at_mut(left_in_block.min(rest.len()));
        let scale = scales.advance();
        let table = T::round(code.map(|c| c * scale));
        if element % 2 == 1 {
            // Only the first run can begin in a low nibble: block sizes are even.
            out[0] = table[usize::from(weight.packed[element / 2] & 15)];
            out = &mut out[1..];
            element += 1;
        }
        look_up(&weight.packed[element / 2..], &table, out);
        element += out.len();
        left_in_block = weight.block_size;
        rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{DenseTensor, DoubleQuant, QuantType, QuantizeOptions};
    use super::*;

    fn range<T: DequantizeTo + Clone>(
        isa: Isa,
        weight: &Params4bit,
        start: usize,
        mut out: Vec<T>,
    ) -> Vec<T> {
        dequantize_run(isa, weight, start, &mut out);
        out
    }

    #[test]
    fn rounding_to_bf16_equals_that_of_half() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                assert_eq!(
                    round_to_bf16(value),
                    bf16::from_f32(value).to_bits(),
                    "{value:e}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn every_instruction_set_gives_the_same_bits(
            values in prop::collection::vec(-1.0f32..1.0, 1..1500),
            block_size in prop::sample::select(vec![32usize, 64, 256]),
            quant_type in prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]),
            double_quant in prop::sample::select(vec![DoubleQuant::No, DoubleQuant::Yes]),
            start in any::<prop::sample::Index>(),
            end in any::<prop::sample::Index>(),
        ) {
            let n = values.len();
            let options = QuantizeOptions { quant_type, block_size, double_quant };
            let weight = Params4bit::quantize("w", &DenseTensor::from_f32(vec![n], &values), options).unwrap();
            let (start, end) = (start.index(n), end.index(n + 1));
            let len = end.saturating_sub(start);
            let f32s = range(Isa::Portable, &weight, start, vec![f32::NAN; len]);
            let bf16s = range(Isa::Portable, &weight, start, vec![bf16::NAN; len]);
            let f16s = range(Isa::Portable, &weight, start, vec![f16::NAN; len]);
            for (i, &value) in f32s.iter().enumerate() {
                prop_assert_eq!(bf16s[i].to_bits(), bf16::from_f32(value).to_bits());
                prop_assert_eq!(f16s[i].to_bits(), f16::from_f32(value).to_bits());
            }
            for isa in Isa::all_detected() {
                prop_assert_eq!(&range(isa, &weight, start, vec![f32::NAN; len]), &f32s);
                prop_assert_eq!(&range(isa, &weight, start, vec![bf16::NAN; len]), &bf16s);
                prop_assert_eq!(&range(isa, &weight, start, vec![f16::NAN; len]), &f16s);
            }
        }
    }
}
