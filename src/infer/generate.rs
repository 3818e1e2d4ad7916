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
    on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    let capacity = prompt.len() + options.max_new_tokens;
    let mut session = Session::new(decoder, capacity, None)?;
    session.write(prompt, options, sampler, on_token)
}

/// Texts that go on from one another, as the turns of a conversation: what one has in common with the text before it is not
/// computed again.
#[derive(Debug)]
pub struct Session<'m> {
    decoder: &'m Decoder,
    /// Of the one model, or of each of an ensemble.
    caches: Vec<KvCache<'m>>,
    /// The tokens that the caches hold.
    held: Vec<u32>,
}

impl<'m> Session<'m> {
    /// For texts of up to `capacity` tokens, each chosen by the adapter as it is, or by the mean of the probabilities of an
    /// ensemble's models.
    ///
    /// # Errors
    /// [`Error::OutOfDeviceMemory`] where not even short texts fit.
    pub fn new(decoder: &'m Decoder, capacity: usize, ensemble: Option<&Ensemble>) -> Result<Self> {
        let caches = match ensemble {
            None => vec![KvCache::new(decoder, capacity)?],
            Some(ensemble) => (0..ensemble.models())
                .map(|model| Ok(KvCache::new(decoder, capacity)?.masked(ensemble.masks(model))))
                .collect::<Result<_>>()?,
        };
        Ok(Self {
            decoder,
            caches,
            held: Vec::new(),
        })
    }

    /// As [`generate`].
    ///
    /// # Errors
    /// Those of [`generate`]; [`Error::Shape`] for a text that is longer than there is room for, and
    /// [`Error::OutOfDeviceMemory`] where its cache does not fit.
    pub fn write(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        sampler: &mut Sampler,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let Some(before_last) = prompt.len().checked_sub(1) else {
            return Err(Error::config(
                "prompt",
                "is empty: there is nothing to continue",
            ));
        };
        let pairs = self.held.iter().zip(&prompt[..before_last]);
        let common = pairs.take_while(|(held, token)| held == token).count();
        self.caches
            .iter_mut()
            .for_each(|cache| cache.truncate(common));
        self.held.truncate(common);
        let mut generated = Generated {
            ids: Vec::new(),
            finish: Finish::Length,
        };
        let mut unseen = &prompt[common..];
        let mut last = [0];
        while generated.ids.len() < options.max_new_tokens {
            let token = sampler.sample(&next_logits(self.decoder, unseen, &mut self.caches)?)?;
            self.held.extend(unseen);
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
