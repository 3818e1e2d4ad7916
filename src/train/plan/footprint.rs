//! The parts of what a run takes of the device, and bytes of each.

/// A part of the memory of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// 4-bit codes of the linear layers.
    Codes,
    /// Their block scales, and the scales of those.
    Scales,
    /// Linear layers that a 4-bit model has in 16 bits.
    Dense,
    /// Codes and scales of the blocks that are there at a time, where weights are streamed.
    Slots,
    /// Embedding and head.
    Vocabulary,
    /// Weights of the norms, biases, and the rotary table.
    Vectors,
    /// Values of the adapters and of what is trained whole, the lower halves of their masters included.
    Adapters,
    Gradients,
    /// Moments of the optimizer.
    Moments,
    /// Where the weights of a block are dequantized.
    Dequantized,
    /// What blocks keep from forward for backward.
    Activations,
    /// Tensors of the block and of the head that are being computed.
    Working,
    /// Logits of a chunk of rows.
    LossChunk,
    /// What the threads of the CPU pack operands of products into.
    Threads,
    /// What the allocator of a device cannot use because it is in pieces.
    Pieces,
    /// The context of CUDA with the kernels in it, and the workspace of cuBLAS.
    Libraries,
}

impl Item {
    pub const ALL: [Self; 16] = [
        Self::Codes,
        Self::Scales,
        Self::Dense,
        Self::Slots,
        Self::Vocabulary,
        Self::Vectors,
        Self::Adapters,
        Self::Gradients,
        Self::Moments,
        Self::Dequantized,
        Self::Activations,
        Self::Working,
        Self::LossChunk,
        Self::Threads,
        Self::Pieces,
        Self::Libraries,
    ];

    /// The name that users read.
    pub fn name(self) -> &'static str {
        match self {
            Self::Codes => "4-bit weights",
            Self::Scales => "block scales",
            Self::Dense => "16-bit weights",
            Self::Slots => "blocks being streamed",
            Self::Vocabulary => "embedding and head",
            Self::Vectors => "norms, biases, rotary table",
            Self::Adapters => "adapters",
            Self::Gradients => "gradients",
            Self::Moments => "optimizer moments",
            Self::Dequantized => "dequantized block",
            Self::Activations => "kept activations",
            Self::Working => "working tensors",
            Self::LossChunk => "loss chunk",
            Self::Threads => "scratch of threads",
            Self::Pieces => "memory in pieces",
            Self::Libraries => "CUDA and its libraries",
        }
    }
}

/// Bytes by [`Item`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Footprint([u64; Item::ALL.len()]);

impl Footprint {
    pub fn bytes(&self, item: Item) -> u64 {
        self.0[item as usize]
    }

    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    pub(super) fn add(&mut self, item: Item, bytes: u64) {
        self.0[item as usize] += bytes;
    }

    pub(super) fn remove(&mut self, item: Item, bytes: u64) {
        self.0[item as usize] -= bytes;
    }

    pub(super) fn plus(mut self, other: &Self) -> Self {
        for (own, other) in self.0.iter_mut().zip(other.0) {
            *own += other;
        }
        self
    }
}
