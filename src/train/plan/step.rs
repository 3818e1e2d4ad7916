//! The tensors of one micro-batch in the order in which they come and go: the engine's forward and backward with sizes
//! instead of values.
//!
//! It follows `Decoder::backward` and `Block` line by line; `tests/plan.rs` holds what it predicts against what the engine
//! allocates.

use super::{Engine, Footprint, Item, Workload};
use crate::model::{ActivationPolicy, Module};
use crate::ops::linear;

/// Memory in use, and how it was made up when it was largest.
#[derive(Debug, Default)]
struct Ledger {
    now: Footprint,
    peak: Footprint,
}

/// A tensor that is there.
#[derive(Debug, Clone, Copy)]
#[must_use = "a tensor that is never freed stays"]
struct Held {
    item: Item,
    bytes: u64,
}

impl Ledger {
    fn alloc(&mut self, item: Item, bytes: u64) -> Held {
        self.now.add(item, bytes);
        if self.now.total() > self.peak.total() {
            self.peak = self.now.clone();
        }
        Held { item, bytes }
    }

    fn free(&mut self, tensors: impl IntoIterator<Item = Held>) {
        for Held { item, bytes } in tensors {
            self.now.remove(item, bytes);
        }
    }

    /// Calls a tensor by another name from now on.
    fn rename(&mut self, tensor: Held, item: Item) -> Held {
        self.now.remove(tensor.item, tensor.bytes);
        self.now.add(item, tensor.bytes);
        Held { item, ..tensor }
    }
}

/// What `Activations` holds beside the block's input.
struct Activations {
    qkv: Vec<Held>,
    attention: [Held; 2],
    mid: Held,
    mlp: Vec<Held>,
    u_o: Held,
}

/// The most that forward and backward of one micro-batch hold at a time, with one policy for each block.
pub(super) fn peak(workload: &Workload, policies: &[ActivationPolicy]) -> Footprint {
    let mut step = Step {
        workload,
        ledger: Ledger::default(),
    };
    step.decoder(policies);
    step.ledger.peak
}

struct Step<'a> {
    workload: &'a Workload,
    ledger: Ledger,
}

