//! Rotary embedding parameters, in both generations of `config.json`.
//!
//! Source: `PreTrainedConfig.convert_rope_params_to_dict` and `modeling_rope_utils.py` of transformers 5.23.

use super::fields::Fields;
use super::{RopeConfig, RopeScaling};
use crate::Result;

const DEFAULT_THETA: f64 = 10_000.0;

/// Reads `rope_scaling` (old; it wins, as in transformers) or `rope_parameters`, and the top-level `rope_theta`.
pub(super) fn read(fields: &mut Fields, max_position_embeddings: usize) -> Result<RopeConfig> {
    let theta = fields.optional_positive("rope_theta")?;
    let old = fields.object("rope_scaling")?;
    let new = fields.object("rope_parameters")?;
    let Some(mut rope) = old.or(new) else {
        return Ok(RopeConfig {
            theta: theta.unwrap_or(DEFAULT_THETA),
            scaling: RopeScaling::None,
        });
    };
    let theta = rope
        .optional_positive("rope_theta")?
        .or(theta)
        .unwrap_or(DEFAULT_THETA);
    let scaling = scaling(&mut rope, max_position_embeddings)?;
    rope.finish()?;
    Ok(RopeConfig { theta, scaling })
}

fn scaling(rope: &mut Fields, max_position_embeddings: usize) -> Result<RopeScaling> {
    let old_name = rope.optional::<String>("type")?;
    let name = rope.optional::<String>("rope_type")?;
    let field = if name.is_some() { "rope_type" } else { "type" };
    let required = |rope: &mut Fields, field| {
        rope.optional_positive(field)?
            .ok_or_else(|| rope.malformed(field, "is missing"))
    };
    match name.or(old_name).as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear {
            factor: required(rope, "factor")?,
        }),
        Some("llama3") => {
            let low_freq_factor = required(rope, "low_freq_factor")?;
            let high_freq_factor = required(rope, "high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(rope.malformed(
                    "high_freq_factor",
                    format!(
                        "{high_freq_factor} is not above `low_freq_factor` = {low_freq_factor}"
                    ),
                ));
            }
            Ok(RopeScaling::Llama3 {
                factor: required(rope, "factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: rope
                    .optional_size("original_max_position_embeddings")?
                    .unwrap_or(max_position_embeddings),
            })
        }
        Some(_) => Err(rope.unsupported(field, "use default, linear or llama3")),
    }
}
