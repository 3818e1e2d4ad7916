//! What to write for each tensor of the source, and in which shard.

use std::cmp::Reverse;

use super::{ModelDir, TensorSource, bitsandbytes};
use crate::quant::QuantizeOptions;
use crate::store::TensorSpec;
use crate::store::tensor_names::{LINEAR_LAYERS, is_linear_weight};
use crate::{Error, Result};

/// A tensor of the source and what is planned to be written for it.
pub(super) struct PlannedTensor {
    pub(super) source: TensorSpec,
    /// One spec for a copied tensor, several for a quantized one.
    pub(super) written: Vec<TensorSpec>,
}

impl PlannedTensor {
    pub(super) fn is_quantized(&self) -> bool {
        self.written.len() > 1
    }

    fn written_bytes(&self) -> u64 {
        self.written.iter().map(|spec| spec.nbytes() as u64).sum()
    }
}

/// The tensors of each shard, in the order to write them. A weight and its state stay together.
pub(super) fn plan(
    source: &dyn TensorSource,
    options: Option<QuantizeOptions>,
    dir: &ModelDir<'_>,
) -> Result<Vec<Vec<PlannedTensor>>> {
    let mut specs = source.specs()?;
    specs.sort_by(|a, b| natural_key(&a.name).cmp(&natural_key(&b.name)));
    let mut shards: Vec<Vec<PlannedTensor>> = Vec::new();
    let mut free_bytes = 0;
    let mut quantized = 0;
    for spec in specs {
        let tensor = plan_tensor(spec, options)?;
        quantized += usize::from(tensor.is_quantized());
        let bytes = tensor.written_bytes();
        match shards.last_mut() {
            Some(shard) if bytes <= free_bytes => {
                free_bytes -= bytes;
                shard.push(tensor);
            }
            _ => {
                free_bytes = dir.max_shard_bytes.saturating_sub(bytes);
                shards.push(vec![tensor]);
            }
        }
    }
    if options.is_some() && quantized == 0 {
        let reason = format!(
            "has no weight to quantize (names that end in {})",
            LINEAR_LAYERS.join(", ")
        );
        return Err(Error::malformed(dir.origin, reason));
    }
    for shard in &mut shards {
        // Stable: within a type the natural order stays.
        shard.sort_by_key(|tensor| {
            (
                tensor.is_quantized(),
                Reverse(tensor.source.dtype.bitsize()),
            )
        });
    }
    Ok(shards)
}

fn plan_tensor(source: TensorSpec, options: Option<QuantizeOptions>) -> Result<PlannedTensor> {
    let written = match options {
        Some(options) if is_linear_weight(&source.name) => {
            let dtype = source.float_type()?;
            if source.shape.len() != 2 {
                return Err(Error::TensorMismatch {
                    tensor: source.name,
                    expected: "a weight of two dimensions".into(),
                    found: format!("{:?}", source.shape),
                });
            }
            bitsandbytes::planned(&source.name, &source.shape, dtype, options)
        }
        _ => vec![source.clone()],
    };
    Ok(PlannedTensor { source, written })
}

/// Sorts `layers.2` before `layers.10`, so that a shard holds whole blocks.
fn natural_key(name: &str) -> Vec<(usize, &str)> {
    name.split('.')
        .map(|part| (part.parse().unwrap_or(usize::MAX), part))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_sorted_by_number() {
        let mut names = [
            "model.layers.10.a",
            "model.norm",
            "model.layers.9.b",
            "model.layers.9.a",
        ];
        names.sort_by_cached_key(|name| {
            natural_key(name)
                .into_iter()
                .map(|(n, s)| (n, s.to_string()))
                .collect::<Vec<_>>()
        });
        assert_eq!(
            names,
            [
                "model.layers.9.a",
                "model.layers.9.b",
                "model.layers.10.a",
                "model.norm"
            ]
        );
    }
}
