//! The linear layers of a block, under the names that checkpoints and PEFT use.

use super::config::DecoderConfig;

/// A linear layer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Module {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Module {
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The modules that read the same input as this one, with itself: they follow one another in [`ALL`](Self::ALL).
    pub fn with_same_input(self) -> &'static [Self] {
        match self {
            Self::Q | Self::K | Self::V => &[Self::Q, Self::K, Self::V],
            Self::O => &[Self::O],
            Self::Gate | Self::Up => &[Self::Gate, Self::Up],
            Self::Down => &[Self::Down],
        }
    }

    /// The name that `target_modules` lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    fn parent(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }
}

impl DecoderConfig {
    /// The path of a block within the model, `model.layers.0`.
    pub(super) fn block_path(&self, layer: usize) -> String {
        format!("{}.layers.{layer}", self.decoder_path)
    }

    /// The path of a linear layer within the model, `model.layers.0.self_attn.q_proj`.
    pub fn linear_path(&self, layer: usize, module: Module) -> String {
        let (parent, name) = (module.parent(), module.name());
        format!("{}.{parent}.{name}", self.block_path(layer))
    }

    /// The linear layers of all blocks, by their layer.
    pub fn linears(&self) -> impl Iterator<Item = (usize, Module)> {
        let of_layer = |layer| Module::ALL.map(move |module| (layer, module));
        (0..self.num_layers).flat_map(of_layer)
    }
}
