//! An orthonormal basis of given vectors, by Householder reflections.
//!
//! `vectors^T = basis^T R` with `R` upper triangular; the signs are those of LAPACK's `geqrf`. A reflection `I - tau v v^T`
//! is kept as its `v`. Every vector is worked on by one thread alone, so no result depends on how many there are.

use rayon::prelude::*;

use crate::ops::simd::{sum, vectorized};

/// An orthonormal basis and the vectors' coordinates in it.
pub(super) struct Orthonormal {
    /// `[k, n]`, a basis vector in each row.
    pub(super) basis: Vec<f32>,
    /// `[k, k]` upper triangular, row-major; column `j` is vector `j`.
    pub(super) r: Vec<f32>,
}

/// Reflections that a vector is put through while it is in the cache.
const PANEL: usize = 8;

/// An orthonormal basis of the `k` rows of `vectors: [k, n]`, `k <= n`. Rows that depend on those before them get a
/// direction of their own all the same, and a zero on the diagonal of `R`.
pub(super) fn orthonormalize(mut vectors: Vec<f32>, n: usize) -> Orthonormal {
    assert!(n > 0 && vectors.len().is_multiple_of(n), "whole vectors");
    let k = vectors.len() / n;
    assert!(k <= n, "more vectors than dimensions");
    let mut r = vec![0f32; k * k];
    let mut taus = vec![0f32; k];
    for start in (0..k).step_by(PANEL) {
        let panel = start..k.min(start + PANEL);
        let (done, rest) = vectors.split_at_mut(panel.end * n);
        for j in panel.clone() {
            let (before, vector) = done.split_at_mut(j * n);
            let vector = &mut vector[..n];
            for i in panel.start..j {
                apply(&before[i * n + i..(i + 1) * n], taus[i], &mut vector[i..]);
            }
            for i in 0..j {
                r[i * k + j] = vector[i];
            }
            (r[j * k + j], taus[j]) = reflect(&mut vector[j..]);
        }
        rest.par_chunks_mut(n).for_each(|vector| {
            for i in panel.clone() {
                apply(&done[i * n + i..(i + 1) * n], taus[i], &mut vector[i..]);
            }
        });
    }
    let mut basis = vec![0f32; k * n];
    basis.par_chunks_mut(n).enumerate().for_each(|(j, row)| {
        row[j] = 1.0;
        // Later reflections leave the first entries, and so this vector, alone.
        for i in (0..=j).rev() {
            apply(&vectors[i * n + i..(i + 1) * n], taus[i], &mut row[i..]);
        }
    });
    Orthonormal { basis, r }
}

/// Replaces `x` by the `v` of the reflection that maps it to `beta e_0`; gives `beta` and `tau`.
fn reflect(x: &mut [f32]) -> (f32, f32) {
    let alpha = x[0];
    let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    if largest == 0.0 {
        return (0.0, 0.0);
    }
    // Divided by the largest: squares of what is very small or large would be lost.
    let squares: f64 = x.iter().map(|v| f64::from(v / largest).powi(2)).sum();
    let norm = squares.sqrt() * f64::from(largest);
    let beta = if alpha > 0.0 { -norm } else { norm };
    let first = f64::from(alpha) - beta;
    for v in &mut x[1..] {
        *v = (f64::from(*v) / first) as f32;
    }
    x[0] = 1.0;
    (beta as f32, (-first / beta) as f32)
}

/// `y -= tau v (v . y)`.
fn apply(v: &[f32], tau: f32, y: &mut [f32]) {
    if tau == 0.0 {
        return;
    }
    vectorized(
        #[inline(always)]
        || {
            let factor = tau * sum([v, y], |[v, y]| v * y);
            for (y, v) in y.iter_mut().zip(v) {
                *y -= factor * v;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::philox::Uniform;

    fn dot(x: &[f32], y: &[f32]) -> f64 {
        let products = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y));
        products.sum()
    }

    fn assert_orthonormal_and_equal(vectors: &[f32], n: usize, scale: f64) {
        let Orthonormal { basis, r } = orthonormalize(vectors.to_vec(), n);
        let k = vectors.len() / n;
        for i in 0..k {
            for j in 0..k {
                let expected = f64::from(u8::from(i == j));
                let found = dot(&basis[i * n..][..n], &basis[j * n..][..n]);
                assert!((found - expected).abs() < 2e-6, "{i} {j}: {found}");
                assert!(j >= i || r[i * k + j] == 0.0, "R is upper triangular");
            }
            for at in 0..n {
                let sum: f64 = (0..k)
                    .map(|j| f64::from(r[j * k + i]) * f64::from(basis[j * n + at]))
                    .sum();
                let expected = f64::from(vectors[i * n + at]);
                assert!((sum - expected).abs() < 4e-6 * scale, "{sum} {expected}");
            }
        }
    }

    #[test]
    fn the_basis_is_orthonormal_and_gives_the_vectors_back() {
        let mut uniform = Uniform::new(1, [0, 0]);
        for (k, n) in [(1, 1), (3, 3), (5, 42), (20, 131)] {
            let vectors: Vec<f32> = (0..k * n).map(|_| uniform.next_f32() - 0.5).collect();
            assert_orthonormal_and_equal(&vectors, n, 1.0);
        }
    }

    #[test]
    fn dependent_zero_huge_and_tiny_vectors_have_an_orthonormal_basis() {
        let n = 7;
        let mut vectors = vec![0f32; 4 * n];
        for at in 0..n {
            vectors[n + at] = at as f32 - 2.5;
            vectors[2 * n + at] = 2.0 * (at as f32 - 2.5);
        }
        assert_orthonormal_and_equal(&vectors, n, 10.0);
        for scale in [1e30f32, 1e-30] {
            let scaled: Vec<f32> = vectors[n..3 * n].iter().map(|v| v * scale).collect();
            assert_orthonormal_and_equal(&scaled, n, 10.0 * f64::from(scale));
        }
    }

    #[test]
    fn signs_are_those_of_lapack() {
        // torch.linalg.qr of [[3.], [4.]] has R = -5 and Q = [-0.6, -0.8].
        let Orthonormal { basis, r } = orthonormalize(vec![3.0, 4.0], 2);
        assert_eq!(r, [-5.0]);
        assert!((basis[0] + 0.6).abs() < 1e-7 && (basis[1] + 0.8).abs() < 1e-7);
    }
}
