//! How far a quantized weight with its adapter is from the weight it was made of: `|W - (Q + s B A)|_F / |W|_F`.

use rayon::prelude::*;

use crate::ops::low_rank::subtract_product;
use crate::quant::FrozenWeight;
use crate::{Error, Result};

/// Rows of a weight that one task compares.
const ROWS: usize = 64;

/// An adapter's factors on one layer.
#[derive(Debug, Clone, Copy)]
pub struct LoraFactors<'a> {
    /// `[r, in]`.
    pub a: &'a [f32],
    /// `[out, r]`.
    pub b: &'a [f32],
    pub r: usize,
    pub scaling: f64,
}

/// Sums of squares; those of several layers can be added.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ApproximationError {
    /// Of `W - Q`.
    pub base: f64,
    /// Of `W - (Q + s B A)`.
    pub with_adapter: f64,
    /// Of `W`.
    pub original: f64,
}

impl ApproximationError {
    /// Compares a weight with what stands for it.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] with the weight's `name` if the shapes do not fit.
    pub fn measure(
        name: &str,
        original: &FrozenWeight,
        base: &FrozenWeight,
        lora: Option<LoraFactors>,
    ) -> Result<Self> {
        let (rows, cols) = (original.out_features(), original.in_features());
        let fits =
            |lora: &LoraFactors| lora.a.len() == lora.r * cols && lora.b.len() == rows * lora.r;
        if base.shape() != original.shape() || !lora.iter().all(fits) {
            return Err(Error::TensorMismatch {
                tensor: name.to_string(),
                expected: format!("{:?}, as in the original model", original.shape()),
                found: format!("{:?} or an adapter that does not fit", base.shape()),
            });
        }
        let tiles = (0..rows.div_ceil(ROWS)).into_par_iter().map(|tile| {
            let rows = tile * ROWS..rows.min((tile + 1) * ROWS);
            let mut w = vec![0f32; rows.len() * cols];
            let mut q = vec![0f32; w.len()];
            original.read_tile(rows.clone(), 0..cols, &mut w);
            base.read_tile(rows.clone(), 0..cols, &mut q);
            let original = squares(&w);
            w.iter_mut().zip(&q).for_each(|(w, q)| *w -= q);
            let base = squares(&w);
            if let Some(lora) = lora {
                let b = &lora.b[rows.start * lora.r..rows.end * lora.r];
                subtract_product(&mut w, b, lora.a, lora.r, lora.scaling as f32);
            }
            Self {
                base,
                with_adapter: squares(&w),
                original,
            }
        });
        // In their order: the sum does not depend on the threads.
        let tiles: Vec<Self> = tiles.collect();
        Ok(tiles.into_iter().fold(Self::default(), Self::plus))
    }

    pub fn plus(self, other: Self) -> Self {
        Self {
            base: self.base + other.base,
            with_adapter: self.with_adapter + other.with_adapter,
            original: self.original + other.original,
        }
    }

    /// `|W - Q| / |W|`.
    pub fn relative_of_base(&self) -> f64 {
        relative(self.base, self.original)
    }

    /// `|W - (Q + s B A)| / |W|`.
    pub fn relative(&self) -> f64 {
        relative(self.with_adapter, self.original)
    }
}

/// Of a weight of zeros, which is always met exactly, the error is 0.
fn relative(error: f64, original: f64) -> f64 {
    match error == 0.0 {
        true => 0.0,
        false => (error / original).sqrt(),
    }
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum()
}
