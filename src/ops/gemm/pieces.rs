//! How our own kernels go through a sum of products: in blocks, and in pieces of their right-hand sides.

use std::ops::Range;

use super::{Mat, Rhs, Scratch, Window};

/// Blocks of columns of a sum of products over blocks of the terms' joined k, those of the same columns one after another. There
/// is one even if k is 0: the result still has to be written.
pub(super) fn blocks(
    cols: usize,
    block_cols: usize,
    k: usize,
    block_k: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let block = |start: usize, len: usize, all: usize| start..all.min(start + len);
    (0..cols).step_by(block_cols).flat_map(move |first| {
        let steps = (0..k.max(1)).step_by(block_k);
        steps.map(move |start| (block(first, block_cols, cols), block(start, block_k, k)))
    })
}

/// The terms that have a part in `steps` of their joined k, each with its own steps, of which it has `steps_of`.
pub(super) fn parts<'t, T>(
    terms: &'t [T],
    steps_of: impl Fn(&T) -> usize,
    steps: &Range<usize>,
) -> impl Iterator<Item = (&'t T, Range<usize>)> {
    let Range { start, end } = *steps;
    let mut first = 0;
    terms.iter().filter_map(move |term| {
        let own = first..first + steps_of(term);
        first = own.end;
        let (start, end) = (start.max(own.start), end.min(own.end));
        (start < end).then(|| (term, start - own.start..end - own.start))
    })
}

/// How many k of a right-hand side are read at a time.
pub(super) struct Strips {
    /// Of a matrix, for all columns: more are read panel by panel, each row of which may begin on another page.
    pub(super) mat: usize,
    /// Of a weight `[outs, ins]`, for all columns.
    pub(super) weight: usize,
    /// Of a weight `[ins, outs]`, for one panel.
    pub(super) transposed: usize,
}

/// Gives `f` the part `steps` by `cols` of a right-hand side in pieces `[k, up to width columns]`, with the first k of each,
/// counted from that of `steps`, and its panel. Weights are dequantized into `scratch`.
pub(super) fn for_each_piece(
    rhs: &Rhs<'_>,
    (steps, cols): (&Range<usize>, &Range<usize>),
    width: usize,
    strips: Strips,
    scratch: &mut Scratch,
    mut f: impl FnMut(usize, usize, Mat<'_>),
) {
    let panels = || {
        let starts = cols.clone().step_by(width).enumerate();
        starts.map(|(panel, start)| (panel, start..cols.end.min(start + width)))
    };
    let shifted = |range: &Range<usize>, by: usize| range.start + by..range.end + by;
    let strips_of = |len: usize| {
        let starts = steps.clone().step_by(len);
        starts.map(move |start| start..steps.end.min(start + len))
    };
    match rhs {
        Rhs::Mat(rhs) => {
            for k in strips_of(strips.mat) {
                for (panel, cols) in panels() {
                    f(k.start - steps.start, panel, rhs.rows(k.clone()).cols(cols));
                }
            }
        }
        Rhs::Weight(Window { weight, outs, ins }) => {
            for k in strips_of(strips.weight) {
                let strip = scratch.take(k.len() * cols.len());
                weight.read_tile(shifted(&k, outs.start), shifted(cols, ins.start), strip);
                let strip = Mat::new(strip, k.len(), cols.len());
                for (panel, part) in panels() {
                    let part = part.start - cols.start..part.end - cols.start;
                    f(k.start - steps.start, panel, strip.cols(part));
                }
            }
        }
        Rhs::Transposed(Window { weight, outs, ins }) => {
            for k in strips_of(strips.transposed) {
                for (panel, part) in panels() {
                    let strip = scratch.take(part.len() * k.len());
                    weight.read_tile(shifted(&part, outs.start), shifted(&k, ins.start), strip);
                    let strip = Mat::new(strip, part.len(), k.len()).t();
                    f(k.start - steps.start, panel, strip);
                }
            }
        }
    }
}
