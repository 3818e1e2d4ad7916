//! Forward and backward through a decoder: micro-batches go through each block one after another.
//!
//! Taken together, several of them need the weights of a block once on the way up and once on the way down. What is added to
//! the adapters' gradients is added in the order of the micro-batches either way, with the same bits.

use std::borrow::Cow;

use candle_core::Tensor;

use super::block::{ActivationPolicy, Block, InputGrad, Layout, Saved};
use super::decoder::{Decoder, Rows, Sequences};
use super::lora_dropout::{LoraDropout, repeat, repeat_sequences};
use super::vocabulary::ModuleToSave;
use crate::Result;
use crate::ops::dropout::Dropout;
use crate::ops::linear_cross_entropy::{self, Losses};
use crate::ops::matrix_dropout::MatrixDropout;
use crate::ops::neftune::Noise;
use crate::ops::weight::Direction;

/// What training changes at random in the forward pass of a micro-batch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Regularization {
    /// On the adapters' inputs.
    pub dropout: Option<Dropout>,
    /// On the adapters' matrices.
    pub matrix_dropout: Option<MatrixDropout>,
    /// On the token embeddings.
    pub noise: Option<Noise>,
}

impl Regularization {
    fn lora_dropout(&self) -> LoraDropout {
        LoraDropout {
            inputs: self.dropout,
            matrices: self.matrix_dropout,
        }
    }
}

/// What a decoder is trained on at a time.
///
/// # Shapes
/// `labels: [N]`.
#[derive(Debug, Clone, Copy)]
pub struct MicroBatch<'a> {
    pub sequences: Sequences<'a>,
    pub labels: &'a [i64],
    pub regularization: Regularization,
}

impl Decoder {
    /// Forward and backward: adds the gradient of `d_loss` times the summed loss of each micro-batch to the adapters'
    /// gradients, with one policy for each block. Of a micro-batch with several instances the mean over these counts, and
    /// there are the losses of all.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a micro-batch whose parts do not belong together.
    pub fn backward(
        &self,
        micro_batches: &[MicroBatch<'_>],
        d_loss: f32,
        policies: &[ActivationPolicy],
    ) -> Result<Vec<Losses>> {
        let _pass = self.begin_pass()?;
        let blocks = self.blocks();
        let d_embedding = self.vocabulary(ModuleToSave::Embedding).grad();
        let lowest = match d_embedding {
            Some(_) => Some(0),
            None => blocks.iter().position(Block::has_lora),
        };
        let lowest = lowest.unwrap_or(blocks.len());
        let passes = micro_batches.iter().map(|batch| Pass::new(self, batch));
        let mut passes = passes.collect::<Result<Vec<_>>>()?;
        for (layer, (block, &policy)) in blocks.iter().zip(policies).enumerate() {
            let _weights = self.enter(layer, Direction::Up)?;
            // Below the lowest adapter nothing is read again.
            let policy = match layer < lowest {
                true => ActivationPolicy::Recompute,
                false => policy,
            };
            for pass in &mut passes {
                let saved = pass.forward(block, policy)?;
                if layer >= lowest {
                    pass.saved.push(saved);
                }
            }
        }
        let losses = passes.iter_mut().map(|pass| pass.loss(d_loss));
        let losses = losses.collect::<Result<Vec<_>>>()?;
        for (layer, block) in blocks.iter().enumerate().skip(lowest).rev() {
            let input = match layer == lowest && d_embedding.is_none() {
                true => InputGrad::Skip,
                false => InputGrad::Needed,
            };
            let _weights = self.enter(layer, Direction::Down)?;
            for pass in &mut passes {
                pass.backward(block, input)?;
            }
        }
        if let Some(d_embedding) = d_embedding {
            for pass in passes {
                pass.embedding_backward(d_embedding)?;
            }
        }
        Ok(losses)
    }
}

/// A micro-batch on its way.
struct Pass<'a> {
    decoder: &'a Decoder,
    batch: &'a MicroBatch<'a>,
    rows: Rows,
    /// Those of all instances, `[N]`.
    input_ids: Cow<'a, [u32]>,
    /// The output of the block that was last gone through upwards, then the gradient of the input of the one downwards,
    /// `[N, D]`; `None` once nothing below is trained.
    hidden: Option<Tensor>,
    saved: Vec<Saved>,
}

impl<'a> Pass<'a> {
    fn new(decoder: &'a Decoder, batch: &'a MicroBatch<'a>) -> Result<Self> {
        let instances = batch.regularization.lora_dropout().instances();
        let input_ids = repeat(batch.sequences.input_ids, instances);
        let positions = repeat(batch.sequences.positions, instances);
        let cu_seqlens = repeat_sequences(batch.sequences.cu_seqlens, instances);
        let rows = decoder.rows(Sequences {
            input_ids: &input_ids,
            positions: &positions,
            cu_seqlens: &cu_seqlens,
        })?;
        let noise = batch.regularization.noise;
        let x = decoder.embed(&input_ids, noise.map(|noise| (noise, &*cu_seqlens)))?;
        Ok(Self {
            rows,
            input_ids,
            hidden: Some(x),
            saved: Vec::new(),
            decoder,
            batch,
        })
    }

    fn layout(&self) -> Layout<'_> {
        Layout {
            dropout: self.batch.regularization.lora_dropout(),
            ..self.rows.layout()
        }
    }

    fn take_hidden(&mut self) -> Tensor {
        let hidden = self.hidden.take();
        hidden.expect("every block but the lowest trained one hands on what it was given")
    }

    fn forward(&mut self, block: &Block, policy: ActivationPolicy) -> Result<Saved> {
        let x = self.take_hidden();
        let host = self.decoder.host_memory();
        let host = host.filter(|_| policy == ActivationPolicy::Offload);
        // The input leaves while the block computes.
        let parked = host.map(|host| host.park(x.clone())).transpose()?;
        let (y, saved) = block.forward(&x, &self.layout(), policy)?;
        self.hidden = Some(y);
        let Some(mut parked) = parked else {
            return Ok(saved);
        };
        drop((x, saved));
        parked.release()?;
        Ok(Saved::Parked(Box::new(parked)))
    }

    fn loss(&mut self, d_loss: f32) -> Result<Losses> {
        let (decoder, x) = (self.decoder, self.take_hidden());
        let instances = self.layout().dropout.instances();
        let labels = repeat(self.batch.labels, instances);
        let d_loss = d_loss / instances as f32;
        let normed = decoder.final_norm(&x)?;
        let d_head = decoder.vocabulary(ModuleToSave::Head).grad();
        let (losses, d_normed) =
            linear_cross_entropy::backward(&normed, decoder.head(), &labels, d_loss, d_head)?;
        self.hidden = Some(decoder.final_norm_backward(&d_normed, &x)?);
        Ok(losses)
    }

    fn backward(&mut self, block: &Block, input: InputGrad) -> Result<()> {
        let saved = self.saved.pop();
        let mut saved = saved.expect("one was kept for each block from the lowest adapter up");
        // The highest block's input was not asked for before; the next one comes while this block computes.
        saved.fetch()?;
        if let Some(next) = self.saved.last_mut() {
            next.fetch()?;
        }
        let dy = self.take_hidden();
        self.hidden = block.backward(dy, saved, &self.layout(), input)?;
        Ok(())
    }

    fn embedding_backward(mut self, d_embedding: &Tensor) -> Result<()> {
        let dx = self.take_hidden();
        self.decoder
            .embed_backward(&dx, &self.input_ids, d_embedding)
    }
}
