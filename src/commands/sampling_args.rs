//! How text is written: `--max_new_tokens`, `--temperature`, `--top_k`, `--top_p`, `--seed`.

use qlora::infer::{Sampler, SamplingOptions};

#[derive(Debug, clap::Args)]
pub struct SamplingArgs {
    /// Stop after this many tokens
    #[arg(
        long = "max_new_tokens",
        alias = "max-new-tokens",
        value_name = "N",
        default_value_t = 256
    )]
    pub max_new_tokens: usize,

    /// 0 takes the likeliest token, 1 draws from the model's own distribution
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    temperature: f32,

    /// Draw from the K likeliest tokens only
    #[arg(long = "top_k", alias = "top-k", value_name = "K")]
    top_k: Option<usize>,

    /// Draw from the fewest likeliest tokens that have probability P together
    #[arg(
        long = "top_p",
        alias = "top-p",
        value_name = "P",
        default_value_t = 1.0
    )]
    top_p: f32,

    /// Of the draws
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    /// # Errors
    /// Those of [`Sampler::new`].
    pub fn sampler(&self) -> qlora::Result<Sampler> {
        Sampler::new(SamplingOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
        })
    }
}
