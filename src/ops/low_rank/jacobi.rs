//! All singular values and vectors of a small square matrix, by one-sided Jacobi rotations in f64.
//!
//! Columns are rotated in pairs until all are orthogonal: `M Y = X S`. Source: Golub and Van Loan, Matrix Computations,
//! section 8.6.3 (Hestenes' method).

/// `M = X diag(s) Y^T`, the largest `s` first.
pub(super) struct SmallSvd {
    /// `[k, k]`, a left vector in each row; zero where `s` is.
    pub(super) x: Vec<f64>,
    pub(super) s: Vec<f64>,
    /// `[k, k]`, a right vector in each row.
    pub(super) y: Vec<f64>,
}

/// Sweeps over all pairs; ten are enough for matrices of several hundred columns.
const MAX_SWEEPS: usize = 60;

/// The cosine between two columns below which they count as orthogonal.
const ORTHOGONAL: f64 = 1e-14;

/// The singular value decomposition of `matrix: [k, k]`, row-major.
pub(super) fn svd(matrix: &[f32], k: usize) -> SmallSvd {
    assert_eq!(matrix.len(), k * k, "a square matrix");
    // Column by column: a rotation reads and writes two runs.
    let mut columns: Vec<f64> = (0..k * k)
        .map(|at| f64::from(matrix[at % k * k + at / k]))
        .collect();
    let mut rotations = vec![0f64; k * k];
    (0..k).for_each(|i| rotations[i * k + i] = 1.0);
    for _ in 0..MAX_SWEEPS {
        if !sweep(&mut columns, &mut rotations, k) {
            break;
        }
    }
    let norms: Vec<f64> = columns.chunks(k).map(norm).collect();
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|&i, &j| norms[j].total_cmp(&norms[i]));
    let rows_of = |from: &[f64], scaled: bool| {
        let rows = order.iter().flat_map(|&i| {
            let factor = match scaled && norms[i] > 0.0 {
                true => 1.0 / norms[i],
                false => 1.0,
            };
            from[i * k..(i + 1) * k].iter().map(move |v| v * factor)
        });
        rows.collect::<Vec<f64>>()
    };
    SmallSvd {
        x: rows_of(&columns, true),
        y: rows_of(&rotations, false),
        s: order.iter().map(|&i| norms[i]).collect(),
    }
}

/// Makes each pair of columns orthogonal once; whether any was not.
fn sweep(columns: &mut [f64], rotations: &mut [f64], k: usize) -> bool {
    let mut rotated = false;
    for p in 0..k {
        for q in p + 1..k {
            let (a, b) = pair(columns, k, p, q);
            let (aa, bb, ab) = (dot(a, a), dot(b, b), dot(a, b));
            if ab.abs() <= ORTHOGONAL * (aa * bb).sqrt() {
                continue;
            }
            rotated = true;
            let zeta = (bb - aa) / (2.0 * ab);
            let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
            let cosine = 1.0 / tangent.hypot(1.0);
            let sine = cosine * tangent;
            rotate(a, b, cosine, sine);
            let (a, b) = pair(rotations, k, p, q);
            rotate(a, b, cosine, sine);
        }
    }
    rotated
}

fn pair(columns: &mut [f64], k: usize, p: usize, q: usize) -> (&mut [f64], &mut [f64]) {
    let (before, from_q) = columns.split_at_mut(q * k);
    (&mut before[p * k..(p + 1) * k], &mut from_q[..k])
}

fn rotate(a: &mut [f64], b: &mut [f64], cosine: f64, sine: f64) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

/// Eight partial sums: one would have to wait for each addition.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0f64; 8];
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f64>() + rest
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::philox::Uniform;

    fn assert_is_svd(matrix: &[f32], k: usize) {
        let SmallSvd { x, s, y } = svd(matrix, k);
        assert!(s.is_sorted_by(|a, b| a >= b), "{s:?}");
        let scale = s[0].max(1e-300);
        for i in 0..k {
            for j in 0..k {
                let of = |vectors: &[f64]| dot(&vectors[i * k..][..k], &vectors[j * k..][..k]);
                let expected = f64::from(u8::from(i == j));
                assert!((of(&y) - expected).abs() < 1e-12);
                if s[i] > 1e-9 * scale && s[j] > 1e-9 * scale {
                    assert!((of(&x) - expected).abs() < 1e-6, "{}", of(&x));
                }
                let sum: f64 = (0..k).map(|t| x[t * k + i] * s[t] * y[t * k + j]).sum();
                let expected = f64::from(matrix[i * k + j]);
                assert!((sum - expected).abs() < 1e-12 * scale, "{sum} {expected}");
            }
        }
    }

    #[test]
    fn the_factors_are_orthogonal_sorted_and_give_the_matrix_back() {
        let mut uniform = Uniform::new(2, [0, 0]);
        for k in [1, 2, 7, 42] {
            let matrix: Vec<f32> = (0..k * k).map(|_| uniform.next_f32() - 0.5).collect();
            assert_is_svd(&matrix, k);
        }
    }

    #[test]
    fn matrices_without_full_rank_are_decomposed() {
        assert_is_svd(&[0.0; 9], 3);
        assert_is_svd(&[1.0; 25], 5);
        assert_is_svd(&[0.0, 0.0, 3.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0], 3);
    }
}
