//! The vector instructions of the processor that the kernels of this layer have a path for.

/// A set of vector instructions; all paths give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The widest that this processor has.
    #[inline]
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Every one that this processor has, the portable one first.
    #[cfg(test)]
    pub(super) fn all_detected() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let widest = Self::detect();
            if widest != Self::Portable {
                all.push(Self::Avx2);
            }
            if widest == Self::Avx512 {
                all.push(Self::Avx512);
            }
        }
        all
    }
}
