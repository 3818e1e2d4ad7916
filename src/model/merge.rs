//! A layer's weight with its adapter in it.

use rayon::prelude::*;

use super::lora_linear::LoraLinear;
use crate::Result;
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
        let Some(lora) = &self.lora else {
            rows.for_each(|(row, merged)| self.weight.read_range(row * d_in, merged));
            return Ok(DenseTensor::from_f32_vec(vec![d_out, d_in], merged));
        };
        let (a, b) = (lora.a.master()?, lora.b.master()?);
        let r = b.len() / d_out.max(1);
        let magnitudes = lora.magnitude.as_ref();
        let magnitudes = magnitudes.map(|m| m.trainable.master()).transpose()?;
        let scaling = lora.scaling as f32;
        rows.for_each(|(row, merged)| {
            self.weight.read_range(row * d_in, merged);
            let mut delta = vec![0f32; d_in];
            for (b, a) in b[row * r..(row + 1) * r].iter().zip(a.chunks_exact(d_in)) {
                delta
                    .iter_mut()
                    .zip(a)
                    .for_each(|(delta, a)| *delta += b * a);
            }
            merged
                .iter_mut()
                .zip(&delta)
                .for_each(|(w, delta)| *w += scaling * delta);
            if let Some(magnitudes) = &magnitudes {
                let squares = merged.iter().map(|&w| f64::from(w) * f64::from(w));
                let scale = (f64::from(magnitudes[row]) / squares.sum::<f64>().sqrt()) as f32;
                merged.iter_mut().for_each(|w| *w *= scale);
            }
        });
        Ok(DenseTensor::from_f32_vec(vec![d_out, d_in], merged))
    }
}
