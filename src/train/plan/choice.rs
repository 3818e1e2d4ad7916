//! The fastest way to run a workload within a limit of memory, or the smallest change with which there is one.

use super::{Engine, Moments, Plan, Workload};
use crate::device::{Dequantized, Residence, Residency, Side};
use crate::model::ActivationPolicy;
use crate::{Error, Result};

/// Blocks whose weights are on the device or on their way there, where they are streamed: the one that computes and two
/// behind it.
pub const STREAM_SLOTS: usize = 3;

impl Plan {
    /// The plan in which the upper `kept` blocks keep their activations: those are read first in backward, and what they
    /// free is there for the blocks below to compute theirs again. The lowest are offloaded as the workload says: their
    /// inputs have the longest to wait.
    pub fn keeping(workload: &Workload, kept: usize) -> Self {
        let layers = workload.model.num_layers;
        let lowest = workload.lowest_trained().unwrap_or(layers);
        let policy = |layer| {
            if layer + kept >= layers {
                ActivationPolicy::Keep
            } else if layer >= lowest && layer < lowest + workload.offloaded {
                ActivationPolicy::Offload
            } else {
                ActivationPolicy::Recompute
            }
        };
        Self::with_policies(workload, (0..layers).map(policy).collect())
    }

    /// The fastest plan within `limit` bytes: the first of the workload's ways that fits, then with as few blocks offloaded
    /// as it takes, and as many that keep their activations as fit.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] if none fits, with the smallest change that would.
    pub fn fitting(workload: &Workload, limit: u64) -> Result<Self> {
        let way = workload.way_that_fits(limit, 0)?;
        let fits = |kept: usize| way.fits(limit, kept);
        let counts: Vec<usize> = (1..=workload.model.num_layers).collect();
        let kept = counts.partition_point(|&kept| fits(kept));
        Ok(Self::keeping(&way, kept))
    }
}

impl Workload {
    /// The ways to run this, the fastest first: with all on the device, one micro-batch at a time; with less and less of it
    /// there; then with streamed weights, with all micro-batches of a step together, half of them, and so on.
    fn ways(&self) -> Vec<Self> {
        let alone = Self {
            together: 1,
            ..self.clone()
        };
        if self.engine != Engine::Kernels {
            return vec![alone];
        }
        let halves = std::iter::successors(Some(self.micro_batches), |&n| {
            (n > 1).then(|| n.div_ceil(2))
        });
        let streamed = halves.map(|together| Self {
            together,
            residence: Residence {
                weights: Residency::Streamed {
                    slots: STREAM_SLOTS.min(self.model.num_layers),
                },
                ..self.residence
            },
            ..self.clone()
        });
        let resident = (self.residence.weights == Residency::Resident).then_some(alone);
        let ways = resident.into_iter().chain(streamed);
        ways.flat_map(|way| way.with_less_and_less()).collect()
    }

    /// This, and the same with less on the device: what costs least to do without first.
    fn with_less_and_less(self) -> [Self; 5] {
        let residing = |residence: Residence, offloaded: usize| Self {
            residence,
            offloaded,
            ..self.clone()
        };
        let all = self.residence;
        let by_weight = Residence {
            dequantized: Dequantized::Weight,
            ..all
        };
        let without_embedding = Residence {
            embedding: all.embedding.map(|_| Side::Host),
            ..by_weight
        };
        let least = match self.head_page_bytes() < 2 * self.vocabulary_values() as u64 {
            true => Residence {
                head: all.head.map(|_| Side::Host),
                ..without_embedding
            },
            false => without_embedding,
        };
        // The highest block needs its input back at once.
        let offloaded = self.model.num_layers.saturating_sub(1);
        [
            residing(all, 0),
            residing(by_weight, 0),
            residing(without_embedding, 0),
            residing(without_embedding, offloaded),
            residing(least, offloaded),
        ]
    }

    /// Whether the workload fits into `limit` while `kept` blocks keep their activations.
    fn fits(&self, limit: u64, kept: usize) -> bool {
        let plan = Plan::keeping(self, kept);
        let on_host = self.host_limit.is_none_or(|most| plan.host.total() <= most);
        on_host && plan.peak.total() <= limit
    }

    /// The fastest way that fits into `limit` while `kept` blocks keep their activations, with as few blocks offloaded as
    /// it takes.
    pub(super) fn way_that_fits(&self, limit: u64, kept: usize) -> Result<Self> {
        let ways = self.ways();
        let offloading = |way: &Self, offloaded: usize| Self {
            offloaded,
            ..way.clone()
        };
        // Host memory may take some of the blocks where it does not take all of them.
        let fewest = |way: &Self| {
            (0..=way.offloaded)
                .map(|offloaded| offloading(way, offloaded))
                .find(|way| way.fits(limit, kept))
        };
        if let Some(way) = ways.iter().find_map(fewest) {
            return Ok(way);
        }
        let least = ways.last().unwrap_or(self);
        Err(least.does_not_fit(limit, &Plan::keeping(least, kept)))
    }

