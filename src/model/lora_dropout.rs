//! Dropout on adapters, and the instances of a micro-batch that it makes.

use std::borrow::Cow;

use crate::ops::dropout::Dropout;
use crate::ops::matrix_dropout::MatrixDropout;

/// What the adapters of a micro-batch do without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoraDropout {
    /// Elements of the adapters' inputs.
    pub inputs: Option<Dropout>,
    /// Features of the adapters' matrices.
    pub matrices: Option<MatrixDropout>,
}

impl LoraDropout {
    /// How many times a micro-batch is there, each time with masks of its own; one copy lies after another.
    pub fn instances(&self) -> usize {
        self.matrices.map_or(1, |dropout| dropout.instances())
    }

    /// That of one of the instances; what is one already stays as it is.
    pub(super) fn of_instance(self, number: usize) -> Self {
        if self.instances() == 1 {
            return self;
        }
        Self {
            inputs: self.inputs.map(|dropout| dropout.of_instance(number)),
            matrices: self.matrices.map(|dropout| dropout.instance(number)),
        }
    }

    /// With masks of their own for the tokens of a tile; the matrices are the same for all.
    pub(super) fn of_tile(self, number: usize) -> Self {
        Self {
            inputs: self.inputs.map(|dropout| dropout.of_tile(number)),
            ..self
        }
    }
}

/// `values` as many times as there are instances.
pub(super) fn repeat<T: Copy>(values: &[T], instances: usize) -> Cow<'_, [T]> {
    match instances {
        1 => Cow::Borrowed(values),
        _ => Cow::Owned(values.repeat(instances)),
    }
}

/// Where the sequences of all instances begin and end.
///
/// # Shapes
/// `cu_seqlens: [B + 1]` -> `[instances * B + 1]`.
pub(super) fn repeat_sequences(cu_seqlens: &[usize], instances: usize) -> Cow<'_, [usize]> {
    let (Some((first, ends)), true) = (cu_seqlens.split_first(), instances > 1) else {
        return Cow::Borrowed(cu_seqlens);
    };
    let rows = ends.last().copied().unwrap_or(*first);
    let ends = (0..instances).flat_map(|i| ends.iter().map(move |end| i * rows + end));
    Cow::Owned([*first].into_iter().chain(ends).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_lie_one_after_another() {
        assert_eq!(*repeat_sequences(&[0, 3, 5], 3), [0, 3, 5, 8, 10, 13, 15]);
        assert_eq!(*repeat_sequences(&[0, 3, 5], 1), [0, 3, 5]);
        assert_eq!(*repeat_sequences(&[0], 2), [0]);
        assert_eq!(*repeat(&[1, 2], 2), [1, 2, 1, 2]);
    }
}
