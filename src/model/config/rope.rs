//! Rotary embedding parameters, in both generations of `config.json`.
//!
//! Source: `PreTrainedConfig.convert_rope_params_to_dict` and `modeling_rope_utils.py` of transformers 5.24.

use super::fields::Fields;
use super::{QueryScaling, RopeConfig, RopeScaling};
use crate::Result;

/// The thetas' names in the older generation.
const THETA: &str = "rope_theta";
const LOCAL_THETA: &str = "rope_local_base_freq";
const ORIGINAL_LENGTH: &str = "original_max_position_embeddings";
/// Named after the models that scaled attention by position before.
const QUERY_BETA: &str = "llama_4_scaling_beta";

/// Reads `rope_scaling` (old; it wins, as in transformers) or `rope_parameters`, and the top-level `rope_theta`.
pub(super) fn read(
    fields: &mut Fields,
    max_position_embeddings: usize,
    default_theta: f64,
) -> Result<RopeConfig> {
    let (parameters, theta) = parameters(fields, default_theta)?;
    one(parameters, max_position_embeddings, theta)
}

/// Reads the same of a model that has positions on several axes, of which those of text are one.
pub(super) fn read_with_axes(
    fields: &mut Fields,
    max_position_embeddings: usize,
    default_theta: f64,
) -> Result<RopeConfig> {
    let (mut parameters, theta) = parameters(fields, default_theta)?;
    if let Some(rope) = &mut parameters {
        rope.ignore(&["mrope_section", "mrope_interleaved"]);
    }
    one(parameters, max_position_embeddings, theta)
}

/// Reads the same of a model whose rotary embedding may turn a part of each head, which is given too. `lengths` are those of the
/// context, and in Phi, which has LongRoPE under several names, of the one before it was extended.
pub(super) fn read_with_part(
    fields: &mut Fields,
    (length, original_length): (usize, Option<usize>),
    (default_theta, default_part): (f64, f64),
) -> Result<(RopeConfig, f64)> {
    const PART: &str = "partial_rotary_factor";
    const LONG_ROPE: [&str; 3] = ["longrope", "su", "yarn"];
    let beside = fields.optional_positive(PART)?.unwrap_or(default_part);
    let (parameters, theta) = parameters(fields, default_theta)?;
    let Some(mut rope) = parameters else {
        return Ok((one(None, length, theta)?, beside));
    };
    let part = rope.optional_positive(PART)?.unwrap_or(beside);
    let (name, _) = scaling_name(&mut rope)?;
    let is_long_rope = name.is_some_and(|name| LONG_ROPE.contains(&&*name));
    let rope = match original_length.filter(|_| is_long_rope) {
        None => one(Some(rope), length, theta)?,
        Some(original) => scaled(rope, theta, |rope| long_rope(rope, [length, original]))?,
    };
    Ok((rope, part))
}

fn long_rope(rope: &mut Fields, [length, original]: [usize; 2]) -> Result<RopeScaling> {
    let mut factors = |field| -> Result<Vec<f64>> {
        let factors: Vec<f64> = rope.required(field)?;
        match factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
            None => Ok(factors),
            Some(factor) => {
                let reason = format!("has {factor}, which is not a positive number");
                Err(rope.malformed(field, reason))
            }
        }
    };
    let (short_factors, long_factors) = (factors("short_factor")?, factors("long_factor")?);
    let original = rope.optional_size(ORIGINAL_LENGTH)?.unwrap_or(original);
    let factor = rope.optional_positive("factor")?;
    let factor = factor.unwrap_or(length as f64 / original as f64);
    let implied = match factor <= 1.0 {
        true => 1.0,
        false => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    let attention_factor = rope.optional_positive("attention_factor")?;
    Ok(RopeScaling::LongRope {
        short_factors,
        long_factors,
        attention_factor: attention_factor.unwrap_or(implied),
        original_max_position_embeddings: original,
    })
}

/// Reads the same of a model whose queries are scaled by their positions.
pub(super) fn read_with_query_scaling(
    fields: &mut Fields,
    max_position_embeddings: usize,
    default_theta: f64,
) -> Result<RopeConfig> {
    let (parameters, theta) = parameters(fields, default_theta)?;
    let Some(mut rope) = parameters else {
        return Err(fields.malformed("rope_parameters", "is missing"));
    };
    let beta: f64 = rope.required(QUERY_BETA)?;
    if !(beta.is_finite() && beta >= 0.0) {
        return Err(rope.malformed(QUERY_BETA, format!("{beta} is not a number from 0 on")));
    }
    let length = rope.size(ORIGINAL_LENGTH)?;
    // That of the model once more.
    rope.ignore(&["max_position_embeddings"]);
    let read = one(Some(rope), max_position_embeddings, theta)?;
    Ok(RopeConfig {
        query_scaling: Some(QueryScaling { beta, length }),
        ..read
    })
}

