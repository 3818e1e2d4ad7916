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
    /// Q, K and V in one, their outputs one after another.
    Qkv,
    /// The same of Gate and Up.
    GateUp,
}

impl Module {
    /// Of all models; those of one are its [`modules`](DecoderConfig::modules).
    pub const ALL: [Self; 9] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
        Self::Qkv,
        Self::GateUp,
    ];

    /// The modules that read the same input as this one, with itself.
    pub fn with_same_input(self) -> &'static [Self] {
        match self {
            Self::Q | Self::K | Self::V => &[Self::Q, Self::K, Self::V],
            Self::O => &[Self::O],
            Self::Gate | Self::Up => &[Self::Gate, Self::Up],
            Self::Down => &[Self::Down],
            Self::Qkv => &[Self::Qkv],
            Self::GateUp => &[Self::GateUp],
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
            Self::Qkv => "qkv_proj",
            Self::GateUp => "gate_up_proj",
        }
    }

    fn parent(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O | Self::Qkv => "self_attn",
            Self::Gate | Self::Up | Self::Down | Self::GateUp => "mlp",
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

    /// The linear layers of a block, in the order of the forward pass.
    pub fn modules(&self) -> impl Iterator<Item = Module> + Clone {
        let of_attention = self.attention_inputs().iter().chain(&[Module::O]);
        let of_mlp = self.mlp_inputs().iter().chain(&[Module::Down]);
        of_attention.chain(of_mlp).copied()
    }

    /// Those that queries, keys and values come from.
    pub fn attention_inputs(&self) -> &'static [Module] {
        match self.fused_qkv {
            true => Module::Qkv.with_same_input(),
            false => Module::Q.with_same_input(),
        }
    }

    /// Those that make what is multiplied before `down_proj`.
    pub fn mlp_inputs(&self) -> &'static [Module] {
        match self.fused_gate_up {
            true => Module::GateUp.with_same_input(),
            false => Module::Gate.with_same_input(),
        }
    }

    /// The linear layers of all blocks, by their layer.
    pub fn linears(&self) -> impl Iterator<Item = (usize, Module)> {
        let modules = self.modules();
        (0..self.num_layers).flat_map(move |layer| {
            let of_layer = modules.clone();
            of_layer.map(move |module| (layer, module))
        })
    }
}
