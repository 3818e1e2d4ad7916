//! Dropout whose masks are never stored: whoever needs one makes it again, from a seed and a position.
//!
//! An element is kept where its 16 random bits are at least `threshold = p 2^16`, and what is kept is multiplied by
//! `keep_scale = 2^16 / (2^16 - threshold)`, which is `1 / (1 - p)` for the `p` that the threshold stands for.
//!
//! One call of Philox gives the bits of eight elements. Its key is made from (seed, optimizer step, micro-batch), its counter
//! is (element / 8, layer + 2^16 instance, module + 2^8 tile), and `element % 8` counts the halves of its four words, the low half first. An
//! element is counted in its micro-batch or, where a module takes that in tiles of rows, in its tile, row-major, so that the
//! mask does not depend on what is kept and what is computed again.
//! `cuda/dropout.cuh` makes the same masks.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::array::from_fn;
use std::ops::Range;

use candle_core::{Device, Tensor};

use super::philox::{micro_batch_key, philox, philox_lanes};
use super::simd::vectorized;
use crate::Result;

/// Elements whose random numbers come from one call.
const PER_CALL: usize = 8;
/// Calls that are made side by side.
const LANES: usize = 16;
/// Elements that are masked at a time.
const CHUNK: usize = LANES * PER_CALL;
/// Bits of the counter's last word that tell the modules of a layer apart; the tile is above them.
const MODULE_BITS: u32 = 8;
/// Bits of the word before it that tell the layers apart; the copy of the micro-batch is above them.
const LAYER_BITS: u32 = 16;
/// Tells the keys of dropout from other uses of the seed: "drop".
const PURPOSE: u32 = 0x6472_6f70;

/// What the masks of one micro-batch are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropout {
    key: [u32; 2],
    threshold: u32,
    tile: u32,
    instance: u32,
}

impl Dropout {
    /// Dropout with probability `p`, from 0 to less than 1, rounded to 1/65536; `None` where nothing is dropped.
    ///
    /// `step` is the number of optimizer steps done, `micro_batch` counts within the step.
    pub fn new(p: f64, seed: u64, step: usize, micro_batch: usize) -> Option<Self> {
        Self::for_purpose(p, seed, (step, micro_batch), PURPOSE)
    }

    /// The same with masks for another use of the seed.
    pub(super) fn for_purpose(
        p: f64,
        seed: u64,
        (step, micro_batch): (usize, usize),
        purpose: u32,
    ) -> Option<Self> {
        let threshold = ((p * 65_536.0).round() as u32).min(65_535);
        let key = micro_batch_key(seed, step, micro_batch, purpose);
        (threshold > 0).then_some(Self {
            key,
            threshold,
            tile: 0,
            instance: 0,
        })
    }

    /// The dropout of tile `number` of a micro-batch that a module goes through in tiles of rows; number 0 is the first.
    pub fn of_tile(self, number: usize) -> Self {
        Self {
            tile: number as u32,
            ..self
        }
    }

    /// The dropout of another copy of the micro-batch; number 0 is the first.
    pub fn of_instance(self, number: usize) -> Self {
        Self {
            instance: number as u32,
            ..self
        }
    }

    /// The probability to be dropped that `p` was rounded to.
    pub(super) fn p(&self) -> f64 {
        f64::from(self.threshold) / 65_536.0
    }

    /// The mask of the input of one module of one layer.
    pub fn mask(&self, layer: usize, module: usize) -> Mask {
        Mask {
            key: self.key,
            stream: [
                layer as u32 | self.instance << LAYER_BITS,
                module as u32 | self.tile << MODULE_BITS,
            ],
            threshold: self.threshold,
        }
    }
}

/// The mask of one matrix, `[N, in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    pub(super) key: [u32; 2],
    pub(super) stream: [u32; 2],
    pub(super) threshold: u32,
}

impl Mask {
    /// Whether each of the first `count` elements is kept.
    pub(super) fn kept(&self, count: usize) -> Vec<bool> {
        let mut kept = vec![0.0; count];
        self.keep(0, &vec![1.0; count], &mut kept);
        kept.into_iter().map(|kept| kept != 0.0).collect()
    }

