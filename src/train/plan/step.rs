//! The tensors of one micro-batch in the order in which they come and go: the engine's forward and backward with sizes
//! instead of values.
//!
//! It follows `Decoder::backward` and `Block` line by line; `tests/plan.rs` holds what it predicts against what the engine
//! allocates.

mod dora;
mod linear;

use super::{Engine, Footprint, Item, Workload};
use crate::model::{ActivationPolicy, MLP_TILE_ROWS, Module};

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
    attended: Option<Held>,
    mid: Held,
    mlp: Option<Vec<Tile>>,
    u_o: Held,
}

/// What backward finds of a block.
struct Saved {
    /// `None` while it is on the host.
    x: Option<Held>,
    activations: Option<Activations>,
}

/// Gate and up, the `u` of each and of down, and down's output where a norm follows it.
type Tile = [Vec<Held>; 3];

/// The most that forward and backward of one micro-batch hold at a time, with one policy for each block.
pub(super) fn peak(workload: &Workload, policies: &[ActivationPolicy]) -> Footprint {
    let mut step = Step {
        workload: &workload.stacked(),
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
        let lowest = self.workload.lowest_trained().unwrap_or(model.num_layers);
        let passes = 0..self.workload.together;
        let layouts: Vec<_> = passes.clone().map(|_| self.layout()).collect();
        let mut hidden: Vec<_> = passes
            .clone()
            .map(|_| self.values(Item::Working, d))
            .collect();
        let mut saved: Vec<Vec<Saved>> = passes.map(|_| Vec::new()).collect();
        for (layer, policy) in policies.iter().enumerate() {
            for (x, saved) in hidden.iter_mut().zip(&mut saved) {
                let (y, activations) = self.forward(layer, *policy);
                if layer < lowest {
                    self.drop_activations(activations);
                    self.ledger.free([*x]);
                } else {
                    saved.push(self.save(*x, *policy, activations));
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
                let mut own = saved.pop().expect("saved above for each of these layers");
                self.fetch(&mut own);
                if let Some(next) = saved.last_mut() {
                    self.fetch(next);
                }
                let skips_input = layer == lowest && !self.workload.trains_embedding();
                self.block_backward(layer, own, skips_input);
            }
        }
        if self.workload.trains_embedding() {
            for _ in &hidden {
                self.embedding_backward();
            }
        }
        self.ledger.free(hidden);
        self.ledger.free(losses);
        self.ledger.free(layouts.into_iter().flatten());
    }

    /// `embedding::backward`: each token, where its rows begin, and the rows.
    fn embedding_backward(&mut self) {
        let rows = self.workload.rows as u64;
        let tokens = rows.min(self.workload.model.vocab_size as u64);
        let lists = self
            .ledger
            .alloc(Item::Working, 4 * (2 * tokens + 1 + rows));
        self.ledger.free([lists]);
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
        self.tile_values(self.workload.rows, item, width)
    }

    /// A tensor `[rows, width]` of activations.
    fn tile_values(&mut self, rows: usize, item: Item, width: usize) -> Held {
        let values = (rows * width) as u64;
        self.ledger
            .alloc(item, values * self.workload.value_bytes())
    }

    /// A tensor `[N, width]` in f32.
    fn f32_values(&mut self, width: usize) -> Held {
        let values = (self.workload.rows * width) as u64;
        self.ledger.alloc(Item::Working, 4 * values)
    }

    fn save(
        &mut self,
        x: Held,
        policy: ActivationPolicy,
        activations: Option<Activations>,
    ) -> Saved {
        if policy == ActivationPolicy::Offload && self.workload.engine == Engine::Kernels {
            self.ledger.free([x]);
            return Saved {
                x: None,
                activations,
            };
        }
        Saved {
            x: Some(self.ledger.rename(x, Item::Activations)),
            activations: activations.map(|kept| self.keep(kept)),
        }
    }

    /// Brings back an input that is on the host.
    fn fetch(&mut self, saved: &mut Saved) {
        if saved.x.is_none() {
            saved.x = Some(self.values(Item::Activations, self.workload.model.hidden_size));
        }
    }

    fn keep(&mut self, activations: Activations) -> Activations {
        let Activations {
            qkv,
            attention,
            attended,
            mid,
            mlp,
            u_o,
        } = activations;
        let mut keep = |tensor| self.ledger.rename(tensor, Item::Activations);
        Activations {
            mlp: mlp.map(|tiles| {
                let mut kept = |part: Vec<Held>| part.into_iter().map(&mut keep).collect();
                tiles.into_iter().map(|tile| tile.map(&mut kept)).collect()
            }),
            qkv: qkv.into_iter().map(&mut keep).collect(),
            attention: attention.map(&mut keep),
            attended: attended.map(&mut keep),
            mid: keep(mid),
            u_o: keep(u_o),
        }
    }

    fn drop_activations(&mut self, activations: Option<Activations>) {
        let Some(activations) = activations else {
            return;
        };
        let Activations {
            qkv,
            attention,
            attended,
            mid,
            mlp,
            u_o,
        } = activations;
        self.ledger.free(qkv);
        self.ledger.free(attention);
        self.ledger.free(attended);
        self.ledger.free([mid, u_o]);
        self.ledger
            .free(mlp.into_iter().flatten().flatten().flatten());
    }

    /// `Block::forward`: the output, and what backward reads beside the input where that is kept.
    fn forward(&mut self, layer: usize, policy: ActivationPolicy) -> (Held, Option<Activations>) {
        let (mut activations, h) = self.attend(layer);
        match policy {
            ActivationPolicy::Keep => {
                let (y, tiles) = self.mlp(layer, policy);
                activations.mlp = Some(tiles);
                self.ledger.free(h);
                (y, Some(activations))
            }
            ActivationPolicy::Recompute | ActivationPolicy::Offload => {
                self.ledger.free(activations.qkv);
                self.ledger.free(activations.attention);
                self.ledger.free(activations.attended);
                self.ledger.free([activations.u_o]);
                let (y, _) = self.mlp(layer, policy);
                self.ledger.free([activations.mid].into_iter().chain(h));
                (y, None)
            }
        }
    }

    /// `Block::attend`: its results, and the input of the MLP where that is another than `mid`.
    fn attend(&mut self, layer: usize) -> (Activations, Option<Held>) {
        let Workload { model, rows, .. } = self.workload;
        let (queries, keys) = self.workload.head_widths();
        let h = self.input_norm(*rows);
        let [mut qkv, us] = self.branches(layer, model.attention_inputs(), *rows);
        qkv.extend(us);
        if model.qk_norm.is_some() {
            qkv.extend([queries, keys].map(|width| self.values(Item::Working, width)));
        }
        self.ledger.free(h);
        let attention = [
            self.values(Item::Working, queries),
            self.f32_values(model.num_heads),
        ];
        let [out, u_o] = self.linear(layer, Module::O, *rows);
        let (mid, attended) = self.normed(out, *rows);
        let h = self.input_norm(*rows);
        let activations = Activations {
            qkv,
            attention,
            attended,
            mid,
            mlp: None,
            u_o,
        };
        (activations, h)
    }

    /// `InputNorm::forward`: what the norm gives, in models that have one there.
    fn input_norm(&mut self, rows: usize) -> Option<Held> {
        let model = &self.workload.model;
        let (has_one, d) = (model.input_norms, model.hidden_size);
        has_one.then(|| self.tile_values(rows, Item::Working, d))
    }

    /// `Block::normed`: what a branch adds to the residual stream, and its output where that is something else.
    fn normed(&mut self, out: Held, rows: usize) -> (Held, Option<Held>) {
        match self.branch_norm(rows) {
            Some(normed) => (normed, Some(out)),
            None => (out, None),
        }
    }

    /// What the norm after a branch gives in either direction, in models that have one.
    fn branch_norm(&mut self, rows: usize) -> Option<Held> {
        let model = &self.workload.model;
        let (has_one, d) = (model.branch_norms, model.hidden_size);
        has_one.then(|| self.tile_values(rows, Item::Working, d))
    }

    /// Rows of each tile of the MLP.
    fn tiles(&self) -> Vec<usize> {
        let all = self.workload.rows;
        if all <= MLP_TILE_ROWS {
            return vec![all];
        }
        let instances = self.workload.instances();
        let rows = all / instances;
        let starts = (0..rows).step_by(MLP_TILE_ROWS);
        let of_one: Vec<_> = starts
            .map(|start| MLP_TILE_ROWS.min(rows - start))
            .collect();
        of_one.repeat(instances)
    }

    /// `Block::mlp`: the block's output, and the tiles where they are kept.
    fn mlp(&mut self, layer: usize, policy: ActivationPolicy) -> (Held, Vec<Tile>) {
        let Workload { model, rows, .. } = self.workload;
        let (mut kept, mut whole) = (Vec::new(), None);
        for tile_rows in self.tiles() {
            let [gate_up, mut us] = self.branches(layer, model.mlp_inputs(), tile_rows);
            let act = self.tile_values(tile_rows, Item::Working, model.intermediate_size);
            let [y, u_down] = self.linear(layer, Module::Down, tile_rows);
            self.ledger.free([act]);
            us.push(u_down);
            let (y, out) = self.normed(y, tile_rows);
            let tile = [gate_up, us, out.into_iter().collect()];
            match policy {
                ActivationPolicy::Keep => kept.push(tile),
                ActivationPolicy::Recompute | ActivationPolicy::Offload => {
                    self.ledger.free(tile.into_iter().flatten());
                }
            }
            if tile_rows == *rows {
                return (y, kept);
            }
            if whole.is_none() {
                whole = Some(self.values(Item::Working, model.hidden_size));
            }
            self.ledger.free([y]);
        }
        (whole.expect("a batch has rows"), kept)
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
        let logits = self.workload.logits_chunk_bytes();
        let gathered = self.ledger.alloc(Item::LossChunk, hidden);
        let logits = match self.workload.engine {
            // Kept from one step to the next.
            Engine::Cpu(_) => None,
            Engine::Kernels => Some(self.ledger.alloc(Item::LossChunk, logits)),
        };
        // In f32 first, where it is a sum over parts of the head.
        let sum = (self.workload.pages_head())
            .then(|| self.ledger.alloc(Item::LossChunk, 4 * chunk * d as u64));
        let d_chunk = self.ledger.alloc(Item::LossChunk, hidden);
        let vocab = self.workload.model.vocab_size;
        self.packed_lhs(Item::LossChunk, chunk as usize, vocab);
        self.ledger
            .free([gathered, d_chunk].into_iter().chain(logits).chain(sum));
        self.ledger.free(columns);
        (results, dx)
    }

    /// `Block::backward`; the gradient of the output becomes that of the input in place.
    fn block_backward(&mut self, layer: usize, saved: Saved, skips_input: bool) {
        let Workload { model, rows, .. } = self.workload;
        let (queries, keys) = self.workload.head_widths();
        let Activations {
            qkv,
            attention,
            attended,
            mid,
            mlp,
            u_o,
        } = saved.activations.unwrap_or_else(|| {
            let (activations, h) = self.attend(layer);
            self.ledger.free(h);
            activations
        });
        self.mlp_backward(layer, mlp);
        self.ledger.free([mid]);
        let d_attended = self.branch_norm(*rows);
        self.ledger.free(attended);
        let d_out = self.linear_backward(layer, Module::O, *rows, Some(queries));
        self.ledger.free(d_attended);
        let delta = self.f32_values(model.num_heads);
        let mut d_qkv = [queries, keys, keys].map(|width| self.values(Item::Working, width));
        self.ledger.free([delta].into_iter().chain(d_out));
        self.ledger.free(attention);
        let h = self.input_norm(*rows);
        if model.qk_norm.is_some() {
            let d_raw = [queries, keys].map(|width| self.values(Item::Working, width));
            self.ledger.free([d_qkv[0], d_qkv[1]]);
            d_qkv = [d_raw[0], d_raw[1], d_qkv[2]];
        }
        let makes_input = !skips_input && model.input_norms;
        let modules = model.attention_inputs();
        let d_h = self.branches_backward(layer, modules, *rows, d_qkv.to_vec(), makes_input);
        self.ledger.free(d_h);
        self.ledger.free(h);
        self.ledger.free([u_o]);
        self.ledger.free(saved.x);
        self.ledger.free(qkv);
    }

    fn mlp_backward(&mut self, layer: usize, kept: Option<Vec<Tile>>) {
        let model = &self.workload.model;
        let (f, makes_input) = (model.intermediate_size, model.input_norms);
        let mut kept = kept.map(Vec::into_iter);
        for rows in self.tiles() {
            let (tile, act) = match kept.as_mut().and_then(Iterator::next) {
                Some(tile) => (tile, self.tile_values(rows, Item::Working, f)),
                None => self.tile_again(layer, rows),
            };
            let [d_gate_up, us, out] = tile;
            let d_out = self.branch_norm(rows);
            self.ledger.free(out);
            let d_act = self.linear_backward(layer, Module::Down, rows, Some(f));
            self.ledger
                .free([act].into_iter().chain(d_out).chain(d_act));
            let h = self.input_norm(rows);
            let modules = model.mlp_inputs();
            let d_h = self.branches_backward(layer, modules, rows, d_gate_up, makes_input);
            self.ledger.free(h.into_iter().chain(d_h).chain(us));
        }
    }

    /// `Block::tile_again`: a tile, and the input of `down_proj`.
    fn tile_again(&mut self, layer: usize, rows: usize) -> (Tile, Held) {
        let model = &self.workload.model;
        let h = self.input_norm(rows);
        let [gate_up, mut us] = self.branches(layer, model.mlp_inputs(), rows);
        self.ledger.free(h);
        let act = self.tile_values(rows, Item::Working, model.intermediate_size);
        if !self.workload.model.branch_norms {
            us.push(self.down_project(layer, Module::Down, rows));
            return ([gate_up, us, Vec::new()], act);
        }
        let [out, u_down] = self.linear(layer, Module::Down, rows);
        us.push(u_down);
        ([gate_up, us, vec![out]], act)
    }
}