    /// The refusal of `plan`, with the smallest change that would fit.
    fn does_not_fit(&self, limit: u64, plan: &Plan) -> Error {
        let fits = |other: &Self| other.fits(limit, 0);
        let can_page = self.engine == Engine::Kernels && !self.dora;
        // The mildest first.
        let optimizers = [
            ("paged_adamw_32bit", Moments::F32, Side::Host),
            ("adamw_8bit", Moments::EightBit, Side::Device),
            ("paged_adamw_8bit", Moments::EightBit, Side::Host),
        ];
        let optimizers = optimizers.into_iter().filter(|(_, moments, side)| {
            let is_smaller = *moments == Moments::EightBit || self.moments == Moments::F32;
            is_smaller && (can_page || *side == Side::Device)
        });
        let others = optimizers.map(|(name, moments, optimizer)| {
            let residence = Residence {
                optimizer,
                ..self.residence
            };
            let other = Self {
                moments,
                residence,
                ..self.clone()
            };
            (name, other)
        });
        let others: Vec<_> = others.collect();
        // With the same moments elsewhere the result is the same.
        let optimizer = |rows: usize, changes_result: bool| {
            let mut others = others.iter();
            let found = others.find(|(_, other)| {
                let is_wanted = changes_result || other.moments == self.moments;
                is_wanted && fits(&other.shortened(rows))
            });
            found.map(|(name, _)| *name)
        };
        let of_rank_one = others.last().map(|(name, other)| {
            let ranks = other.ranks.iter().map(|block| block.map(|r| r.min(1)));
            let other = Self {
                ranks: ranks.collect(),
                ..other.shortened(1)
            };
            (name, other)
        });
        let advice = if fits(self) {
            "leave gradient_checkpointing out, or set it to true".into()
        } else if let Some(name) = optimizer(self.rows, false) {
            format!("optim {name} would fit")
        } else if let Some(rows) = self.longest_that_fits(limit) {
            format!(
                "micro-batches of {rows} tokens instead of {} would fit (per_device_train_batch_size, max_seq_len)",
                self.rows
            )
        } else if let Some(name) = optimizer(1, true) {
            format!("optim {name} and shorter micro-batches would fit")
        } else if let Some((name, _)) = of_rank_one.filter(|(_, other)| fits(other)) {
            format!("take a smaller lora_r, optim {name} and shorter micro-batches")
        } else {
            "take a smaller model".into()
        };
        Error::DoesNotFit {
            needed: plan.peak.total(),
            limit,
            advice,
        }
    }

    /// The same with micro-batches of at most `rows` tokens.
    fn shortened(&self, rows: usize) -> Self {
        Self {
            rows: self.rows.min(rows),
            label_rows: self.label_rows.min(rows),
            positions: self.positions.min(rows),
            ..self.clone()
        }
    }

    /// Tokens of the longest micro-batch that fits into `limit` when every block computes its activations again.
    pub fn longest_that_fits(&self, limit: u64) -> Option<usize> {
        longest(self.rows + 1, |rows| {
            self.shortened(rows).fits_somehow(limit)
        })
    }

    /// Tokens of the longest sequence, with loss on every token, that would fit alone.
    pub fn longest_sequence(&self, limit: u64) -> Option<usize> {
        let of = |tokens| Self {
            rows: tokens,
            label_rows: tokens,
            positions: tokens,
            ..self.clone()
        };
        let fits = |tokens| of(tokens).fits_somehow(limit);
        let too_long = std::iter::successors(Some(2), |n: &usize| n.checked_mul(2));
        longest(too_long.into_iter().find(|&tokens| !fits(tokens))?, fits)
    }

    fn fits_somehow(&self, limit: u64) -> bool {
        let ways = self.ways();
        // Several micro-batches together never take less than one at a time.
        let mut alone = ways.iter().filter(|way| way.together == 1);
        alone.any(|way| way.fits(limit, 0))
    }
}

/// The largest number below `too_large` that fits, if 1 does.
fn longest(too_large: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
    if !fits(1) {
        return None;
    }
    let (mut fitting, mut too_large) = (1, too_large);
    while too_large - fitting > 1 {
        let middle = fitting.midpoint(too_large);
        match fits(middle) {
            true => fitting = middle,
            false => too_large = middle,
        }
    }
    Some(fitting)
}
