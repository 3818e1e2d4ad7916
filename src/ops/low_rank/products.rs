//! Products of a matrix with a few vectors, on the CPU's threads or by the GEMM of a GPU.

use candle_core::{Device, Tensor};

use crate::Result;
use crate::ops::gemm::{Into, Mat, Shared, for_each_column_tile, matmul};

/// A matrix `[m, n]` that is multiplied many times.
pub(super) enum Matrix<'a> {
    Host {
        values: &'a [f32],
        m: usize,
        n: usize,
    },
    Device(Tensor),
}

/// Rows or columns of the matrix that one task multiplies: their share of a product is a good part of a cache.
const TILE: usize = 256;

impl<'a> Matrix<'a> {
    /// The row-major `values`, copied to the device if that is not the CPU.
    pub(super) fn new(values: &'a [f32], (m, n): (usize, usize), device: &Device) -> Result<Self> {
        Ok(match device.is_cpu() {
            true => Self::Host { values, m, n },
            false => Self::Device(Tensor::from_slice(values, (m, n), device)?),
        })
    }

    /// `vectors W^T`: each row of `vectors: [k, n]` multiplied by `W`. `[k, m]`.
    pub(super) fn times(&self, vectors: &[f32]) -> Result<Vec<f32>> {
        match self {
            &Self::Host { values, m, n } => Ok(by_tiles(vectors, n, m, |rows| {
                Mat::new(values, m, n).rows(rows).t()
            })),
            Self::Device(w) => {
                let vectors = on_device(w, vectors, w.dims()[1])?;
                to_host(&vectors.matmul(&w.t()?)?)
            }
        }
    }

    /// `vectors W`: each row of `vectors: [k, m]` multiplied by `W^T`. `[k, n]`.
    pub(super) fn transposed_times(&self, vectors: &[f32]) -> Result<Vec<f32>> {
        match self {
            &Self::Host { values, m, n } => Ok(by_tiles(vectors, m, n, |cols| {
                Mat::new(values, m, n).cols(cols)
            })),
            Self::Device(w) => {
                let vectors = on_device(w, vectors, w.dims()[0])?;
                to_host(&vectors.matmul(w)?)
            }
        }
    }
}

/// `vectors [k, inner] tile [inner, ..]` for each tile of the `outer` columns of the result.
fn by_tiles<'a>(
    vectors: &[f32],
    inner: usize,
    outer: usize,
    tile: impl Fn(std::ops::Range<usize>) -> Mat<'a> + Sync,
) -> Vec<f32> {
    let k = vectors.len() / inner;
    let mut product = vec![0f32; k * outer];
    let lhs = Mat::new(vectors, k, inner);
    let shared = Shared::new(&mut product);
    for_each_column_tile(shared, (k, outer), TILE, |mut dst, range| {
        matmul(&mut dst, Into::Overwrite, lhs, tile(range), 1.0);
    });
    product
}

fn on_device(w: &Tensor, vectors: &[f32], inner: usize) -> Result<Tensor> {
    let shape = (vectors.len() / inner, inner);
    Ok(Tensor::from_slice(vectors, shape, w.device())?)
}

fn to_host(product: &Tensor) -> Result<Vec<f32>> {
    Ok(product.flatten_all()?.to_vec1()?)
}
