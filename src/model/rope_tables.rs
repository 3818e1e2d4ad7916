//! Cosines and sines of the rotary embeddings that a model's layers have.

use super::config::{DecoderConfig, LayerRope, RopeConfig};
use crate::Result;
use crate::device::Placement;
use crate::ops::rope::{Pairs, RopeTable};

/// A table for each rotary embedding of a model, for the same positions.
#[derive(Debug, Clone, Default)]
pub struct RopeTables {
    model: Option<RopeTable>,
    local: Option<RopeTable>,
}

impl RopeTables {
    /// The tables for positions `0..positions`, where the model of this config computes, for batches that
    /// [are long](RopeConfig::is_long) or not.
    pub(super) fn new(
        config: &DecoderConfig,
        positions: usize,
        is_long: bool,
        placement: &Placement,
    ) -> Result<Self> {
        let table = |rope: &RopeConfig| {
            let inv_freq = rope.inv_freq(config.rotary_dim, is_long);
            let mut table = RopeTable::new(&inv_freq, rope.amplitude(), positions);
            table = table.for_heads_of(config.head_dim);
            if config.rotates_neighbours {
                table = table.turning(Pairs::Neighbours);
            }
            if let Some(scaling) = rope.query_scaling {
                table = table.with_scaled_queries(|position| scaling.factor(position));
            }
            match placement.uses_kernels() {
                true => table.on(&placement.device),
                false => Ok(table),
            }
        };
        Ok(Self {
            model: Some(table(&config.rope)?),
            local: config.local_rope.as_ref().map(table).transpose()?,
        })
    }

    /// Positions the tables hold.
    pub fn positions(&self) -> usize {
        self.model.as_ref().map_or(0, RopeTable::positions)
    }

    /// That of a layer, if it has one.
    pub fn of(&self, layer: LayerRope) -> Option<&RopeTable> {
        match layer {
            LayerRope::Model => self.model.as_ref(),
            LayerRope::Local => self.local.as_ref(),
            LayerRope::None => None,
        }
    }
}
