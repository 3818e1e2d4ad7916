//! How fast a run can be and is expected to be: its FLOPs, and what steps made of such FLOPs where they were measured.

use super::{Engine, Plan, Workload};
use crate::device::{ComputeDtype, Residency};
use crate::model::Module;
use crate::ops::weight::Weight;

/// What a machine does.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// FLOPs a second of one product as wide as the model, of as many rows as a micro-batch.
    pub product: f64,
    /// Bytes a second from the memory map to the device.
    pub bus: f64,
}

impl Engine {
    /// The share of [`Rates::product`] that whole steps came to (`benches/results`): on an H200 59 to 74 %, with the short and the
    /// long ones, kept or computed again, of one micro-batch; in f32 on the CPU 80 to 90 %. In bf16 on the CPU it was a third to
    /// nine tenths.
    fn measured_share(self) -> Option<f64> {
        match self {
            Self::Kernels => Some(0.66),
            Self::Cpu(ComputeDtype::F32) => Some(0.8),
            Self::Cpu(ComputeDtype::Bf16) => None,
        }
    }
}

impl Workload {
    /// FLOPs of the linear layers, the head and attention for one micro-batch with its instances, forward and backward, when
    /// the activations of `kept` blocks are kept.
    ///
    /// A frozen weight takes 2 per element and token in forward and as many for the gradient of its input; attention at
    /// full length 2 `(N + 1)` per query value and product, of which forward has 2 and backward 5. What is computed again is
    /// forward without `down_proj`.
    pub fn flops(&self, kept: usize) -> f64 {
        let model = &self.model;
        let rows = (self.rows * self.instances()) as f64;
        let elements: usize = model.block_elements().iter().sum();
        let linear = 2.0 * rows * elements as f64;
        let product = rows * (self.positions + 1) as f64 * self.head_widths().0 as f64;
        let (forward, backward) = (linear + 2.0 * product, linear + 5.0 * product);
        let layers = model.num_layers as f64;
        let again = layers - kept as f64;
        // Backward makes the output of a layer with DoRA again; with dropout, W meets both parts of its input each time.
        let adapted: usize = self
            .adapted()
            .map(|(module, _)| self.model.linear_shape(module))
            .map(|(d_out, d_in)| d_out * d_in)
            .sum();
        let products = match (self.dora, self.dropout) {
            (false, _) => 0.0,
            (true, false) => layers,
            (true, true) => (layers + again) + 2.0 * layers,
        };
        let dora = products / layers * 2.0 * rows * adapted as f64;
        let (d_out, d_in) = model.linear_shape(Module::Down);
        let forward_again = forward - 2.0 * rows * (d_out * d_in) as f64;
        let label_rows = (self.label_rows * self.instances()) as f64;
        // A gradient of its own takes as much as that of its input.
        let of_head = if self.trains_head() { 6.0 } else { 4.0 };
        let head = of_head * label_rows * self.vocabulary_values() as f64;
        layers * (forward + backward) + again * forward_again + head + dora
    }

    /// Tokens in a second that no run passes: its FLOPs take no longer than as one large product.
    pub fn tokens_per_second_at_most(&self, plan: &Plan, rates: Rates) -> f64 {
        self.rows as f64 / self.product_seconds(plan, rates)
    }

    /// Tokens in a second that are to be expected, by what was measured of others; `None` where too little was.
    pub fn tokens_per_second_expected(&self, plan: &Plan, rates: Rates) -> Option<f64> {
        let together = plan.together as f64;
        let computing =
            together * self.product_seconds(plan, rates) / self.engine.measured_share()?;
        let streaming = self.streamed_bytes(plan) as f64 / rates.bus;
        Some(together * self.rows as f64 / computing.max(streaming))
    }

    /// Of the products of one micro-batch.
    fn product_seconds(&self, plan: &Plan, rates: Rates) -> f64 {
        self.flops(plan.kept_blocks()) / rates.product
    }

    /// What comes to the device while micro-batches go up and down together.
    fn streamed_bytes(&self, plan: &Plan) -> u64 {
        match plan.residence.weights {
            Residency::Resident => 0,
            Residency::Streamed { .. } => {
                let block = Weight::slot_bytes(&self.model.block_elements(), self.blocks);
                2 * (self.model.num_layers * block) as u64
            }
        }
    }
}
