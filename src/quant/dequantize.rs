//! Dequantization: `w = code[c] * absmax` of the block, in f32, rounded once more for a narrower output.

use half::{bf16, f16};
use rayon::prelude::*;

use super::{Params4bit, double_quant::Scales};

/// Elements that one task of the thread pool dequantizes.
const TASK_ELEMENTS: usize = 1 << 16;

/// A type that weights are dequantized to: `f32`, `bf16` or `f16`.
pub trait DequantizeTo: Copy + Send + Sync + private::Sealed {
    /// Rounds to the nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

impl DequantizeTo for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl DequantizeTo for bf16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl DequantizeTo for f16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Params4bit {
    /// Dequantizes the whole weight, in parallel.
    ///
    /// # Panics
    /// If `out` has not [`numel`](Self::numel) elements, or the weight is not [valid](Self::validate).
    pub fn dequantize<T: DequantizeTo>(&self, out: &mut [T]) {
        assert_eq!(out.len(), self.numel(), "the output has the weight's shape");
        out.par_chunks_mut(TASK_ELEMENTS)
            .enumerate()
            .for_each(|(task, out)| dequantize_run(self, task * TASK_ELEMENTS, out));
    }

    /// Dequantizes the flat elements `start..start + out.len()` on the calling thread.
    ///
    /// # Panics
    /// If the range leaves the weight, or the weight is not [valid](Self::validate).
    pub fn dequantize_range(&self, start: usize, out: &mut [f32]) {
        dequantize_run(self, start, out);
    }
}

fn dequantize_run<T: DequantizeTo>(weight: &Params4bit, start: usize, out: &mut [T]) {
    let code = weight.quant_type.code();
    let mut scales = Scales::starting_at(&weight.absmax, start / weight.block_size);
    let mut element = start;
    let mut rest = out;
    while !rest.is_empty() {
        let in_block = (weight.block_size - element % weight.block_size).min(rest.len());
        let (out, tail) = rest.split_at_mut(in_block);
        let scale = scales.advance();
        let table = code.map(|c| T::from_f32(c * scale));
        expand(&weight.packed, element, &table, out);
        element += in_block;
        rest = tail;
    }
}

/// Looks the codes of the elements from `start` on up in `table`.
fn expand<T: Copy>(packed: &[u8], start: usize, table: &[T; 16], mut out: &mut [T]) {
    let mut byte = start / 2;
    if start % 2 == 1
        && let Some((first, rest)) = std::mem::take(&mut out).split_first_mut()
    {
        *first = table[usize::from(packed[byte] & 15)];
        byte += 1;
        out = rest;
    }
    let packed = &packed[byte..][..out.len().div_ceil(2)];
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(packed) {
        *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
    }
    if let [last] = last {
        *last = table[usize::from(packed[pairs.len()] >> 4)];
    }
}
