//! Text from a model, one token at a time, with the keys and values of past tokens cached.

use std::ops::ControlFlow;

use super::Sampler;
use crate::model::{Decoder, KvCache};
use crate::{Error, Result};

/// When a generation ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerateOptions {
    pub max_new_tokens: usize,
    /// Tokens that end the text; they are not part of it.
    pub stop_ids: Vec<u32>,
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
    let mut cache = KvCache::new(decoder, prompt.len() + options.max_new_tokens)?;
    let mut unseen = prompt;
    let mut last = [0];
    while generated.ids.len() < options.max_new_tokens {
        let logits = decoder.decode(unseen, &mut cache)?; // [V]
        let token = sampler.sample(&logits.to_vec1::<f32>()?)?;
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
