//! A layer's weight with its adapter in it.

use rayon::prelude::*;

use super::lora_linear::LoraLinear;
use crate::Result;
use crate::ops::low_rank::subtract_product;
use crate::quant::DenseTensor;

impl LoraLinear {
    /// `W + scaling B A` in f32, with the rows scaled to their magnitudes where the adapter is DoRA's; W itself without an
    /// adapter. It is what `merge_and_unload` of PEFT leaves in a layer.
    ///
    /// # Shapes
    /// `[out, in]`.
    pub fn merged_weight(&self) -> Result<DenseTensor> {
        let (d_out, d_in) = (self.weight.out_features(), self.weight.in_features());
        let mut merged = vec![0f32; d_out * d_in];
        let rows = merged.par_chunks_mut(d_in.max(1)).enumerate();
        rows.for_each(|(row, merged)| self.weight.read_range(row * d_in, merged));
        if let Some(lora) = &self.lora {
            let (a, b) = (lora.a.master()?, lora.b.master()?);
            let r = b.len() / d_out.max(1);
            subtract_product(&mut merged, &b, &a, r, -lora.scaling as f32);
            if let Some(magnitude) = &lora.magnitude {
                let magnitudes = magnitude.trainable.master()?;
                let rows = merged.par_chunks_mut(d_in.max(1)).zip(&magnitudes);
                rows.for_each(|(merged, &magnitude)| {
                    let squares = merged.iter().map(|&w| f64::from(w) * f64::from(w));
                    let scale = (f64::from(magnitude) / squares.sum::<f64>().sqrt()) as f32;
                    merged.iter_mut().for_each(|w| *w *= scale);
                });
            }
        }
        Ok(DenseTensor::from_f32_vec(vec![d_out, d_in], merged))
    }
}
