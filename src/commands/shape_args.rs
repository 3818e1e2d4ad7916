//! The size of a model without a checkpoint: `--shape`, and single sizes by their names in `config.json`.

use qlora::train::Shape;

#[derive(Debug, clap::Args)]
pub struct ShapeArgs {
    /// Size of the model: llama-110m, tinyllama-1.1b, llama-7b, -13b, -33b or -65b, llama3-8b or -70b, mistral-7b,
    /// qwen2.5-7b, -14b, -32b or -72b; single sizes below win over it
    #[arg(long, value_parser = parse_shape)]
    shape: Option<Shape>,
    /// Width of the residual stream
    #[arg(long = "hidden_size", alias = "hidden-size", value_name = "N")]
    hidden_size: Option<usize>,
    /// Width of the MLP
    #[arg(
        long = "intermediate_size",
        alias = "intermediate-size",
        value_name = "N"
    )]
    intermediate_size: Option<usize>,
    /// Blocks
    #[arg(
        long = "num_hidden_layers",
        alias = "num-hidden-layers",
        value_name = "N"
    )]
    num_hidden_layers: Option<usize>,
    /// Query heads
    #[arg(
        long = "num_attention_heads",
        alias = "num-attention-heads",
        value_name = "N"
    )]
    num_attention_heads: Option<usize>,
    /// Key/value heads; unset: those of the shape, or as many as num_attention_heads where that is given
    #[arg(
        long = "num_key_value_heads",
        alias = "num-key-value-heads",
        value_name = "N"
    )]
    num_key_value_heads: Option<usize>,
    /// Tokens in the vocabulary
    #[arg(long = "vocab_size", alias = "vocab-size", value_name = "N")]
    vocab_size: Option<usize>,
    /// The head is the embedding matrix
    #[arg(
        long = "tie_word_embeddings",
        alias = "tie-word-embeddings",
        value_name = "BOOL",
        hide_possible_values = true
    )]
    tie_word_embeddings: Option<bool>,
}

fn parse_shape(name: &str) -> Result<Shape, String> {
    Shape::named(name).ok_or_else(|| {
        let names = Shape::NAMED.map(|(name, _)| name).join(", ");
        format!("expected one of {names}")
    })
}

impl ShapeArgs {
    /// Whether anything is said of it.
    pub fn is_given(&self) -> bool {
        let sizes = [
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.vocab_size,
        ];
        let is_sized = sizes.iter().any(Option::is_some) || self.tie_word_embeddings.is_some();
        self.shape.is_some() || is_sized
    }

    /// The shape that was asked for, in the sizes that were not of `otherwise`.
    pub fn shape(&self, otherwise: Shape) -> Shape {
        let named = self.shape.unwrap_or(otherwise);
        let heads = self.num_attention_heads;
        Shape {
            hidden_size: self.hidden_size.unwrap_or(named.hidden_size),
            intermediate_size: self.intermediate_size.unwrap_or(named.intermediate_size),
            num_hidden_layers: self.num_hidden_layers.unwrap_or(named.num_hidden_layers),
            num_attention_heads: heads.unwrap_or(named.num_attention_heads),
            num_key_value_heads: self
                .num_key_value_heads
                .or(heads)
                .unwrap_or(named.num_key_value_heads),
            vocab_size: self.vocab_size.unwrap_or(named.vocab_size),
            tie_word_embeddings: self
                .tie_word_embeddings
                .unwrap_or(named.tie_word_embeddings),
        }
    }
}