impl Step<'_> {
    fn decoder(&mut self, policies: &[ActivationPolicy]) {
        let Workload { model, .. } = self.workload;
        let d = model.hidden_size;
        let lowest = self.workload.lowest_adapter().unwrap_or(model.num_layers);
        let passes = 0..self.workload.together;
        let layouts: Vec<_> = passes.clone().map(|_| self.layout()).collect();
        let mut hidden: Vec<_> = passes
            .clone()
            .map(|_| self.values(Item::Working, d))
            .collect();
        let mut saved: Vec<Vec<_>> = passes.map(|_| Vec::new()).collect();
        for (layer, policy) in policies.iter().enumerate() {
            for (x, saved) in hidden.iter_mut().zip(&mut saved) {
                let (y, activations) = self.forward_keeping(layer);
                if layer < lowest {
                    self.drop_activations(activations);
                    self.ledger.free([*x]);
                } else {
                    let x = self.ledger.rename(*x, Item::Activations);
                    saved.push((x, self.save(*policy, activations)));
                }
                *x = y;
            }
        }
        let mut losses = Vec::new();
        for x in &mut hidden {
            let normed = self.values(Item::Working, d);
            let (results, d_normed) = self.loss();
            losses.extend(results);
            let dx = self.values(Item::Working, d);
            self.ledger.free([*x, normed, d_normed]);
            *x = dx;
        }
        for layer in (lowest..model.num_layers).rev() {
            for saved in &mut saved {
                let (x, activations) = saved.pop().expect("saved above for each of these layers");
                self.block_backward(layer, x, activations, layer == lowest);
            }
        }
        self.ledger.free(hidden);
        self.ledger.free(losses);
        self.ledger.free(layouts.into_iter().flatten());
    }

    /// Positions, and the tiles of attention.
    fn layout(&mut self) -> Vec<Held> {
        /// Words of a tile, and rows of the smallest ones; three lists.
        const TILE_WORDS: u64 = 3 * 5;
        const TILE_ROWS: usize = 64;
        let rows = self.workload.rows as u64;
        let tiles = self.workload.rows.div_ceil(TILE_ROWS) as u64;
        vec![
            self.ledger.alloc(Item::Working, 4 * rows),
            self.ledger.alloc(Item::Working, 4 * TILE_WORDS * tiles),
        ]
    }

    /// A tensor `[N, width]` of activations.
    fn values(&mut self, item: Item, width: usize) -> Held {
        let values = (self.workload.rows * width) as u64;
        self.ledger
            .alloc(item, values * self.workload.value_bytes())
    }

    /// A tensor `[N, width]` in f32.
    fn f32_values(&mut self, width: usize) -> Held {
        let values = (self.workload.rows * width) as u64;
        self.ledger.alloc(Item::Working, 4 * values)
    }

    /// The output of a linear layer and the adapter's `u`.
    fn linear(&mut self, layer: usize, module: Module) -> [Held; 2] {
        let (d_out, _) = self.workload.model.linear_shape(module);
        let y = self.values(Item::Working, d_out);
        let u = self.rank_values(layer, module);
        self.dropout_scratch(layer, module, 0);
        [y, u]
    }

    /// What kernels take besides their results where there is dropout: in forward (0) or backward (1).
    fn dropout_scratch(&mut self, layer: usize, module: Module, direction: usize) {
        let r = self.workload.rank(layer, module);
        if self.workload.dropout && self.workload.engine == Engine::Kernels && r > 0 {
            let (_, d_in) = self.workload.model.linear_shape(module);
            let bytes = linear::dropout_scratch_bytes(self.workload.rows, d_in, r)[direction];
            let partial = self.ledger.alloc(Item::Working, bytes);
            self.ledger.free([partial]);
        }
    }

    /// The gradient of `u`, with that of the adapter's factors.
    fn backward_lora(&mut self, layer: usize, module: Module) -> Held {
        let du = self.rank_values(layer, module);
        self.dropout_scratch(layer, module, 1);
        du
    }

    /// `u` or its gradient, `[N, R]`.
    fn rank_values(&mut self, layer: usize, module: Module) -> Held {
        self.values(Item::Working, self.workload.rank(layer, module))
    }

    fn save(&mut self, policy: ActivationPolicy, activations: Activations) -> Option<Activations> {
        if policy == ActivationPolicy::Recompute {
            self.drop_activations(activations);
            return None;
        }
        let Activations {
            qkv,
            attention,
            mid,
            mlp,
            u_o,
        } = activations;
        let mut keep = |tensor| self.ledger.rename(tensor, Item::Activations);
        Some(Activations {
            qkv: qkv.into_iter().map(&mut keep).collect(),
            attention: attention.map(&mut keep),
            mid: keep(mid),
            mlp: mlp.into_iter().map(&mut keep).collect(),
            u_o: keep(u_o),
        })
    }

    fn drop_activations(&mut self, activations: Activations) {
        let Activations {
            qkv,
            attention,
            mid,
            mlp,
            u_o,
        } = activations;
        self.ledger.free(qkv);
        self.ledger.free(attention);
        self.ledger.free([mid, u_o]);
        self.ledger.free(mlp);
    }

    /// `Block::forward_keeping`: the output, and what backward reads beside the input.
    fn forward_keeping(&mut self, layer: usize) -> (Held, Activations) {
        let model = &self.workload.model;
        let (d, f) = (model.hidden_size, model.intermediate_size);
        let (queries, keys) = self.workload.head_widths();
        let num_heads = model.num_heads;
        let qk_norm = model.qk_norm;

        let h = self.values(Item::Working, d);
        let mut qkv = Vec::new();
        for module in [Module::Q, Module::K, Module::V] {
            qkv.extend(self.linear(layer, module));
        }
        if qk_norm {
            qkv.extend([queries, keys].map(|width| self.values(Item::Working, width)));
        }
        self.ledger.free([h]);
        let attention = [
            self.values(Item::Working, queries),
            self.f32_values(num_heads),
        ];
        let [mid, u_o] = self.linear(layer, Module::O);
        let h = self.values(Item::Working, d);
        let mut mlp = Vec::new();
        for module in [Module::Gate, Module::Up] {
            mlp.extend(self.linear(layer, module));
        }
        let act = self.values(Item::Working, f);
        let [y, u_down] = self.linear(layer, Module::Down);
        mlp.push(u_down);
        self.ledger.free([act, h]);
        let activations = Activations {
            qkv,
            attention,
            mid,
            mlp,
            u_o,
        };
        (y, activations)
    }

    /// `linear_cross_entropy::backward`: the losses, and the gradient of the final norm's output.
    fn loss(&mut self) -> (Vec<Held>, Held) {
        let d = self.workload.model.hidden_size;
        let labels = 4 * self.workload.label_rows as u64;
        let columns: Vec<_> = (0..2)
            .map(|_| self.ledger.alloc(Item::Working, labels))
            .collect();
        let results = (0..3)
            .map(|_| self.ledger.alloc(Item::Working, labels))
            .collect();
        let dx = self.values(Item::Working, d);
        let chunk = self.workload.loss_chunk_rows() as u64;
        let hidden = chunk * d as u64 * self.workload.value_bytes();
        let logits = 4 * chunk * self.workload.model.vocab_size as u64;
        let gathered = self.ledger.alloc(Item::LossChunk, hidden);
        let logits = self.ledger.alloc(Item::LossChunk, logits);
        let d_chunk = self.ledger.alloc(Item::LossChunk, hidden);
        self.ledger.free([gathered, logits, d_chunk]);
        self.ledger.free(columns);
        (results, dx)
    }

    /// `Block::backward`; the gradient of the output becomes that of the input in place.
    fn block_backward(
        &mut self,
        layer: usize,
        x: Held,
        saved: Option<Activations>,
        is_lowest: bool,
    ) {
        let model = &self.workload.model;
        let d = model.hidden_size;
        let (queries, keys) = self.workload.head_widths();
        let (num_heads, qk_norm) = (model.num_heads, model.qk_norm);
        let Activations {
            qkv,
            attention,
            mid,
            mlp,
            u_o,
        } = saved.unwrap_or_else(|| {
            let (y, activations) = self.forward_keeping(layer);
            self.ledger.free([y]);
            activations
        });
        self.mlp_backward(layer, mlp);
        let du = self.backward_lora(layer, Module::O);
        let d_out = self.values(Item::Working, queries);
        self.ledger.free([du]);
        let delta = self.f32_values(num_heads);
        let mut d_qkv = [queries, keys, keys].map(|width| self.values(Item::Working, width));
        self.ledger.free([delta, d_out, mid]);
        self.ledger.free(attention);
        let h = self.values(Item::Working, d);
        if qk_norm {
            let d_raw = [queries, keys].map(|width| self.values(Item::Working, width));
            self.ledger.free([d_qkv[0], d_qkv[1]]);
            d_qkv = [d_raw[0], d_raw[1], d_qkv[2]];
        }
        let mut d_h = None;
        for (module, d_out) in [Module::Q, Module::K, Module::V].into_iter().zip(d_qkv) {
            let du = self.backward_lora(layer, module);
            if !is_lowest && d_h.is_none() {
                d_h = Some(self.values(Item::Working, d));
            }
            self.ledger.free([du, d_out]);
        }
        self.ledger.free(d_h);
        self.ledger.free([h, x, u_o]);
        self.ledger.free(qkv);
    }

    fn mlp_backward(&mut self, layer: usize, mlp: Vec<Held>) {
        let model = &self.workload.model;
        let (d, f) = (model.hidden_size, model.intermediate_size);
        let act = self.values(Item::Working, f);
        let du = self.backward_lora(layer, Module::Down);
        let d_act = self.values(Item::Working, f);
        self.ledger.free([du, act, d_act]);
        let h = self.values(Item::Working, d);
        let du = self.backward_lora(layer, Module::Gate);
        let d_h = self.values(Item::Working, d);
        self.ledger.free([du]);
        let du = self.backward_lora(layer, Module::Up);
        self.ledger.free([du, h, d_h]);
        self.ledger.free(mlp);
    }
}
