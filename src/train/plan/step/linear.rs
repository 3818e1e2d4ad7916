//! What linear layers with their adapters take in a step, as `LoraLinear` and `Branches` allocate it.

use super::super::{Engine, Item};
use super::{Held, Step};
use crate::model::{Module, are_together};
use crate::ops::{linear, packed_lhs_bytes};

impl Step<'_> {
    /// `Branches::forward` of the layers that read the same input: their outputs for so many rows, and the `u` of their adapters.
    pub(super) fn branches(
        &mut self,
        layer: usize,
        branches: &[Module],
        rows: usize,
    ) -> [Vec<Held>; 2] {
        let module = branches[0];
        let widths = self.workload.model.output_widths(module);
        if widths.len() > 1 {
            let [all, u] = self.linear(layer, module, rows);
            let parts = widths.iter();
            let parts = parts.map(|&width| self.tile_values(rows, Item::Working, width));
            let parts = parts.collect();
            self.ledger.free([all]);
            return [parts, vec![u]];
        }
        if !self.is_together(layer, module) {
            let linears = branches
                .iter()
                .map(|&branch| self.linear(layer, branch, rows));
            let (outputs, us) = linears.map(|[y, u]| (y, u)).unzip();
            return [outputs, us];
        }
        let us = self.rank_values_of(layer, branches, rows);
        self.dropout_scratch(layer, module, rows, (branches.len(), 0));
        let outputs = branches.iter().map(|&branch| {
            let (d_out, _) = self.workload.model.linear_shape(branch);
            self.tile_values(rows, Item::Working, d_out)
        });
        [outputs.collect(), us]
    }

    /// Whether the products of the adapters on those layers are made together.
    fn is_together(&self, layer: usize, module: Module) -> bool {
        let (_, d_in) = self.workload.model.linear_shape(module);
        let rank = |module| self.workload.rank(layer, module);
        self.workload.engine == Engine::Kernels
            && self.workload.instances.is_none()
            && !self.workload.dora
            && are_together(module, rank, d_in)
    }

    /// The output of a linear layer for so many rows, and the adapter's `u`.
    pub(super) fn linear(&mut self, layer: usize, module: Module, rows: usize) -> [Held; 2] {
        let (d_out, d_in) = self.workload.model.linear_shape(module);
        if self.is_dora(layer, module) {
            return self.dora_forward(layer, module, rows);
        }
        let y = self.tile_values(rows, Item::Working, d_out);
        let u = self.down_project(layer, module, rows);
        self.packed_lhs(Item::Working, rows, d_in);
        [y, u]
    }

    /// What the CPU packs of a matrix that many products in bf16 read.
    pub(super) fn packed_lhs(&mut self, item: Item, rows: usize, width: usize) {
        if let Engine::Cpu(dtype) = self.workload.engine {
            let bytes = packed_lhs_bytes(rows, width, dtype);
            let packed = self.ledger.alloc(item, bytes);
            self.ledger.free([packed]);
        }
    }

    /// The adapter's `u`.
    pub(super) fn down_project(&mut self, layer: usize, module: Module, rows: usize) -> Held {
        let instances = self.instances_of(rows);
        let copies = self.factor_values(layer, module, self.workload.value_bytes());
        let u = self.rank_values(layer, module, rows);
        self.dropout_scratch(layer, module, rows / instances, (1, 0));
        self.ledger.free(copies);
        if instances > 1 {
            // Those of the instances are put together.
            let together = self.rank_values(layer, module, rows);
            self.ledger.free([together]);
        }
        u
    }

    /// How many instances are in these rows: all of them, or one that has a tile of its own.
    fn instances_of(&self, rows: usize) -> usize {
        match rows == self.workload.rows {
            true => self.workload.instances(),
            false => 1,
        }
    }

    /// What dropout on the matrices takes for both factors of an adapter: masked copies, or their gradients.
    fn factor_values(&mut self, layer: usize, module: Module, value_bytes: u64) -> Option<Held> {
        self.workload.instances?;
        let (d_out, d_in) = self.workload.model.linear_shape(module);
        let values = (self.workload.rank(layer, module) * (d_in + d_out)) as u64;
        Some(self.ledger.alloc(Item::Working, values * value_bytes))
    }

    /// What kernels take besides their results where there is dropout, for so many adapters together: in forward (0) or
    /// backward (1).
    fn dropout_scratch(
        &mut self,
        layer: usize,
        module: Module,
        rows: usize,
        (adapters, direction): (usize, usize),
    ) {
        let r = self.workload.rank(layer, module);
        if self.workload.dropout && self.workload.engine == Engine::Kernels && r > 0 {
            let (_, d_in) = self.workload.model.linear_shape(module);
            let bytes = linear::dropout_scratch_bytes(rows, d_in, (adapters, r))[direction];
            let partial = self.ledger.alloc(Item::Working, bytes);
            self.ledger.free([partial]);
        }
    }

    /// `Branches::backward` of the layers that read the same input, each of whose `d_outs` is dropped after its last use: the
    /// gradient of the input, where a new tensor is made for it.
    pub(super) fn branches_backward(
        &mut self,
        layer: usize,
        branches: &[Module],
        rows: usize,
        mut d_outs: Vec<Held>,
        makes_input: bool,
    ) -> Option<Held> {
        let module = branches[0];
        let (d_out, d_in) = self.workload.model.linear_shape(module);
        if d_outs.len() > branches.len() {
            let fused = self.tile_values(rows, Item::Working, d_out);
            self.ledger.free(d_outs);
            d_outs = vec![fused];
        }
        if !self.is_together(layer, module) {
            let mut dx = None;
            for (&branch, d_out) in branches.iter().zip(d_outs) {
                let width = (makes_input && dx.is_none()).then_some(d_in);
                dx = self.linear_backward(layer, branch, rows, width).or(dx);
                self.ledger.free([d_out]);
            }
            return dx;
        }
        let du = self.rank_values_of(layer, branches, rows);
        self.dropout_scratch(layer, module, rows, (branches.len(), 1));
        let dx = makes_input.then(|| self.tile_values(rows, Item::Working, d_in));
        self.ledger.free(d_outs.into_iter().chain(du));
        dx
    }

    /// `LoraLinear::backward` for so many rows: the gradient of the input, where a new tensor of this width is made for it.
    pub(super) fn linear_backward(
        &mut self,
        layer: usize,
        module: Module,
        rows: usize,
        dx: Option<usize>,
    ) -> Option<Held> {
        let (d_out, _) = self.workload.model.linear_shape(module);
        if self.is_dora(layer, module) {
            let gradients = self.dora_backward(layer, module, rows);
            let dx = dx.map(|width| self.tile_values(rows, Item::Working, width));
            self.packed_lhs(Item::Working, rows, d_out);
            self.ledger.free([gradients]);
            return dx;
        }
        let instances = self.instances_of(rows);
        let first = dx.filter(|_| instances > 1);
        let first = first.map(|width| self.tile_values(rows, Item::Working, width));
        let copies = self.factor_values(layer, module, self.workload.value_bytes());
        let gradients = self.factor_values(layer, module, 4);
        let du = self.rank_values(layer, module, rows / instances);
        self.dropout_scratch(layer, module, rows / instances, (1, 1));
        self.ledger.free(gradients);
        let dx = first.or_else(|| dx.map(|width| self.tile_values(rows, Item::Working, width)));
        self.packed_lhs(Item::Working, rows, d_out);
        self.ledger.free([du].into_iter().chain(copies));
        dx
    }

    /// `u` or its gradient, `[rows, R]`.
    pub(super) fn rank_values(&mut self, layer: usize, module: Module, rows: usize) -> Held {
        self.tile_values(rows, Item::Working, self.workload.rank(layer, module))
    }

    fn rank_values_of(&mut self, layer: usize, modules: &[Module], rows: usize) -> Vec<Held> {
        let modules = modules.iter();
        modules
            .map(|&module| self.rank_values(layer, module, rows))
            .collect()
    }
}
