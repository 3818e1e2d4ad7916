//! Quantizing with an initialization takes the memory of the largest weight, whatever the model's size.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Device;
use qlora::model::{InitializeOptions, InitializingQuantizer};
use qlora::ops::philox::Normal;
use qlora::quant::QuantizeOptions;
use qlora::store::{AdapterConfig, Existing, QuantizeJob, TargetModules, quantize_with};
use safetensors::tensor::{Dtype, TensorView};

/// The system's allocator, with the bytes in use and the most there were.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const OUT: usize = 512;
const IN: usize = 2048;
const LAYERS: usize = 8;
const RANK: usize = 16;

/// A model of eight weights of a million elements.
fn write_model(dir: &Path) {
    let mut normal = Normal::new(1, [0, 0]);
    let values: Vec<f32> = (0..OUT * IN).map(|_| normal.next_f32()).collect();
    let bytes: &[u8] = bytemuck::cast_slice(&values);
    let views = (0..LAYERS).map(|layer| {
        let view = TensorView::new(Dtype::F32, vec![OUT, IN], bytes).unwrap();
        (format!("model.layers.{layer}.mlp.gate_proj.weight"), view)
    });
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    std::fs::write(dir.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
}

#[test]
fn one_weight_at_a_time_is_in_memory() {
    let home = tempfile::tempdir().unwrap();
    write_model(home.path());
    // Values, 4-bit copy; a dozen matrices of rank and oversampling; the writers' buffers.
    let weight = OUT * IN * 4 + OUT * IN;
    let factors = 12 * (RANK + 16) * (OUT + IN) * 4;
    let allowed = weight + factors + (3 << 20);
    assert!(2 * allowed < LAYERS * OUT * IN * 4, "the model is larger");
    for method in ["pissa_niter_2", "loftq", "olora"] {
        let options = InitializeOptions {
            method: method.parse().unwrap(),
            adapter: AdapterConfig {
                base_model_name_or_path: None,
                revision: None,
                r: RANK,
                lora_alpha: 16.0,
                lora_dropout: 0.0,
                target_modules: TargetModules::AllLinear,
                use_rslora: false,
                ..AdapterConfig::default()
            },
            quantization_iterations: 1,
            seed: 0,
            device: Device::Cpu,
            original_model: PathBuf::new(),
            initialized_base: PathBuf::new(),
        };
        let job = QuantizeJob {
            source: home.path().to_path_buf(),
            destination: home.path().join(method),
            existing: Existing::Refuse,
            options: QuantizeOptions::default(),
            max_shard_bytes: u64::MAX,
        };
        let mut quantizer = InitializingQuantizer::new(options).unwrap();
        let before = IN_USE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        quantize_with(&job, &mut quantizer, |_| ()).unwrap();
        let taken = PEAK.load(Ordering::Relaxed) - before;
        println!("{method}: {taken} bytes, {allowed} allowed");
        assert!(taken > OUT * IN * 4, "the count does not count");
        assert!(
            taken < allowed,
            "{method}: {taken} bytes, {allowed} allowed"
        );
    }
}