/// The rotary parameters, and the theta that stands beside them.
fn parameters<'a>(
    fields: &mut Fields<'a>,
    default_theta: f64,
) -> Result<(Option<Fields<'a>>, f64)> {
    let theta = fields.optional_positive(THETA)?.unwrap_or(default_theta);
    let old = fields.object("rope_scaling")?;
    let new = fields.object("rope_parameters")?;
    Ok((old.or(new), theta))
}

/// The embedding of layers with full attention and that of layers with a window, where these are two.
pub(super) fn read_both(
    fields: &mut Fields,
    max_position_embeddings: usize,
    [default_theta, default_local_theta]: [f64; 2],
) -> Result<(RopeConfig, RopeConfig)> {
    let theta = fields.optional_positive(THETA)?.unwrap_or(default_theta);
    let local_theta = fields.optional_positive(LOCAL_THETA)?;
    let old = fields.object("rope_scaling")?;
    let (mut full, mut local) = (None, None);
    if let Some(mut by_layer_type) = fields.object("rope_parameters")? {
        full = by_layer_type.object("full_attention")?;
        local = by_layer_type.object("sliding_attention")?;
        by_layer_type.finish()?;
    }
    let local_theta = local_theta.unwrap_or(default_local_theta);
    Ok((
        one(old.or(full), max_position_embeddings, theta)?,
        one(local, max_position_embeddings, local_theta)?,
    ))
}

fn one(
    parameters: Option<Fields>,
    max_position_embeddings: usize,
    theta: f64,
) -> Result<RopeConfig> {
    match parameters {
        Some(rope) => scaled(rope, theta, |rope| scaling(rope, max_position_embeddings)),
        None => Ok(RopeConfig {
            theta,
            scaling: RopeScaling::None,
            query_scaling: None,
        }),
    }
}

/// The embedding of these parameters, whose scaling is read by `scaling`.
fn scaled(
    mut rope: Fields,
    theta: f64,
    scaling: impl FnOnce(&mut Fields) -> Result<RopeScaling>,
) -> Result<RopeConfig> {
    let theta = rope.optional_positive(THETA)?.unwrap_or(theta);
    let scaling = scaling(&mut rope)?;
    rope.finish()?;
    Ok(RopeConfig {
        theta,
        scaling,
        query_scaling: None,
    })
}

/// What a scaling is called, and by which field.
fn scaling_name(rope: &mut Fields) -> Result<(Option<String>, &'static str)> {
    let old = rope.optional("type")?;
    Ok(match rope.optional("rope_type")? {
        None => (old, "type"),
        new => (new, "rope_type"),
    })
}

fn scaling(rope: &mut Fields, max_position_embeddings: usize) -> Result<RopeScaling> {
    let (name, field) = scaling_name(rope)?;
    let required = |rope: &mut Fields, field| {
        rope.optional_positive(field)?
            .ok_or_else(|| rope.malformed(field, "is missing"))
    };
    match name.as_deref() {
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
                    .optional_size(ORIGINAL_LENGTH)?
                    .unwrap_or(max_position_embeddings),
            })
        }
        Some("yarn") => yarn(rope, max_position_embeddings),
        Some(_) => Err(rope.unsupported(field, "use default, linear, llama3 or yarn")),
    }
}

/// What YaRN multiplies cosines and sines by for this factor where nothing else is said; the paper's `mscale` is 1.
pub(crate) fn yarn_amplitude(factor: f64, mscale: f64) -> f64 {
    match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * mscale * factor.ln() + 1.0,
    }
}

fn yarn(rope: &mut Fields, max_position_embeddings: usize) -> Result<RopeScaling> {
    let original = rope.optional_size(ORIGINAL_LENGTH)?;
    let original = original.unwrap_or(max_position_embeddings);
    let factor = rope.optional_positive("factor")?;
    let factor = factor.unwrap_or(max_position_embeddings as f64 / original as f64);
    // DeepSeek's two numbers make a ratio of the paper's; 0 is none.
    let mut of_deepseek = |field| -> Result<Option<f64>> {
        match rope.optional::<f64>(field)? {
            Some(number) if !(number.is_finite() && number >= 0.0) => {
                let reason = format!("{number} is not a number from 0 on");
                Err(rope.malformed(field, reason))
            }
            number => Ok(number.filter(|number| *number > 0.0)),
        }
    };
    let mscale = of_deepseek("mscale")?;
    let mscale_all_dim = of_deepseek("mscale_all_dim")?;
    let implied = match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all)) => yarn_amplitude(factor, mscale) / yarn_amplitude(factor, all),
        _ => yarn_amplitude(factor, 1.0),
    };
    let attention_factor = rope.optional_positive("attention_factor")?;
    let beta_fast = rope.optional_positive("beta_fast")?.unwrap_or(32.0);
    let beta_slow = rope.optional_positive("beta_slow")?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        let reason = format!("{beta_fast} is below `beta_slow` = {beta_slow}");
        return Err(rope.malformed("beta_fast", reason));
    }
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor: attention_factor.unwrap_or(implied),
        beta_fast,
        beta_slow,
        original_max_position_embeddings: original,
        truncate: rope.optional("truncate")?.unwrap_or(true),
    })
}