    /// Whether this is the mask of the module after that of `other`.
    pub(super) fn follows(&self, other: &Self) -> bool {
        let [layer, module] = other.stream;
        let next = [layer, module + 1];
        *self
            == Self {
                stream: next,
                ..*other
            }
    }

    /// What is kept is multiplied by this.
    pub fn keep_scale(&self) -> f32 {
        65_536.0 / (65_536 - self.threshold) as f32
    }

    /// Copies `x`, whose first element is number `first`, to `kept`, with zeros for what is dropped.
    pub(super) fn keep(&self, first: usize, x: &[f32], kept: &mut [f32]) {
        self.put_kept::<false>(first, x, kept);
    }

    /// Adds to `sum` what is kept of `x`, whose first element is number `first`.
    pub(super) fn add_kept(&self, first: usize, x: &[f32], sum: &mut [f32]) {
        self.put_kept::<true>(first, x, sum);
    }

    /// Sets to zero what is dropped of `x`, whose first element is number `first`.
    pub(super) fn zero_dropped(&self, first: usize, x: &mut [f32]) {
        const COPIED: usize = 256;
        let mut copy = [0.0; COPIED];
        for (number, x) in x.chunks_mut(COPIED).enumerate() {
            let copy = &mut copy[..x.len()];
            copy.copy_from_slice(x);
            self.keep(first + number * COPIED, copy, x);
        }
    }

    /// Puts what is kept of `x` into `out`: copied, or with `ADD` added to what is there.
    fn put_kept<const ADD: bool>(&self, first: usize, x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "a mask changes no size");
        #[cfg(target_arch = "x86_64")]
        if avx512::is_available() {
            // SAFETY: just checked.
            return unsafe { avx512::put_kept::<ADD>(self, first, x, out) };
        }
        #[cfg(target_arch = "x86_64")]
        if avx2::is_available() {
            // SAFETY: just checked.
            return unsafe { avx2::put_kept::<ADD>(self, first, x, out) };
        }
        self.put_kept_anywhere::<ADD>(first, x, out);
    }

    /// The same on any processor.
    fn put_kept_anywhere<const ADD: bool>(&self, first: usize, x: &[f32], out: &mut [f32]) {
        let mask = *self;
        vectorized(
            #[inline(always)]
            move || {
                for (call, skipped, part) in chunks::<CHUNK>(first, x.len()) {
                    let kept = mask.bits(call) >> skipped;
                    let (x, out) = (&x[part.clone()], &mut out[part]);
                    for (i, (x, out)) in x.chunks(16).zip(out.chunks_mut(16)).enumerate() {
                        let kept = (kept >> (16 * i)) as u16;
                        for (l, (&x, out)) in x.iter().zip(out).enumerate() {
                            let put = if kept & (1 << l) != 0 { x } else { 0.0 };
                            *out = if ADD { *out + put } else { put };
                        }
                    }
                }
            },
        );
    }

    /// A bit for each element of [`LANES`] calls, set where it is kept.
    #[inline(always)]
    fn bits(&self, first_call: u64) -> u128 {
        let calls: [u64; LANES] = from_fn(|lane| first_call + lane as u64);
        let counter = [
            calls,
            calls.map(|call| call >> 32),
            [self.stream[0].into(); LANES],
            [self.stream[1].into(); LANES],
        ];
        let words = philox_lanes(self.key, counter);
        let threshold = u64::from(self.threshold);
        let mut dropped = [0u64; LANES];
        for (place, words) in words.iter().enumerate() {
            for (dropped, word) in dropped.iter_mut().zip(words) {
                // Borrowing from the top bit says which is the smaller.
                let low = (word & 0xffff).wrapping_sub(threshold) >> 63;
                let high = (word >> 16 & 0xffff).wrapping_sub(threshold) >> 63;
                *dropped |= (low | high << 1) << (2 * place);
            }
        }
        u128::from_le_bytes(dropped.map(|bits| !bits as u8))
    }

    /// The same from single calls: 0 or [`keep_scale`](Self::keep_scale) for each element, in f64.
    ///
    /// # Shapes
    /// `[rows, cols]`.
    pub fn reference(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let factor = |element: usize| {
            let call = (element / PER_CALL) as u64;
            let [layer, module] = self.stream;
            let words = philox(self.key, [call as u32, (call >> 32) as u32, layer, module]);
            let number = words[element % PER_CALL / 2] >> (16 * (element % 2)) & 0xffff;
            match number >= self.threshold {
                true => f64::from(self.keep_scale()),
                false => 0.0,
            }
        };
        let factors: Vec<f64> = (0..rows * cols).map(factor).collect();
        Ok(Tensor::from_vec(factors, (rows, cols), &Device::Cpu)?)
    }
}

