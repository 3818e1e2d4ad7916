//! Text from a model, one token at a time, with the keys and values of past tokens cached.

use std::ops::ControlFlow;

use super::Sampler;
use super::ensemble::{Ensemble, mean_log_probabilities};
use crate::model::{Decoder, KvCache};
use crate::{Error, Result};

/// When a generation ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerateOptions {
    pub max_new_tokens: usize,
    /// Tokens that end the text; they are not part of it.
    pub stop_ids: Vec<u32>,
    /// Each token is chosen by the mean of the probabilities of these models; `None` for the adapter as it is.
    pub ensemble: Option<Ensemble>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model wrote a stop token.
    Stop,
    /// `max_new_tokens` were written.
    Length,
    /// The caller's `on_token` asked for it.
    Interrupted,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// Without the prompt and the stop token.
    pub ids: Vec<u32>,
    pub finish: Finish,
}

/// Continues `prompt`. `on_token` sees each new token that is part of the text and may end the generation.
///
/// # Errors
/// [`Error::Config`] if the prompt is empty; [`Error::Shape`] for an id beyond the vocabulary;
/// [`Error::NonFinite`] if the model gives NaN.
pub fn generate(
    decoder: &Decoder,
    prompt: &[u32],
    options: &GenerateOptions,
    sampler: &mut Sampler,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    if prompt.is_empty() {
        return Err(Error::config(
            "prompt",
            "is empty: there is nothing to continue",
        ));
    }
    let mut generated = Generated {
        ids: Vec::new(),
        finish: Finish::Length,
    };
    let capacity = prompt.len() + options.max_new_tokens;
    let mut caches = match &options.ensemble {
        None => vec![KvCache::new(decoder, capacity)?],
        Some(ensemble) => (0..ensemble.models())
            .map(|model| Ok(KvCache::new(decoder, capacity)?.masked(ensemble.masks(model))))
            .collect::<Result<_>>()?,
    };
    let mut unseen = prompt;
    let mut last = [0];
    while generated.ids.len() < options.max_new_tokens {
        let token = sampler.sample(&next_logits(decoder, unseen, &mut caches)?)?;
        if options.stop_ids.contains(&token) {
            generated.finish = Finish::Stop;
            break;
        }
        generated.ids.push(token);
        if on_token(token).is_break() {
            generated.finish = Finish::Interrupted;
            break;
        }
        last[0] = token;
        unseen = &last;
    }
    Ok(generated)
}

/// The logits after `ids`, `[V]`: of the one model, or such as give the mean of the probabilities of several.
fn next_logits(decoder: &Decoder, ids: &[u32], caches: &mut [KvCache<'_>]) -> Result<Vec<f32>> {
    let of_models = caches
        .iter_mut()
        .map(|cache| Ok(decoder.decode(ids, cache)?.to_vec1()?));
    let mut of_models = of_models.collect::<Result<Vec<_>>>()?;
    match of_models.len() {
        1 => Ok(of_models.remove(0)),
        _ => Ok(mean_log_probabilities(&of_models)),
    }
}
