//! The time that the host needs to queue the forward and backward pass of a micro-batch, on a device that does nothing.
//!
//! `cargo bench --bench launches` prints it for models of 32 and 80 blocks, whose tensors are tiny: what the host does for a
//! launch does not depend on their sizes. What the driver and cuBLAS take for it comes on top, and is not in the figures.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::Device;
use qlora::device::{self, DeviceMemory, Gemm, Launch, Marker, PinnedMemory, Placement, Runtime};
use qlora::model::{
    ActivationPolicy, Decoder, InitLoraWeights, MicroBatch, Regularization, Sequences,
};
use qlora::ops::dropout::Dropout;
use qlora::quant::QuantizeOptions;
use qlora::store::{AdapterConfig, Checkpoint};
use qlora::train::{Shape, SyntheticRun};
use qlora::{Error, Result};

const TOKENS: usize = 16;
const ROUNDS: usize = 21;

/// Counts what it is asked for.
#[derive(Debug, Default)]
struct Idle {
    requests: AtomicUsize,
}

impl Idle {
    fn note(&self) -> Result<()> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn not_asked_for<T>() -> Result<T> {
    Err(Error::Train("not asked for by a resident model".into()))
}

impl Runtime for Idle {
    unsafe fn launch(&self, _: &Launch<'_>) -> Result<()> {
        self.note()
    }

    unsafe fn launch_aside(&self, _: &Launch<'_>, _: &Marker) -> Result<Marker> {
        self.note()?;
        Ok(Marker(Arc::new(())))
    }

    unsafe fn gemm(&self, _: &Gemm) -> Result<()> {
        self.note()
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn pinned(&self, _: usize) -> Result<Box<dyn PinnedMemory>> {
        not_asked_for()
    }

    fn mark(&self) -> Result<Marker> {
        Ok(Marker(Arc::new(())))
    }

    unsafe fn copy(&self, _: &[u8], _: u64, _: Option<&Marker>) -> Result<Marker> {
        not_asked_for()
    }

    unsafe fn copy_back(&self, _: u64, _: &mut [u8], _: Option<&Marker>) -> Result<Marker> {
        not_asked_for()
    }

    fn wait(&self, _: &Marker) -> Result<()> {
        Ok(())
    }

    fn wait_on_host(&self, _: &Marker) -> Result<()> {
        not_asked_for()
    }

    fn time(&self, _: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        not_asked_for()
    }

    fn multiprocessors(&self) -> u32 {
        132
    }

    fn memory(&self) -> Result<DeviceMemory> {
        not_asked_for()
    }

    fn withhold(&self, _: u64) -> Result<Box<dyn Any + Send>> {
        not_asked_for()
    }

    fn has_warpgroup_products(&self) -> bool {
        true
    }

    fn reset_peak_memory(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self) -> Result<()> {
        Ok(())
    }

    fn describe(&self) -> String {
        "a device that does nothing".into()
    }
}

fn decoder(blocks: usize) -> Result<Decoder> {
    let shape = Shape {
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: blocks,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        vocab_size: 64,
        tie_word_embeddings: true,
    };
    let run = SyntheticRun::create(&shape, 1, TOKENS, QuantizeOptions::default())?;
    let checkpoint = Checkpoint::open(run.model())?;
    let mut decoder = Decoder::load(&checkpoint, None, &Placement::kernels(Device::Cpu))?;
    let config = AdapterConfig {
        r: 8,
        ..AdapterConfig::default()
    };
    decoder.add_lora(&config, InitLoraWeights::Default, 7)?;
    Ok(decoder)
}

/// Requests and the median of seconds of a pass.
fn measure(
    idle: &Idle,
    decoder: &Decoder,
    policy: ActivationPolicy,
    dropout: Option<Dropout>,
) -> Result<(usize, f64)> {
    let ids: Vec<u32> = (0..TOKENS as u32).collect();
    let labels: Vec<i64> = (0..TOKENS as i64).collect();
    let micro_batch = MicroBatch {
        sequences: Sequences {
            input_ids: &ids,
            positions: &ids,
            cu_seqlens: &[0, TOKENS],
        },
        labels: &labels,
        regularization: Regularization {
            dropout,
            ..Regularization::default()
        },
    };
    let policies = vec![policy; decoder.blocks().len()];
    let mut seconds = Vec::with_capacity(ROUNDS);
    let mut requests = 0;
    for _ in 0..ROUNDS {
        let before = idle.requests.load(Ordering::Relaxed);
        let started = Instant::now();
        decoder.backward(&[micro_batch], 1.0, &policies)?;
        seconds.push(started.elapsed().as_secs_f64());
        requests = idle.requests.load(Ordering::Relaxed) - before;
    }
    seconds.sort_by(f64::total_cmp);
    Ok((requests, seconds[ROUNDS / 2]))
}

fn main() -> Result<()> {
    let idle = Arc::new(Idle::default());
    device::install(&Device::Cpu, Arc::clone(&idle) as _);
    println!("blocks  policy     dropout  launches        ms  us/block  us/launch");
    for blocks in [32, 80] {
        let decoder = decoder(blocks)?;
        for policy in [ActivationPolicy::Keep, ActivationPolicy::Recompute] {
            for p in [0.0, 0.1] {
                let dropout = Dropout::new(p, 7, 0, 0);
                let (launches, seconds) = measure(&idle, &decoder, policy, dropout)?;
                println!(
                    "{blocks:>6}  {:<9}  {p:>7}  {launches:>8}  {:>8.2}  {:>8.1}  {:>9.2}",
                    format!("{policy:?}"),
                    seconds * 1e3,
                    seconds * 1e6 / blocks as f64,
                    seconds * 1e6 / launches as f64,
                );
            }
        }
    }
    Ok(())
}
