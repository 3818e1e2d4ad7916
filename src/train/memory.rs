//! What activations cost, and whether there is room to keep them.

use crate::device::Placement;
use crate::model::{ActivationPolicy, DecoderConfig};

/// Bytes that [`ActivationPolicy::Keep`] holds for one token of one block.
fn kept_bytes_per_token(config: &DecoderConfig, bytes_per_value: usize) -> usize {
    let queries = config.num_heads * config.head_dim;
    let keys = config.num_kv_heads * config.head_dim;
    // x and mid; q and attention's output; k and v; gate and up; queries and keys once more before their norm.
    let values = 2 * config.hidden_size + 2 * queries + 2 * keys + 2 * config.intermediate_size;
    let raw = if config.qk_norm { queries + keys } else { 0 };
    bytes_per_value * (values + raw)
}

/// A policy for each block. `recompute` is the user's choice; without one, activations of a micro-batch of
/// `tokens` are kept where they take at most half of the memory that is free.
pub fn activation_policies(
    config: &DecoderConfig,
    placement: &Placement,
    tokens: usize,
    recompute: Option<bool>,
) -> Vec<ActivationPolicy> {
    let recompute = recompute.unwrap_or_else(|| {
        let per_token = kept_bytes_per_token(config, placement.dtype.size_in_bytes());
        let kept = (config.num_layers * per_token).saturating_mul(tokens) as u64;
        placement
            .free_memory_bytes()
            .is_none_or(|free| kept > free / 2)
    });
    let policy = if recompute {
        ActivationPolicy::Recompute
    } else {
        ActivationPolicy::Keep
    };
    vec![policy; config.num_layers]
}
