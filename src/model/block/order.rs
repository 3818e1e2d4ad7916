//! In which order the products of a block ask for its weights, so that each can be dequantized beside the product before.

use super::{Block, InputGrad, Saved};
use crate::model::lora_linear::LoraLinear;
use crate::ops::weight::{Announced, Weight};

impl Block {
    /// Announces the order of forward, until the result is dropped.
    pub(super) fn announce_forward(&self) -> Announced {
        announce(
            self.attention_weights()
                .into_iter()
                .chain(self.mlp_weights()),
        )
    }

    /// Announces the order of backward, with what it computes again; of the MLP that of one tile.
    pub(super) fn announce_backward(&self, saved: &Saved, input: InputGrad) -> Announced {
        let mut order = Vec::new();
        match saved {
            Saved::Kept(_) => {}
            Saved::Input(_) | Saved::Parked(_) => {
                order.extend(self.attention_weights());
                order.extend([&self.gate, &self.up]);
                if self.branch_norms.is_some() {
                    order.push(&self.down);
                }
            }
        }
        order.extend([&self.down, &self.gate, &self.up, &self.o]);
        let branches = [&self.q, &self.k, &self.v].into_iter();
        order.extend(branches.filter(|linear| match input {
            InputGrad::Needed => true,
            // The gradients of DoRA's adapters read the weight, those of plain ones do not.
            InputGrad::Skip => linear.has_magnitude(),
        }));
        announce(order)
    }

    fn attention_weights(&self) -> [&LoraLinear; 4] {
        [&self.q, &self.k, &self.v, &self.o]
    }

    fn mlp_weights(&self) -> [&LoraLinear; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

fn announce<'a>(order: impl IntoIterator<Item = &'a LoraLinear>) -> Announced {
    Weight::announce(order.into_iter().map(|linear| &linear.weight))
}
