//! In which order the products of a block ask for its weights, so that each can be dequantized beside the product before.

use super::{Block, InputGrad, Saved};
use crate::model::lora_linear::LoraLinear;
use crate::ops::weight::{Announced, Weight};

impl Block {
    /// Announces the order of forward, until the result is dropped.
    pub(super) fn announce_forward(&self) -> Announced {
        announce(self.linears())
    }

    /// Announces the order of backward, with what it computes again; of the MLP that of one tile.
    pub(super) fn announce_backward(&self, saved: &Saved, input: InputGrad) -> Announced {
        let mut order = Vec::new();
        match saved {
            Saved::Kept(_) => {}
            Saved::Input(_) | Saved::Parked(_) => {
                order.extend(self.attention_linears());
                order.extend(self.gate_up.layers());
                if self.branch_norms.is_some() {
                    order.push(&self.down);
                }
            }
        }
        order.push(&self.down);
        order.extend(self.gate_up.layers());
        order.push(&self.o);
        let branches = self.qkv.layers().iter();
        order.extend(branches.filter(|linear| match input {
            InputGrad::Needed => true,
            // The gradients of DoRA's adapters read the weight, those of plain ones do not.
            InputGrad::Skip => linear.has_magnitude(),
        }));
        announce(order)
    }

    pub(super) fn attention_linears(&self) -> impl Iterator<Item = &LoraLinear> {
        self.qkv.layers().iter().chain([&self.o])
    }

    pub(super) fn mlp_linears(&self) -> impl Iterator<Item = &LoraLinear> {
        self.gate_up.layers().iter().chain([&self.down])
    }
}

fn announce<'a>(order: impl IntoIterator<Item = &'a LoraLinear>) -> Announced {
    Weight::announce(order.into_iter().map(|linear| &linear.weight))
}
