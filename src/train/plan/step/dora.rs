//! What layers with DoRA take in a step, as `ops::linear::dora` allocates it.

use super::super::{Engine, Item};
use super::{Held, Step};
use crate::model::Module;
use crate::ops::linear::dora;

impl Step<'_> {
    pub(super) fn is_dora(&self, layer: usize, module: Module) -> bool {
        self.workload.dora && self.workload.rank(layer, module) > 0
    }

    /// `dora::scales`.
    fn dora_scales(&mut self, layer: usize, module: Module) -> Held {
        let r = self.workload.rank(layer, module);
        let (d_out, _) = self.workload.model.linear_shape(module);
        let mut f32s = |values: usize| self.ledger.alloc(Item::Working, 4 * values as u64);
        let (products, gram, scales) = (f32s(r * d_out), f32s(r * r), f32s(2 * d_out));
        self.ledger.free([products, gram]);
        scales
    }

    /// `dora::forward`.
    pub(super) fn dora_forward(&mut self, layer: usize, module: Module, rows: usize) -> [Held; 2] {
        let (d_out, d_in) = self.workload.model.linear_shape(module);
        let scales = self.dora_scales(layer, module);
        let split = self.workload.dropout.then(|| {
            let [kept, dropped, base] =
                [d_in, d_in, d_out].map(|width| self.tile_values(rows, Item::Working, width));
            self.ledger.free([dropped]);
            [kept, base]
        });
        let y = self.tile_values(rows, Item::Working, d_out);
        let u = self.rank_values(layer, module, rows);
        self.packed_lhs(Item::Working, rows, d_in);
        self.ledger
            .free(split.into_iter().flatten().chain([scales]));
        [y, u]
    }

    /// `dora::backward_adapter`, and what `dora::backward_input` takes beside its result: the gradients of `u` and `h`.
    pub(super) fn dora_backward(&mut self, layer: usize, module: Module, rows: usize) -> Held {
        let (d_out, d_in) = self.workload.model.linear_shape(module);
        let scales = self.dora_scales(layer, module);
        let dropout = self.workload.dropout;
        let kept = dropout.then(|| self.tile_values(rows, Item::Working, d_in));
        let h = self.tile_values(rows, Item::Working, d_out);
        let u = self.rank_values(layer, module, rows);
        if self.workload.engine == Engine::Kernels {
            let bytes = dora::backward_scratch_bytes(rows, d_out);
            let partial = self.ledger.alloc(Item::Working, bytes);
            self.ledger.free([partial]);
        }
        let du = self.rank_values(layer, module, rows);
        self.ledger.free([scales, u].into_iter().chain(kept));
        if dropout {
            let both = [d_in, d_in].map(|width| self.tile_values(rows, Item::Working, width));
            self.ledger.free(both);
        }
        Held {
            bytes: du.bytes + h.bytes,
            ..du
        }
    }
}
