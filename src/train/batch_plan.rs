//! What the batches of one epoch look like, before a run.

use serde::Serialize;

use super::config::TrainConfig;
use super::run_data::RunData;

/// Sizes of the batches of the first epoch. Nothing is padded; how full padded batches would be is told for comparison.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BatchPlan {
    /// Rows or packed sequences in the epoch.
    pub sequences: usize,
    /// Optimizer steps, the last one filled up from the next epoch.
    pub steps: usize,
    /// Tokens of a micro-batch, on average.
    pub mean_micro_batch_tokens: f64,
    pub largest_micro_batch_tokens: usize,
    /// Packing: the share of each sequence that holds tokens, in 0..=1.
    pub fill: Option<f64>,
    /// Without packing: the share of a micro-batch that would hold tokens if rows were padded to its longest, in 0..=1.
    pub padded_fill: Option<f64>,
}

impl BatchPlan {
    /// Lays out the first epoch of `data`.
    pub fn of(data: &RunData, config: &TrainConfig) -> Self {
        let mut order = data.order(config);
        let sequences = order.sequences(1.0) as usize;
        let micro_batch = config.per_device_train_batch_size;
        let (mut tokens, mut padded, mut largest, mut micro_batches) = (0, 0, 0, 0);
        for start in (0..sequences).step_by(micro_batch) {
            let count = micro_batch.min(sequences - start);
            let lengths = (start..start + count).map(|position| order.tokens(position as u64));
            let (sum, longest) = lengths.fold((0, 0), |(sum, longest): (usize, usize), len| {
                (sum + len, longest.max(len))
            });
            tokens += sum;
            padded += longest * count;
            largest = largest.max(sum);
            micro_batches += 1;
        }
        let capacity = config.packed_tokens();
        let share = |whole: usize| tokens as f64 / whole.max(1) as f64;
        Self {
            sequences,
            steps: sequences.div_ceil(micro_batch * config.gradient_accumulation_steps),
            mean_micro_batch_tokens: share(micro_batches),
            largest_micro_batch_tokens: largest,
            fill: capacity.map(|capacity| share(capacity * sequences)),
            padded_fill: capacity.is_none().then(|| share(padded)),
        }
    }
}