/// The parts of `len` elements, the first of them number `first`, whose random numbers come from the same calls, `CHUNK`
/// numbers each: the first call, how many of its numbers are skipped, and the elements.
#[inline(always)]
fn chunks<const CHUNK: usize>(
    first: usize,
    len: usize,
) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let (call, skipped) = (first / PER_CALL, first % PER_CALL);
    (0..(skipped + len).div_ceil(CHUNK)).map(
        #[inline(always)]
        move |number| {
            let start = number * CHUNK;
            let part = start.saturating_sub(skipped)..len.min(start + CHUNK - skipped);
            let skipped = skipped.saturating_sub(start);
            ((call + start / PER_CALL) as u64, skipped, part)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_row_has_the_mask_of_the_whole() {
        let mask = Dropout::new(0.3, 7, 11, 2).unwrap().mask(3, 5);
        let (rows, cols) = (9, 137);
        let factors: Vec<f64> = mask
            .reference(rows, cols)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let ones = vec![1.0; rows * cols];
        // All at once, rows that start anywhere, and parts of them.
        for (part, length) in [(0, rows * cols), (0, cols), (3, 40), (8, 129), (16, 121)] {
            for row in 0..rows * cols / length.max(cols) {
                let first = row * cols + part;
                let mut kept = vec![f32::NAN; length];
                mask.keep(first, &ones[..length], &mut kept);
                let mut portable = vec![f32::NAN; length];
                mask.put_kept_anywhere::<false>(first, &ones[..length], &mut portable);
                assert_eq!(kept, portable);
                #[cfg(target_arch = "x86_64")]
                if avx2::is_available() {
                    kept.fill(f32::NAN);
                    // SAFETY: just checked.
                    unsafe { avx2::put_kept::<false>(&mask, first, &ones[..length], &mut kept) };
                    assert_eq!(kept, portable);
                }
                kept.fill(1.0);
                mask.zero_dropped(first, &mut kept);
                assert_eq!(kept, portable);
                let mut sum = vec![2.0; length];
                mask.add_kept(first, &ones[..length], &mut sum);
                for i in 0..length {
                    let expected = if factors[first + i] == 0.0 { 0.0 } else { 1.0 };
                    assert_eq!(kept[i], expected, "element {first} + {i}");
                    assert_eq!(sum[i], 2.0 + expected, "element {first} + {i}");
                }
            }
        }
    }

    #[test]
    fn elements_beyond_the_first_word_of_the_counter_have_numbers_of_their_own() {
        let mask = Dropout::new(0.5, 0, 0, 0).unwrap().mask(0, 0);
        let first = (1usize << 35) - 64;
        let ones = [1.0; 128];
        let (mut kept, mut wrapped) = ([0.0; 128], [0.0; 64]);
        mask.keep(first, &ones, &mut kept);
        mask.keep(0, &ones[..64], &mut wrapped);
        assert_ne!(kept[64..], wrapped);
    }

    #[test]
    fn nothing_is_dropped_where_nothing_should_be() {
        assert_eq!(Dropout::new(0.0, 1, 2, 3), None);
        assert_eq!(Dropout::new(1e-6, 1, 2, 3), None);
    }

    #[test]
    fn what_is_kept_makes_up_for_what_is_dropped() {
        for p in [0.05, 0.1, 0.5, 0.999_999] {
            let mask = Dropout::new(p, 1, 2, 3).unwrap().mask(0, 0);
            let kept = 1.0 - f64::from(mask.threshold) / 65_536.0;
            assert!((kept * f64::from(mask.keep_scale()) - 1.0).abs() < 1e-7);
            assert!((kept - (1.0 - p)).abs() <= 1.0 / 65_536.0, "{p}");
        }
    }
}
