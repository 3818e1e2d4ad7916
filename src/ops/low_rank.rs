//! Factors of low rank: the largest singular values of a matrix with their vectors, and its first columns made orthonormal.
//!
//! The singular value decomposition is randomized: `k` random combinations of the columns of `W`, multiplied by `W W^T`
//! again and again, turn into the space of the leading left vectors, and what is left is a matrix of `k x k`. `k` is the
//! rank and a few more. Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.

mod householder;
mod jacobi;
mod products;

use candle_core::Device;

use self::householder::{Orthonormal, orthonormalize};
use self::jacobi::SmallSvd;
use self::products::Matrix;
use super::gemm::{Into, Mat, matmul_by_rows};
use super::philox::Normal;
use crate::device::ComputeDtype;
use crate::{Error, Result};

/// Vectors beyond the rank: they take up what the power iterations have not told apart yet.
const OVERSAMPLING: usize = 16;

/// A matrix of no more rows or columns than this is decomposed exactly.
const EXACT_UP_TO: usize = 128;

/// More would not help: the rounding of f32 keeps the subspace moving.
const MAX_POWER_ITERATIONS: usize = 200;

/// How often the subspace is multiplied by `W W^T`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PowerIterations {
    Fixed(usize),
    /// Until another one raises the part of `|W|^2` that the approximation takes by no more than this share of it.
    UntilConverged {
        tolerance: f64,
    },
}

/// What to compute, and where.
#[derive(Debug, Clone)]
pub struct SvdOptions {
    pub rank: usize,
    pub power_iterations: PowerIterations,
    /// Of the first, random subspace.
    pub seed: u64,
    /// Where the products are made. The rest, a few percent of the work on a CPU, is done by the CPU.
    pub device: Device,
}

/// The largest singular values of a matrix `W [m, n]`: `W ~ left^T diag(values) right`.
#[derive(Debug, Clone)]
pub struct TruncatedSvd {
    /// `[rank, m]`, a left vector in each row.
    pub left: Vec<f32>,
    /// `[rank]`, the largest first.
    pub values: Vec<f32>,
    /// `[rank, n]`, a right vector in each row.
    pub right: Vec<f32>,
    /// How many power iterations it took; 0 where the decomposition is exact.
    pub power_iterations: usize,
}

/// The `rank` largest singular values of `w` and their vectors. The same bits for any number of threads.
///
/// # Shapes
/// `w: [m, n]`, row-major.
///
/// # Errors
/// [`Error::Shape`] if the rank is 0 or larger than a side of the matrix; what the device reports.
///
/// Source: arXiv:0909.4061.
pub fn truncated_svd(
    w: &[f32],
    dims: (usize, usize),
    options: &SvdOptions,
) -> Result<TruncatedSvd> {
    let rank = options.rank;
    check_rank(w, dims, rank)?;
    let (m, n) = dims;
    let smaller = m.min(n);
    let k = match smaller <= EXACT_UP_TO {
        true => smaller,
        false => smaller.min(rank + OVERSAMPLING),
    };
    let matrix = Matrix::new(w, dims, &options.device)?;
    let mut normal = Normal::new(options.seed, [m as u32, n as u32]);
    let random: Vec<f32> = (0..k * n).map(|_| normal.next_f32()).collect();
    let mut left = orthonormalize(matrix.times(&random)?, m).basis;
    drop(random);
    let mut captured = 0.0;
    let mut done = 0;
    loop {
        let right = orthonormalize(matrix.transposed_times(&left)?, n);
        let goes_on = k < smaller && done < MAX_POWER_ITERATIONS;
        let goes_on = goes_on
            && match options.power_iterations {
                PowerIterations::Fixed(count) => done < count,
                PowerIterations::UntilConverged { tolerance } => {
                    let svd = jacobi::svd(&right.r, k);
                    let now: f64 = svd.s[..rank].iter().map(|s| s * s).sum();
                    let before = std::mem::replace(&mut captured, now);
                    now - before > tolerance * now
                }
            };
        if !goes_on {
            return Ok(from_subspace(&left, &right, rank, dims, done));
        }
        left = orthonormalize(matrix.times(&right.basis)?, m).basis;
        done += 1;
    }
}

/// The decomposition of `left^T left W`, given `right.basis^T right.r = W^T left^T`.
fn from_subspace(
    left: &[f32],
    right: &Orthonormal,
    rank: usize,
    (m, n): (usize, usize),
    power_iterations: usize,
) -> TruncatedSvd {
    let k = left.len() / m;
    // R = X S Y^T, and W ~ left^T R^T basis: the left vectors are turned by Y, the right ones by X.
    let SmallSvd { x, s, y } = jacobi::svd(&right.r, k);
    let combine = |by: &[f64], vectors: &[f32], len: usize| {
        let by: Vec<f32> = by[..rank * k].iter().map(|&v| v as f32).collect();
        let mut turned = vec![0f32; rank * len];
        let (by, vectors) = (Mat::new(&by, rank, k), Mat::new(vectors, k, len));
        matmul_by_rows(
            &mut turned,
            Into::Overwrite,
            (by, ComputeDtype::F32),
            vectors,
            1.0,
        );
        turned
    };
    TruncatedSvd {
        left: combine(&y, left, m),
        values: s[..rank].iter().map(|&s| s as f32).collect(),
        right: combine(&x, &right.basis, n),
        power_iterations,
    }
}

/// The first `rank` columns of `w`, made orthonormal, and all of `w` in their coordinates: what `Q[:, :rank]` and
/// `R[:rank]` are in `W = Q R`.
#[derive(Debug, Clone)]
pub struct LeadingQr {
    /// `[rank, m]`, an orthonormal vector in each row.
    pub q: Vec<f32>,
    /// `[rank, n]`.
    pub r: Vec<f32>,
}

/// The first part of the QR decomposition of `w: [m, n]`, with the signs of LAPACK.
///
/// # Errors
/// Those of [`truncated_svd`].
pub fn leading_qr(
    w: &[f32],
    dims: (usize, usize),
    rank: usize,
    device: &Device,
) -> Result<LeadingQr> {
    check_rank(w, dims, rank)?;
    let (m, n) = dims;
    let columns = (0..rank).flat_map(|j| (0..m).map(move |i| w[i * n + j]));
    let Orthonormal { basis: q, r: first } = orthonormalize(columns.collect(), m);
    let mut r = Matrix::new(w, dims, device)?.transposed_times(&q)?;
    for (row, first) in r.chunks_mut(n).zip(first.chunks(rank)) {
        row[..rank].copy_from_slice(first);
    }
    Ok(LeadingQr { q, r })
}

/// `w -= factor b a`, in parallel.
///
/// # Shapes
/// `w: [m, n]`, `b: [m, rank]`, `a: [rank, n]`, all row-major.
pub fn subtract_product(w: &mut [f32], b: &[f32], a: &[f32], rank: usize, factor: f32) {
    let (m, n) = (b.len() / rank, a.len() / rank);
    let (b, a) = (Mat::new(b, m, rank), Mat::new(a, rank, n));
    matmul_by_rows(w, Into::Add, (b, ComputeDtype::F32), a, -factor);
}

fn check_rank(w: &[f32], (m, n): (usize, usize), rank: usize) -> Result<()> {
    match w.len() == m * n && (1..=m.min(n)).contains(&rank) {
        true => Ok(()),
        false => Err(Error::Shape {
            op: "low_rank",
            expected: format!("a rank from 1 to {} of [{m}, {n}]", m.min(n)),
            found: format!("rank {rank} of {} values", w.len()),
        }),
    }
}
